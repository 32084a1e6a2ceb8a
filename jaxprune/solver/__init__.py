"""Channel selection by LASSO and least-squares refits, from second moments alone."""

from jaxprune.solver.cpli import cpli_select, suppression
from jaxprune.solver.gram import GateSystem, combine, gate_system
from jaxprune.solver.lasso import Selection, lasso, select_exact
from jaxprune.solver.refit import Refit, refit

__all__ = [
    "GateSystem",
    "Refit",
    "Selection",
    "combine",
    "cpli_select",
    "gate_system",
    "lasso",
    "refit",
    "select_exact",
    "suppression",
]
