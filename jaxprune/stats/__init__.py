"""Mergeable one-pass statistics of activations, and the patches they are taken from."""

from jaxprune.stats.activations import (
    ActivationStats,
    Comoments,
    Histogram,
)
from jaxprune.stats.moments import Moments
from jaxprune.stats.patches import example_positions, gather_patches, gather_positions

__all__ = [
    "ActivationStats",
    "Comoments",
    "Histogram",
    "Moments",
    "example_positions",
    "gather_patches",
    "gather_positions",
]
