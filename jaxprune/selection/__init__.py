"""From scores or loss curves and a budget to the channels or counts that are kept."""

from jaxprune.selection.allocate import allocate
from jaxprune.selection.fit import LIMIT_RULES, Limits, limits
from jaxprune.selection.plans import (
    RANKING_RULES,
    checked_scores,
    select,
    uniform_counts,
)

__all__ = [
    "LIMIT_RULES",
    "RANKING_RULES",
    "Limits",
    "allocate",
    "checked_scores",
    "limits",
    "select",
    "uniform_counts",
]
