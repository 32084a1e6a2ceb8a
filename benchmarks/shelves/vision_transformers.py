"""Vision transformers and mixers of public code bases, written anew in their style."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from .case import Case, Shelf, linen, normal

MODELS = Shelf()


# google-research/vision_transformer: MLP-Mixer ------------------------------------


class MlpBlock(nn.Module):
    mlp_dim: int

    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(self.mlp_dim)(x))
        return nn.Dense(x.shape[-1])(y)


class MixerBlock(nn.Module):
    tokens_mlp_dim: int
    channels_mlp_dim: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        y = jnp.swapaxes(y, 1, 2)
        y = MlpBlock(self.tokens_mlp_dim, name="token_mixing")(y)
        x = x + jnp.swapaxes(y, 1, 2)
        y = nn.LayerNorm()(x)
        return x + MlpBlock(self.channels_mlp_dim, name="channel_mixing")(y)


class MlpMixer(nn.Module):
    num_classes: int = 10
    num_blocks: int = 2
    hidden_dim: int = 32
    tokens_mlp_dim: int = 24
    channels_mlp_dim: int = 64

    @nn.compact
    def __call__(self, inputs, *, train):
        del train
        x = nn.Conv(self.hidden_dim, (4, 4), strides=(4, 4), name="stem")(inputs)
        n, h, w, c = x.shape
        x = x.reshape(n, h * w, c)
        for _ in range(self.num_blocks):
            x = MixerBlock(self.tokens_mlp_dim, self.channels_mlp_dim)(x)
        x = jnp.mean(nn.LayerNorm(name="pre_head_layer_norm")(x), axis=1)
        return nn.Dense(self.num_classes, name="head")(x)


@MODELS("MLP-Mixer (vision_transformer)")
def mixer() -> Case:
    return linen(MlpMixer(), normal(2, 16, 16, 3), train=False)


# google-research/big_vision: ViT ----------------------------------------------------


def posemb_sincos_2d(h: int, w: int, width: int, temperature: float = 10_000.0):
    y, x = jnp.mgrid[:h, :w]
    omega = jnp.arange(width // 4) / (width // 4 - 1)
    omega = 1.0 / (temperature**omega)
    y = jnp.einsum("m,d->md", y.flatten(), omega)
    x = jnp.einsum("m,d->md", x.flatten(), omega)
    parts = [jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)]
    return jnp.concatenate(parts, axis=1)[None]


class BigMlp(nn.Module):
    mlp_dim: int | None = None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, deterministic=True):
        inits = {
            "kernel_init": nn.initializers.xavier_uniform(),
            "bias_init": nn.initializers.normal(stddev=1e-6),
        }
        width = x.shape[-1]
        x = nn.gelu(nn.Dense(self.mlp_dim or 4 * width, **inits)(x))
        x = nn.Dropout(rate=self.dropout)(x, deterministic)
        return nn.Dense(width, **inits)(x)


class Encoder1DBlock(nn.Module):
    num_heads: int

    @nn.compact
    def __call__(self, x, deterministic=True):
        out = {}
        y = nn.LayerNorm()(x)
        y = out["sa"] = nn.MultiHeadDotProductAttention(
            num_heads=self.num_heads, deterministic=deterministic
        )(y, y)
        x = out["+sa"] = x + y
        y = nn.LayerNorm()(x)
        y = out["mlp"] = BigMlp()(y, deterministic)
        x = out["+mlp"] = x + y
        return x, out


class MAPHead(nn.Module):
    num_heads: int

    @nn.compact
    def __call__(self, x):
        n, _, d = x.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, d))
        probe = jnp.tile(probe, [n, 1, 1])
        x = nn.MultiHeadDotProductAttention(num_heads=self.num_heads)(probe, x)
        y = nn.LayerNorm()(x)
        return (x + BigMlp()(y))[:, 0]


class BigViT(nn.Module):
    num_classes: int = 10
    width: int = 32
    depth: int = 2
    num_heads: int = 4
    posemb: str = "learn"
    pool_type: str = "gap"
    scan: bool = False
    rep_size: bool = False

    @nn.compact
    def __call__(self, image, *, train=False):
        out = {}
        x = nn.Conv(
            self.width, (4, 4), strides=(4, 4), padding="VALID", name="embedding"
        )(image)
        out["stem"] = x
        n, h, w, c = x.shape
        x = jnp.reshape(x, [n, h * w, c])
        if self.posemb == "learn":
            init = nn.initializers.normal(stddev=1 / np.sqrt(self.width))
            x = x + self.param("pos_embedding", init, (1, h * w, c))
        else:
            x = x + posemb_sincos_2d(h, w, c)
        if self.pool_type == "tok":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, c))
            x = jnp.concatenate([jnp.tile(cls, [n, 1, 1]), x], axis=1)
        if self.scan:
            block = nn.remat(Encoder1DBlock, prevent_cse=False, static_argnums=(2,))
            x, _ = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=self.depth,
            )(name="encoderblock", num_heads=self.num_heads)(x, not train)
        else:
            for lyr in range(self.depth):
                block = Encoder1DBlock(self.num_heads, name=f"encoderblock_{lyr}")
                x, out[f"block{lyr:02d}"] = block(x, not train)
        x = out["encoded"] = nn.LayerNorm(name="encoder_norm")(x)
        if self.pool_type == "map":
            x = MAPHead(self.num_heads)(x)
        elif self.pool_type == "gap":
            x = jnp.mean(x, axis=1)
        else:
            x = x[:, 0]
        out["head_input"] = x
        if self.rep_size:
            x = nn.tanh(nn.Dense(self.width, name="pre_logits")(x))
        head = nn.Dense(
            self.num_classes, name="head", kernel_init=nn.initializers.zeros
        )
        return head(x), out


def _logits(returned: Any) -> Any:
    return returned[0]


@MODELS("ViT, learned positions, GAP (big_vision)")
def vit_gap() -> Case:
    return linen(BigViT(), normal(2, 16, 16, 3), outputs=_logits)


@MODELS("ViT, class token, pre-logits (big_vision)")
def vit_tok() -> Case:
    model = BigViT(pool_type="tok", rep_size=True)
    return linen(model, normal(2, 16, 16, 3), outputs=_logits)


@MODELS("ViT, sincos positions, MAP head (big_vision)")
def vit_map() -> Case:
    model = BigViT(posemb="sincos2d", pool_type="map")
    return linen(model, normal(2, 16, 16, 3), outputs=_logits)


@MODELS("ViT, scanned and remat (big_vision)")
def vit_scan() -> Case:
    return linen(BigViT(scan=True), normal(2, 16, 16, 3), outputs=_logits)


# microsoft/Swin-Transformer: shifted windows ----------------------------------------


def window_partition(x, size):
    b, h, w, c = x.shape
    x = x.reshape(b, h // size, size, w // size, size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, size * size, c)


def window_reverse(x, size, h, w):
    x = x.reshape(-1, h // size, w // size, size, size, x.shape[-1])
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, h, w, x.shape[-1])


class WindowAttention(nn.Module):
    dim: int
    num_heads: int
    window: int

    @nn.compact
    def __call__(self, x):
        b, n, c = x.shape
        qkv = nn.Dense(3 * self.dim, name="qkv")(x)
        qkv = qkv.reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        attn = (q * (c // self.num_heads) ** -0.5) @ k.swapaxes(-2, -1)
        side = 2 * self.window - 1
        table = self.param(
            "relative_position_bias_table",
            nn.initializers.truncated_normal(0.02),
            (side * side, self.num_heads),
        )
        grid = np.stack(np.meshgrid(*[np.arange(self.window)] * 2, indexing="ij"))
        grid = grid.reshape(2, -1)
        relative = grid[:, :, None] - grid[:, None] + self.window - 1
        index = (relative[0] * side + relative[1]).reshape(-1)
        bias = table[index].reshape(n, n, self.num_heads).transpose(2, 0, 1)
        attn = nn.softmax(attn + bias[None], axis=-1)
        x = (attn @ v).swapaxes(1, 2).reshape(b, n, c)
        return nn.Dense(self.dim, name="proj")(x)


class SwinBlock(nn.Module):
    dim: int
    num_heads: int
    shift: int
    window: int = 4

    @nn.compact
    def __call__(self, x):
        h, w = x.shape[1:3]
        y = nn.LayerNorm()(x)
        if self.shift:
            y = jnp.roll(y, (-self.shift, -self.shift), axis=(1, 2))
        y = window_partition(y, self.window)
        y = WindowAttention(self.dim, self.num_heads, self.window)(y)
        y = window_reverse(y, self.window, h, w)
        if self.shift:
            y = jnp.roll(y, (self.shift, self.shift), axis=(1, 2))
        x = x + y
        y = nn.gelu(nn.Dense(4 * self.dim)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.dim)(y)


class Swin(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(16, (2, 2), strides=2)(x))
        x = SwinBlock(16, 2, 0)(x)
        x = SwinBlock(16, 2, 2)(x)
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = nn.LayerNorm()(jnp.concatenate(parts, -1))
        x = nn.Dense(32, use_bias=False, name="reduction")(x)
        x = SwinBlock(32, 4, 0)(x)
        return nn.Dense(10)(nn.LayerNorm()(x).mean((1, 2)))


@MODELS("Swin transformer")
def swin() -> Case:
    return linen(Swin(), normal(2, 16, 16, 3))
