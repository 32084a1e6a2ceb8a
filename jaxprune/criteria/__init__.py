"""Channel criteria by name; each is one function with its formula and source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from jaxprune.criteria import activations, gradients, weights
from jaxprune.errors import ScoreError

Needs = Literal[
    "weights", "key", "gradients", "example_gradients", "stats", "histogram",
    "comoments", "maps",
]  # fmt: skip


class Criterion(NamedTuple):
    """A criterion and what it is computed from.

    Attributes:
      fn: returns (C,), larger = keep. Called by `needs`:
        "weights": fn(group, leaves); "key": fn(group, leaves, key=key);
        "gradients": fn(group, leaves, grads) with gradients of the mean loss by path;
        "example_gradients": the same with a leading batch axis;
        "stats", "histogram", "comoments": fn(one of jaxprune.stats' states);
        "maps": fn(feature maps (B, *spatial, C)).
      needs: see fn.
    """

    fn: Callable[..., Any]
    needs: Needs


CRITERIA: dict[str, Criterion] = {
    "l1": Criterion(weights.l1, "weights"),
    "l2": Criterion(weights.l2, "weights"),
    "bn_scale": Criterion(weights.bn_scale, "weights"),
    "fpgm": Criterion(weights.fpgm, "weights"),
    "lamp": Criterion(weights.lamp, "weights"),
    "random": Criterion(weights.random, "key"),
    "taylor": Criterion(gradients.taylor, "gradients"),
    "gate_gain": Criterion(gradients.gate_gain, "gradients"),
    "taylor_examples": Criterion(gradients.taylor_examples, "example_gradients"),
    "gate_gain_examples": Criterion(gradients.gate_gain_examples, "example_gradients"),
    "fisher": Criterion(gradients.fisher, "example_gradients"),
    "hessian": Criterion(gradients.hessian, "example_gradients"),
    "activation_mean": Criterion(activations.activation_mean, "stats"),
    "activation_variance": Criterion(activations.activation_variance, "stats"),
    "apoz": Criterion(activations.apoz, "stats"),
    "entropy": Criterion(activations.entropy, "histogram"),
    "correlation": Criterion(activations.correlation, "comoments"),
    "chip": Criterion(activations.channel_independence, "maps"),
}


def criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
      ScoreError: there is none; lists those there are.
    """
    if not isinstance(name, str) or name not in CRITERIA:
        raise ScoreError(f"no criterion {name!r}; there are {sorted(CRITERIA)}")
    return CRITERIA[name]
