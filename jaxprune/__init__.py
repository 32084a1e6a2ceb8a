"""Structured channel pruning for JAX: a smaller Flax model from a trained one."""

from jaxprune.budget import select
from jaxprune.checkpoint import load, save
from jaxprune.constants import fold_constants
from jaxprune.errors import PruneError
from jaxprune.kept import KeptIndices, kept_indices
from jaxprune.method_options import methods
from jaxprune.methods.scores import score
from jaxprune.mirrors import shrink_like
from jaxprune.pipeline import prune
from jaxprune.records import Budget, Group, Plan, Slim, Slot
from jaxprune.surgery import shrink
from jaxprune.tracing import trace
from jaxprune.verify import verify

__all__ = [
    "Budget",
    "Group",
    "KeptIndices",
    "Plan",
    "PruneError",
    "Slim",
    "Slot",
    "fold_constants",
    "kept_indices",
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
