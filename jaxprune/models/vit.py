"""Vision transformer.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv:2010.11929,
with the parameters that torchvision's `vit_b_16` has. Small variants follow Touvron
et al. (DeiT), ICML 2021, arXiv:2012.12877, table 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune.conv import conv_general_dilated
from jaxprune.errors import ConfigError
from jaxprune.models.layers import (
    as_logits,
    check_lengths,
    scale_width,
    width_of,
)

_POSITION_INIT = nn.initializers.normal(0.02)


class Attention(nn.Module):
    """Self-attention with free numbers of heads and of query-key and value features.

    `scale` multiplies the queries. It is a field, not 1 / sqrt(width of a head), so
    that the softmax keeps its temperature when features of the heads are removed.
    """

    heads: int
    qk_width: int
    v_width: int
    scale: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Features (B, T, E) of features (B, T, E)."""

        def project(width: int, name: str) -> jax.Array:
            shape = (self.heads, width)
            return nn.DenseGeneral(shape, dtype=self.dtype, name=name)(x)

        query = project(self.qk_width, "query") * self.scale
        key = project(self.qk_width, "key")
        value = project(self.v_width, "value")
        weights = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        weights = nn.softmax(as_logits(weights)).astype(value.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return nn.DenseGeneral(
            x.shape[-1], axis=(-2, -1), dtype=self.dtype, name="out"
        )(mixed)


class MLPBlock(nn.Module):
    """Dense, GELU (exact), Dense back to the width of the input."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Dense(self.width, dtype=self.dtype, name="hidden")(x)
        y = nn.gelu(y, approximate=False)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="out")(y)


class ViT(nn.Module):
    """Patches, learned positions, pre-norm blocks, norm, linear head.

    Layers are named `patch`, `class_token`, `positions`, `block0/norm1`,
    `block0/attention/{query,key,value,out}`, `block0/norm2`,
    `block0/mlp/{hidden,out}`, .., `norm`, `linear`.

    Attributes:
      patch: side of a patch in pixels.
      embed_width: channels of the residual stream.
      mlp_widths: per block, hidden units.
      heads: per block, attention heads.
      qk_widths: per block, query and key features of one head.
      v_widths: per block, value features of one head.
      scales: per block, what multiplies the queries.
      pool: "token" reads the class token, "mean" the mean over patches.
      dropout: rate after the positions and after each branch; needs "dropout" rngs.
      dtype: of the computation; parameters are float32. None follows the inputs.
    """

    patch: int
    embed_width: int
    mlp_widths: tuple[int, ...]
    heads: tuple[int, ...]
    qk_widths: tuple[int, ...]
    v_widths: tuple[int, ...]
    scales: tuple[float, ...]
    pool: Literal["token", "mean"] = "token"
    num_classes: int = 1000
    dropout: float = 0.0
    norm_epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (B, num_classes) of images (B, H, W, 3)."""
        fields = ("heads", "qk_widths", "v_widths", "scales")
        check_lengths(self, len(self.mlp_widths), *fields)
        x = self._embed(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for i in range(len(self.mlp_widths)):
            x = _Block(
                attention=(
                    self.heads[i],
                    self.qk_widths[i],
                    self.v_widths[i],
                    self.scales[i],
                ),
                mlp_width=self.mlp_widths[i],
                dropout=self.dropout,
                norm_epsilon=self.norm_epsilon,
                dtype=self.dtype,
                name=f"block{i}",
            )(x, train)
        x = nn.LayerNorm(epsilon=self.norm_epsilon, dtype=self.dtype, name="norm")(x)
        x = x[:, 0] if self.pool == "token" else jnp.mean(x, axis=1)
        return as_logits(nn.Dense(self.num_classes, dtype=self.dtype, name="linear")(x))

    def _embed(self, x: jax.Array) -> jax.Array:
        """Tokens (B, T, E): the patches, with the class token before them if any."""
        x = nn.Conv(
            self.embed_width,
            (self.patch, self.patch),
            strides=(self.patch, self.patch),
            padding="VALID",
            dtype=self.dtype,
            conv_general_dilated=conv_general_dilated,
            name="patch",
        )(x)
        x = x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3])
        width = self.embed_width
        if self.pool == "token":
            zeros = nn.initializers.zeros
            token = self.param("class_token", zeros, (1, 1, width))
            token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, width))
            x = jnp.concatenate([token, x], axis=1)
        positions = self.param("positions", _POSITION_INIT, (1, x.shape[1], width))
        return x + positions.astype(x.dtype)

    def resized(self, variables: Mapping[str, Any]) -> ViT:
        """This architecture with the widths that the shapes of `variables` have.

        The scales of the attention stay as they are.

        Raises:
          GraphError: a layer is missing from `variables`.
        """
        blocks = range(len(self.mlp_widths))

        def widths(name: str, axis: int) -> tuple[int, ...]:
            paths = [f"params/block{i}/{name}/kernel" for i in blocks]
            return tuple(width_of(variables, path, axis) for path in paths)

        return self.clone(
            embed_width=width_of(variables, "params/patch/kernel"),
            mlp_widths=widths("mlp/hidden", -1),
            heads=widths("attention/query", -2),
            qk_widths=widths("attention/query", -1),
            v_widths=widths("attention/value", -1),
            num_classes=width_of(variables, "params/linear/kernel"),
        )


class _Block(nn.Module):
    attention: tuple[int, int, int, float]
    mlp_width: int
    dropout: float
    norm_epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=self.norm_epsilon, dtype=self.dtype, name=name)

        def drop(y: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout, deterministic=not train)(y)

        heads, qk_width, v_width, scale = self.attention
        attention = Attention(
            heads, qk_width, v_width, scale, dtype=self.dtype, name="attention"
        )
        x = x + drop(attention(norm("norm1")(x)))
        mlp = MLPBlock(self.mlp_width, dtype=self.dtype, name="mlp")
        return x + drop(mlp(norm("norm2")(x)))


def vit(
    *,
    embed_width: int = 192,
    depth: int = 12,
    heads: int = 3,
    mlp_ratio: float = 4.0,
    patch: int = 16,
    pool: Literal["token", "mean"] = "token",
    num_classes: int = 1000,
    width: float = 1.0,
) -> ViT:
    """A ViT whose blocks are equal; `width` scales the stream, the heads and the MLP.

    Raises:
      ConfigError: the heads do not divide the width of the stream.
    """
    embed_width, heads = scale_width(embed_width, width), scale_width(heads, width)
    if embed_width % heads:
        raise ConfigError(
            f"embed_width: expected a multiple of the {heads} heads, found "
            f"{embed_width}; change embed_width or heads"
        )
    head_width = embed_width // heads
    return ViT(
        patch=patch,
        embed_width=embed_width,
        mlp_widths=(scale_width(embed_width, mlp_ratio),) * depth,
        heads=(heads,) * depth,
        qk_widths=(head_width,) * depth,
        v_widths=(head_width,) * depth,
        scales=(1.0 / math.sqrt(head_width),) * depth,
        pool=pool,
        num_classes=num_classes,
    )
