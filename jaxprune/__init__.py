"""Structured channel pruning for JAX: a smaller Flax model from a trained one."""

from jaxprune.errors import PruneError
from jaxprune.pipeline import trace
from jaxprune.records import Budget, Group, Plan, Slim, Slot
from jaxprune.slicing import shrink_like
from jaxprune.surgery import shrink
from jaxprune.verify import verify

__all__ = [
    "Budget",
    "Group",
    "Plan",
    "PruneError",
    "Slim",
    "Slot",
    "shrink",
    "shrink_like",
    "trace",
    "verify",
]
