"""Sizes that NNX layers state as attributes, brought in line with their arrays.

Shapes are indexed from the right, so that layers stacked by nnx.vmap or nnx.scan,
whose arrays have more axes in front, follow as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxprune.frameworks.stated import state

Settings = tuple[tuple[str, str, int], ...]
Sizes = dict[str, Any]
Counted = Mapping[str, int]


def resize(model: nnx.Module, settings: Sequence[Sequence[Any]] = ()) -> None:
    """Sets the size attributes of every layer of a known type in place.

    A module that has a method `follow_arrays()` sets its own sizes there.

    Args:
      model: an object of ours, not the user's.
      settings: as `group_settings` returns them, and numbers that modules state.
    """
    counts: dict[str, dict[str, int]] = {}
    for path, name, value in settings:
        counts.setdefault(path, {})[name] = value
    for path, module in nnx.iter_modules(model):
        place = "/".join(map(str, path))
        counted = counts.get(place, {})
        for kind, rule in _RULES:
            if isinstance(module, kind):
                for name, value in rule(module, counted).items():
                    setattr(module, name, value)
        if not isinstance(module, nnx.GroupNorm | nnx.Conv):
            for name, value in counted.items():
                state(module, name, value, setattr)
        follow = getattr(module, "follow_arrays", None)
        if callable(follow):
            follow()


class _Named(nnx.GroupNorm):
    """A GroupNorm that shows its path as the scope of what it computes."""

    named_path: str

    def __call__(self, x: Any, **kwargs: Any) -> Any:
        with jax.named_scope(self.named_path):
            return super().__call__(x, **kwargs)


def name_groups(model: nnx.Module) -> dict[str, int]:
    """Makes every GroupNorm without arrays show its path in the traced program.

    Args:
      model: an object of ours, not the user's.

    Returns:
      The number of groups of each by path.
    """
    found = {}
    for path, module in nnx.iter_modules(model):
        if type(module) is not nnx.GroupNorm:  # a subclass may compute otherwise
            continue
        if module.scale is None and module.bias is None:
            place = "/".join(map(str, path))
            found[place] = module.num_groups
            module.__class__ = _Named
            setattr(module, "named_path", place)  # noqa: B010 - none of GroupNorm's
    return found


def group_settings(
    model: nnx.Module, masks: Mapping[tuple[str, int], np.ndarray]
) -> Settings:
    """Feature groups left, and for a GroupNorm their size, by the path of a layer:
    shapes do not tell, or there is no array; (path, -1) is the mask of one without.
    """
    found = []
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.GroupNorm):
            count, names = module.num_groups, ("scale", "bias")
        elif isinstance(module, nnx.Conv) and module.feature_group_count > 1:
            count, names = module.feature_group_count, ("kernel",)
        else:
            continue
        place = "/".join(map(str, path))
        leaves = ["/".join(filter(None, (place, name))) for name in names]
        mask = next(
            (
                m
                for (leaf, axis), m in masks.items()
                if _last(module, leaf, axis, leaves)
            ),
            masks.get((place, -1)),
        )
        if mask is not None and not mask.all():
            left = int(mask.reshape(count, -1).any(1).sum())
            found.append((place, "groups", left))
            if isinstance(module, nnx.GroupNorm):
                found.append((place, "group_size", int(mask.sum()) // left))
    return tuple(found)


def _last(module: Any, leaf: str, axis: int, leaves: Sequence[str]) -> bool:
    """True if (leaf, axis) is the last axis of one of the leaves of the module."""
    if leaf not in leaves:
        return False
    return axis == len(getattr(module, leaf.rpartition("/")[2]).shape) - 1


def _linear(m: Any, counted: Counted) -> Sizes:
    return {"in_features": m.kernel.shape[-2], "out_features": m.kernel.shape[-1]}


def _linear_general(m: Any, counted: Counted) -> Sizes:
    outs = len(m.out_features)
    ins = outs + len(m.in_features)
    batch = ins + len(m.batch_axis)
    shape = m.kernel.shape
    start = len(shape) - batch
    return {
        "out_features": shape[len(shape) - outs :],
        "in_features": shape[len(shape) - ins : len(shape) - outs],
        "batch_axis": type(m.batch_axis)(
            zip(m.batch_axis, shape[start : start + len(m.batch_axis)], strict=True)
        ),
    }


def _einsum(m: Any, counted: Counted) -> Sizes:
    sizes: Sizes = {"kernel_shape": m.kernel.shape[-len(m.kernel_shape) :]}
    if m.bias is not None:
        sizes["bias_shape"] = m.bias.shape[-len(m.bias_shape) :]
    return sizes


def _conv(m: Any, counted: Counted) -> Sizes:
    shape = m.kernel.shape[-len(m.kernel_shape) :]
    count = counted.get("groups", m.feature_group_count)
    return {
        "kernel_shape": shape,
        "feature_group_count": count,
        "in_features": shape[-2] * count,
        "out_features": shape[-1],
    }


def _conv_transpose(m: Any, counted: Counted) -> Sizes:
    shape = m.kernel.shape[-len(m.kernel_shape) :]
    ins, outs = (shape[-1], shape[-2]) if m.transpose_kernel else shape[-2:]
    return {"kernel_shape": shape, "in_features": ins, "out_features": outs}


def _embed(m: Any, counted: Counted) -> Sizes:
    count, features = m.embedding.shape[-2:]
    return {"num_embeddings": count, "features": features}


def _norm(m: Any, counted: Counted) -> Sizes:
    arrays = [getattr(m, name, None) for name in ("mean", "scale", "bias")]
    found = [a for a in arrays if a is not None]
    features = _axes(getattr(m, "feature_axes", -1))
    if not found or features != 1:
        return {}
    return {"num_features": found[0].shape[-1]}


def _axes(axes: Any) -> int:
    return len(axes) if isinstance(axes, Sequence) else 1


def _group_norm(m: Any, counted: Counted) -> Sizes:
    if not counted:
        return {}
    return {"num_groups": counted["groups"], "group_size": counted["group_size"]}


def _attention(m: Any, counted: Counted) -> Sizes:
    inputs, heads, width = m.query.kernel.shape[-3:]
    key_inputs, key_heads = m.key.kernel.shape[-3:-1]
    return {
        "in_features": inputs,
        "in_kv_features": key_inputs,
        "num_heads": heads,
        "num_kv_heads": key_heads,
        "head_dim": width,
        "qkv_features": heads * width,
        "out_features": math.prod(m.out.kernel.shape[-1:]),
    }


def _cell(inner: str, outer: str) -> Callable[[Any, Counted], Sizes]:
    def rule(m: Any, counted: Counted) -> Sizes:
        hidden, inputs = getattr(m, inner).kernel, getattr(m, outer).kernel
        return {
            "hidden_features": hidden.shape[-2],
            "in_features": inputs.shape[-2],
        }

    return rule


def _lora(m: Any, counted: Counted) -> Sizes:
    return {"in_features": m.lora_a.shape[-2], "out_features": m.lora_b.shape[-1]}


_RULES: tuple[tuple[Any, Callable[[Any, Counted], Sizes]], ...] = (
    (nnx.Linear, _linear),
    (nnx.LinearGeneral, _linear_general),
    (nnx.Einsum, _einsum),
    (nnx.Conv, _conv),
    (nnx.ConvTranspose, _conv_transpose),
    (nnx.Embed, _embed),
    ((nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.InstanceNorm), _norm),
    (nnx.GroupNorm, _group_norm),
    (nnx.MultiHeadAttention, _attention),
    (nnx.LSTMCell, _cell("hi", "ii")),
    ((nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell), _cell("dense_h", "dense_i")),
    (nnx.LoRA, _lora),
)
