"""What values options take: a rule is a text and a test of a value."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxprune.errors import ConfigError, PruneError


class Rule(NamedTuple):
    """What a value must be, in words, and whether one is."""

    text: str
    holds: Callable[[Any], bool]


def whole(least: float = -math.inf, most: float = math.inf) -> Rule:
    """Integers, no booleans."""
    return _between("an integer", is_whole, least, most)


def number(least: float = -math.inf, most: float = math.inf) -> Rule:
    """Finite numbers."""
    return _between("a finite number", is_number, least, most)


def _between(
    noun: str, holds: Callable[[Any], bool], least: float, most: float
) -> Rule:
    ends = f", {least} or more" if most == math.inf else f" from {least} to {most}"
    text = noun if least == -math.inf else noun + ends
    return Rule(text, lambda v: holds(v) and least <= v <= most)


def one_of(*names: str) -> Rule:
    """Strings."""
    *first, last = map(repr, names)
    text = f"{', '.join(first)} or {last}" if first else last
    return Rule(text, lambda v: isinstance(v, str) and v in names)


def optional(rule: Rule) -> Rule:
    """What the rule takes, and None."""
    return Rule(f"{rule.text}, or None", lambda v: v is None or rule.holds(v))


def by_pattern(rule: Rule) -> Rule:
    """{name pattern: what the rule takes}."""

    def holds(value: Any) -> bool:
        return isinstance(value, Mapping) and all(
            isinstance(k, str) and rule.holds(v) for k, v in value.items()
        )

    return Rule(f"a mapping {{name pattern: {rule.text}}}", holds)


def either(first: Rule, second: Rule) -> Rule:
    """What one of two rules takes."""
    return Rule(
        f"{first.text}, or {second.text}", lambda v: first.holds(v) or second.holds(v)
    )


FLAG = Rule("True or False", lambda v: isinstance(v, bool | np.bool_))
NAME = Rule("a name", lambda v: isinstance(v, str))
NAMES = Rule(
    "a list of name patterns",
    lambda v: (
        isinstance(v, Collection)
        and not isinstance(v, str)
        and all(isinstance(pattern, str) for pattern in v)
    ),
)
SEED = Rule("an integer", lambda v: is_whole(v) and abs(v) < 2**62)
FUNCTION = Rule("a function", callable)
SHARE = Rule("a number above 0 and at most 1", lambda v: is_number(v) and 0 < v <= 1)


def is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """True for finite Python and NumPy numbers, not for booleans."""
    real = is_whole(value) or isinstance(value, float | np.floating)
    return real and math.isfinite(value)


def scalar(value: Any) -> Any:
    """A Python number for an array without axes; other values as they are."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def check_values(
    values: Mapping[str, Any],
    rules: Mapping[str, Rule],
    error: type[PruneError] = ConfigError,
) -> None:
    """Nothing, if each of the values that has a rule follows it.

    Raises:
      error: lists all that do not.
    """
    problems = [
        f"{name} must be {rules[name].text}; found {value!r}"
        for name, value in values.items()
        if name in rules and not rules[name].holds(value)
    ]
    if problems:
        raise error("; ".join(problems))


def check_names(given: Iterable[str], taken: Iterable[str], who: str) -> None:
    """Nothing, if all names are among those taken.

    Raises:
      ConfigError: the first that is not, and what is.
    """
    taken = sorted(taken)
    for name in given:
        if name not in taken:
            raise ConfigError(
                f"{who} has no option {name!r}; {did_you_mean(name, taken)}it takes "
                f"{', '.join(taken)}"
            )


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """A hint at the known name that is closest, or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""
