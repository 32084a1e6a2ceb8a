"""The options of a call to prune, by the part of its method that takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from jaxprune import budget as budgets
from jaxprune.checks import (
    FLAG,
    FUNCTION,
    SEED,
    Rule,
    check_names,
    check_values,
    did_you_mean,
    one_of,
    optional,
    whole,
)
from jaxprune.criteria import CRITERIA
from jaxprune.errors import BudgetError, ConfigError
from jaxprune.methods.cpli import Objective
from jaxprune.methods.redundancy_rules import Rules
from jaxprune.methods.refitting import Refitting
from jaxprune.records import Budget
from jaxprune.selection import LIMIT_RULES, RANKING_RULES

LAYERWISE = ("cpli", "lasso", "importance_redundancy")
# Limits of the widths, which all methods take; what to ignore is said to the trace.
WIDTHS = {name: rule for name, rule in LIMIT_RULES.items() if name != "ignore"}
ALLOCATION = {"allocation": one_of("sensitivity", "uniform")}
# Arguments of every call.
ARGUMENTS: dict[str, Rule] = {
    "finetune": optional(FUNCTION),
    "on_progress": optional(FUNCTION),
    "steps": optional(whole(1)),
    "latency_batch": optional(whole(1)),
    "seed": SEED,
    "verify": FLAG,
}


class Options(NamedTuple):
    """What a call's options say, by the part of the method that takes them.

    Attributes:
      objective: of cpli and lasso.
      rules: of importance_redundancy.
      refitting: of all.
      selection: widths and their limits, see `jaxprune.selection`.
    """

    objective: Objective
    rules: Rules
    refitting: Refitting
    selection: dict[str, Any]


def methods() -> tuple[str, ...]:
    """Names that `prune(method=...)` takes."""
    return (*LAYERWISE, *CRITERIA)


def parse_options(
    method: str, options: Mapping[str, Any], asked: Budget | None
) -> Options:
    """The options by part.

    Raises:
      ConfigError: an unknown method, an option that it does not take, or a bad value.
      BudgetError: no budget for a method that needs one.
    """
    if not one_of(*methods()).holds(method):
        raise ConfigError(
            f"unknown method {method!r}; {did_you_mean(method, methods())}known: "
            f"{', '.join(methods())}"
        )
    selection = WIDTHS | (ALLOCATION if method in LAYERWISE else RANKING_RULES)
    taken = _names(Refitting)
    if method == "cpli":
        taken |= _names(Objective)
    elif method == "lasso":
        taken |= {"nonnegative"}
    elif method == "importance_redundancy":
        taken = (taken | _names(Rules)) - {"passes"}
    # A preset that is not asked for is no option.
    given = {n: v for n, v in options.items() if (n, v) != ("preset", None)}
    check_names(given, {*taken, *selection}, f"method {method!r}")
    check_values(given, selection)
    if asked is None and method != "importance_redundancy":
        raise BudgetError(budgets.NO_BUDGET)
    if asked is None and "allocation" in given:
        raise ConfigError(
            "allocation shares out a budget: pass macs=, params=, bytes=, latency_ms= "
            "or keep=, or leave it out"
        )
    if given.get("preset") == "seed":
        fixed = sorted(selection.keys() & given.keys())
        if asked is not None or fixed:
            raise ConfigError(
                "preset='seed' prunes by its two thresholds: leave out "
                f"{', '.join(fixed) or 'macs, params, bytes, keep and latency_ms'}"
            )
    if method == "lasso":
        given |= {"selection": "lasso", "mu": 0.0, "feature_importance": False}
    return Options(
        Objective(**_of(Objective, given)),
        Rules(**_of(Rules, given)),
        Refitting(**_of(Refitting, given)),
        {n: v for n, v in given.items() if n in selection},
    )


def _names(record: type) -> set[str]:
    return {field.name for field in fields(record)}


def _of(record: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are fields of the record."""
    return {n: v for n, v in options.items() if n in _names(record)}
