"""Structured channel pruning for JAX: a smaller Flax model from a trained one."""

from jaxprune.budget import select
from jaxprune.checkpoint import load, save
from jaxprune.errors import PruneError
from jaxprune.methods.scores import score
from jaxprune.pipeline import trace
from jaxprune.pruning import methods, prune
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
    "load",
    "methods",
    "prune",
    "save",
    "score",
    "select",
    "shrink",
    "shrink_like",
    "trace",
    "verify",
]
