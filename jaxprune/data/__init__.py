"""Data sets: splits of labelled images, and deterministic batches of them."""

from jaxprune.data.batching import Transform, batches, prepare, raw_batches
from jaxprune.data.dataset import Dataset, Split
from jaxprune.data.sources import load

__all__ = [
    "Dataset",
    "Split",
    "Transform",
    "batches",
    "load",
    "prepare",
    "raw_batches",
]
