"""NNX models of the examples of Flax, written anew in their style."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .case import Case, Shelf, normal, tokens
from .nnx_case import case

MODELS = Shelf()


# google/flax, examples/lm1b_nnx --------------------------------------------------------


def sinusoidal(length: int, width: int) -> np.ndarray:
    table = np.zeros((length, width), np.float32)
    position = np.arange(length)[:, None]
    scale = -np.log(10_000.0) / (width // 2 - 1)
    term = np.exp(np.arange(width // 2) * scale)
    table[:, : width // 2] = np.sin(position * term)
    table[:, width // 2 :] = np.cos(position * term)
    return table[None]


class AddPositionEmbs(nnx.Module):
    def __init__(self, length: int, width: int):
        self.table = sinusoidal(length, width)

    def __call__(self, x):
        return x + self.table[:, : x.shape[1]]


class MlpBlock(nnx.Module):
    def __init__(self, width: int, mlp: int, *, rngs: nnx.Rngs):
        self.linear1 = nnx.Linear(width, mlp, rngs=rngs)
        self.linear2 = nnx.Linear(mlp, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.linear1(x)))
        return self.dropout(self.linear2(x))


class EncoderDecoder1DBlock(nnx.Module):
    def __init__(self, width: int, heads: int, mlp: int, *, rngs: nnx.Rngs):
        self.ln1 = nnx.LayerNorm(width, rngs=rngs)
        self.ln2 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=heads,
            in_features=width,
            qkv_features=width,
            use_bias=False,
            decode=False,
            rngs=rngs,
        )
        self.mlp = MlpBlock(width, mlp, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.ln1(x), mask=mask)
        return x + self.mlp(self.ln2(x))


class TransformerLM(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, vocabulary=32, width=32, heads=4, depth=2):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.posembed = AddPositionEmbs(64, width)
        self.blocks = nnx.List(
            [
                EncoderDecoder1DBlock(width, heads, 2 * width, rngs=rngs)
                for _ in range(depth)
            ]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, inputs):
        x = jnp.pad(inputs, ((0, 0), (1, 0)))[:, :-1]
        mask = nnx.combine_masks(
            nnx.make_attention_mask(inputs > 0, inputs > 0),
            nnx.make_causal_mask(inputs),
        )
        x = self.posembed(self.embed(x))
        for block in self.blocks:
            x = block(x, mask)
        logits = self.embed.attend(self.norm(x))
        return logits / jnp.sqrt(x.shape[-1])


@MODELS("LM1B transformer (flax examples/lm1b_nnx)")
def lm1b() -> Case:
    return case(TransformerLM, tokens(2, 8))


# google/flax, examples/gemma -----------------------------------------------------------


class Einsum(nnx.Module):
    def __init__(self, shape, *, rngs: nnx.Rngs):
        self.w = nnx.Param(nnx.initializers.normal()(rngs.params(), shape))

    def __call__(self, einsum_str, x):
        return jnp.einsum(einsum_str, x, self.w[...])


class RMSNorm(nnx.Module):
    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(nnx.initializers.zeros_init()(rngs.params(), dim))

    def __call__(self, x):
        var = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        normed = x * jax.lax.rsqrt(var + 1e-06)
        scale = jnp.expand_dims(self.scale[...], axis=range(len(x.shape) - 1))
        return normed * (1 + scale)


def apply_rope(inputs, positions, head_dim, max_wavelength=10_000):
    fraction = 2 * jnp.arange(0, head_dim // 2) / head_dim
    timescale = max_wavelength**fraction
    sinusoid = positions[..., jnp.newaxis] / timescale[jnp.newaxis, jnp.newaxis, :]
    sinusoid = sinusoid[..., jnp.newaxis, :]
    sin, cos = jnp.sin(sinusoid), jnp.cos(sinusoid)
    first, second = jnp.split(inputs, 2, axis=-1)
    out = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return out.astype(inputs.dtype)


class GemmaAttention(nnx.Module):
    def __init__(self, heads, kv_heads, features, head_dim, *, rngs: nnx.Rngs):
        self.head_dim = head_dim
        self.query_pre_attn_scalar = head_dim**-0.5
        self.q_einsum = Einsum((heads, features, head_dim), rngs=rngs)
        self.kv_einsum = Einsum((2, kv_heads, features, head_dim), rngs=rngs)
        self.attn_vec_einsum = Einsum((heads, head_dim, features), rngs=rngs)

    def __call__(self, x, positions, attn_mask):
        q = self.q_einsum("BTD,NDH->BTNH", x)
        k, v = self.kv_einsum("BSD,CKDH->CBSKH", x)
        q = apply_rope(q, positions, self.head_dim) * self.query_pre_attn_scalar
        k = apply_rope(k, positions, self.head_dim)
        b, t, n, h = q.shape
        q = q.reshape((b, t, k.shape[2], n // k.shape[2], h))
        logits = jnp.einsum("BTKGH,BSKH->BTKGS", q, k)
        logits = logits.reshape((b, t, n, -1))
        logits = jnp.tanh(logits / 50.0) * 50.0
        logits = jnp.where(jnp.expand_dims(attn_mask, -2), logits, -2.3819763e38)
        probs = jax.nn.softmax(logits, axis=-1)
        probs = probs.reshape((b, t, v.shape[2], n // v.shape[2], -1))
        encoded = jnp.einsum("BTKGS,BSKH->BTKGH", probs, v)
        return self.attn_vec_einsum("BTNH,NHD->BTD", encoded.reshape((b, t, n, h)))


class FeedForward(nnx.Module):
    def __init__(self, features, hidden, *, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"use_bias": False, "rngs": rngs}
        self.gate_proj = nnx.Linear(features, hidden, **kwargs)
        self.up_proj = nnx.Linear(features, hidden, **kwargs)
        self.down_proj = nnx.Linear(hidden, features, **kwargs)

    def __call__(self, x):
        return self.down_proj(nnx.gelu(self.gate_proj(x)) * self.up_proj(x))


class GemmaBlock(nnx.Module):
    def __init__(self, heads, kv_heads, embed, head_dim, hidden, *, rngs: nnx.Rngs):
        self.pre_attention_norm = RMSNorm(embed, rngs=rngs)
        self.attn = GemmaAttention(heads, kv_heads, embed, head_dim, rngs=rngs)
        self.pre_ffw_norm = RMSNorm(embed, rngs=rngs)
        self.mlp = FeedForward(embed, hidden, rngs=rngs)

    def __call__(self, x, positions, attn_mask):
        x = x + self.attn(self.pre_attention_norm(x), positions, attn_mask)
        return x + self.mlp(self.pre_ffw_norm(x))


class Gemma(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, vocabulary=32, embed=32, depth=2):
        init = nnx.initializers.normal()
        table = init(rngs.params(), (vocabulary, embed))
        self.input_embedding = nnx.Param(table)
        self.layers = nnx.List(
            [GemmaBlock(4, 2, embed, 8, 48, rngs=rngs) for _ in range(depth)]
        )
        self.final_norm = RMSNorm(embed, rngs=rngs)

    def __call__(self, last_tokens):
        length = last_tokens.shape[1]
        positions = jnp.tile(jnp.arange(length), (last_tokens.shape[0], 1))
        mask = jnp.tril(jnp.ones((length, length), bool))[None]
        x = self.input_embedding[...][(last_tokens,)]
        x *= jnp.sqrt(x.shape[-1]).astype(x.dtype)
        for layer in self.layers:
            x = layer(x, positions, mask)
        logits = jnp.dot(self.final_norm(x), self.input_embedding[...].T)
        return jnp.tanh(logits / 30.0) * 30.0


@MODELS("Gemma (flax examples/gemma)")
def gemma() -> Case:
    return case(Gemma, tokens(2, 8))


# google/flax, NNX tutorials: CNN, and an RNN with a scanned stack ---------------------


class Cnn(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(32, rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(64, rngs=rngs)
        self.linear1 = nnx.Linear(3136, 64, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.025, rngs=rngs)
        self.linear2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.batch_norm1(self.conv1(x)))
        x = nnx.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nnx.relu(self.batch_norm2(self.conv2(x)))
        x = nnx.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nnx.relu(self.dropout2(self.linear1(x.reshape(x.shape[0], -1))))
        return self.linear2(x)


@MODELS("MNIST CNN (flax tutorial)")
def cnn() -> Case:
    return case(Cnn, normal(2, 28, 28, 1))


class Layer(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.linear = nnx.Linear(width, 2 * width, rngs=rngs)
        self.out = nnx.Linear(2 * width, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x):
        return x + self.out(nnx.gelu(self.linear(self.norm(x))))


class ScannedMlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width=16, depth=3):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs: nnx.Rngs):
            return Layer(width, rngs)

        self.stem = nnx.Linear(6, width, rngs=rngs)
        self.layers = stacked(rngs)
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return layer(x)

        return self.head(forward(self.stem(x), self.layers))


@MODELS("scanned residual stack (flax guide)")
def scanned() -> Case:
    return case(ScannedMlp, normal(2, 6))


class LstmTagger(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width=24):
        self.embed = nnx.Embed(32, 16, rngs=rngs)
        forward = nnx.RNN(nnx.OptimizedLSTMCell(16, width, rngs=rngs))
        backward = nnx.RNN(nnx.OptimizedLSTMCell(16, width, rngs=rngs))
        self.lstm = nnx.Bidirectional(forward, backward)
        self.head = nnx.Linear(2 * width, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.lstm(self.embed(x)))


@MODELS("bidirectional LSTM tagger")
def lstm() -> Case:
    return case(LstmTagger, tokens(2, 7))
