"""From scores or loss curves and a budget to the channels or counts that are kept."""

from jaxprune.selection.allocate import allocate
from jaxprune.selection.fit import Limits, limits
from jaxprune.selection.plans import checked_scores, select, uniform_counts

__all__ = [
    "Limits",
    "allocate",
    "checked_scores",
    "limits",
    "select",
    "uniform_counts",
]
