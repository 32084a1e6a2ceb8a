"""The widths that layers of flax.linen state, read off the shapes of their arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn

# The shape of the array of that name below a layer, or None.
Read = Callable[..., tuple[int, ...] | None]


def widths(module: nn.Module, read: Read, x: Any) -> dict[str, Any]:
    """Values of the attributes that follow the arrays; none for an unknown layer.

    Args:
      x: the layer's first input.
    """
    rule = next((rule for kind, rule in _RULES if isinstance(module, kind)), None)
    return {} if rule is None else rule(module, read, x)


def _conv(module: Any, read: Read, x: Any) -> dict[str, Any]:
    kernel = read("kernel")
    if kernel is None:
        return {}
    return {
        "features": kernel[-1],
        "feature_group_count": x.shape[-1] // kernel[-2],
    }


def _conv_transpose(module: Any, read: Read, x: Any) -> dict[str, Any]:
    kernel = read("kernel")
    if kernel is None:
        return {}
    return {"features": kernel[-2 if module.transpose_kernel else -1]}


def _dense(module: Any, read: Read, x: Any) -> dict[str, Any]:
    kernel = read("kernel")
    return {} if kernel is None else {"features": kernel[-1]}


def _dense_general(module: Any, read: Read, x: Any) -> dict[str, Any]:
    kernel = read("kernel")
    if kernel is None:
        return {}
    many = not isinstance(module.features, int)
    count = len(module.features) if many else 1
    features = tuple(kernel[-count:])
    return {"features": features if many else features[0]}


def _einsum(module: Any, read: Read, x: Any) -> dict[str, Any]:
    kernel = read("kernel")
    return {} if kernel is None else {"shape": kernel[-len(module.shape) :]}


def _embed(module: Any, read: Read, x: Any) -> dict[str, Any]:
    table = read("embedding")
    if table is None:
        return {}
    return {"num_embeddings": table[-2], "features": table[-1]}


def _attention(module: Any, read: Read, x: Any) -> dict[str, Any]:
    query, out = read("query", "kernel"), read("out", "kernel")
    if query is None or out is None:
        return {}
    heads, width = query[-2:]
    return {
        "num_heads": heads,
        "qkv_features": heads * width,
        "out_features": out[-1],
    }


def _cell(*names: str) -> Callable[[Any, Read, Any], dict[str, Any]]:
    def rule(module: Any, read: Read, x: Any) -> dict[str, Any]:
        for name in names:
            kernel = read(name, "kernel")
            if kernel is not None:
                return {"features": kernel[-2]}
        return {}

    return rule


_RULES: tuple[tuple[Any, Callable[[Any, Read, Any], dict[str, Any]]], ...] = (
    (nn.ConvTranspose, _conv_transpose),
    (nn.ConvLocal, _dense),
    (nn.Conv, _conv),
    (nn.DenseGeneral, _dense_general),
    (nn.Dense, _dense),
    (nn.Einsum, _einsum),
    (nn.Embed, _embed),
    (nn.MultiHeadDotProductAttention, _attention),
    ((nn.LSTMCell, nn.OptimizedLSTMCell), _cell("hi", "hf")),
    (nn.GRUCell, _cell("hn")),
    (nn.MGUCell, _cell("hn", "hf")),
    (nn.SimpleCell, _cell("h")),
    (nn.ConvLSTMCell, _cell("hh")),
)
