"""How much is removed by when: the budgets of pruning in several steps."""

from __future__ import annotations

from typing import Literal, get_args

from jaxprune.checks import check_values, one_of, whole
from jaxprune.errors import ConfigError

Schedule = Literal["one-shot", "linear", "cubic"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)


def removed_shares(schedule: str, steps: int | None) -> list[float]:
    """What of the final removal is done after each of the steps, from above 0 to 1.

    "linear": k / n after step k of n. "cubic": 1 - (1 - k / n)^3, which removes much
    at first and little at last (Zhu and Gupta 2017, arXiv:1710.01878, equation 1, for
    an initial sparsity of 0). "one-shot" is one step.

    Raises:
      ConfigError: an unknown schedule, or steps that do not go with it.
    """
    check_values({"schedule": schedule}, {"schedule": one_of(*SCHEDULES)})
    if schedule == "one-shot":
        if steps not in (None, 1):
            raise ConfigError(
                f"schedule='one-shot' is one step; found steps={steps!r}: leave it out, "
                "or take schedule='linear' or 'cubic'"
            )
        return [1.0]
    if steps is None or not whole(1).holds(steps):
        raise ConfigError(
            f"schedule={schedule!r} needs a number of steps, 1 or more, such as "
            f"steps=4; found steps={steps!r}"
        )
    done = [(k + 1) / steps for k in range(steps)]
    return done if schedule == "linear" else [1 - (1 - d) ** 3 for d in done]


def limits_at(whole: float, limit: float, shares: list[float]) -> list[float]:
    """Costs allowed after each step, from below `whole` down to exactly `limit`."""
    return [
        limit if share == 1 else whole - share * (whole - limit) for share in shares
    ]
