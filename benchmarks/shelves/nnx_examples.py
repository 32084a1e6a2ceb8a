"""NNX models of public code bases, written anew in their authors' style."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .case import Case, Shelf, draw, normal, tokens

MODELS = Shelf()


def case(make: Any, *inputs: Any, abstract: bool = True, **options: Any) -> Case:
    """The case of an NNX object with random weights; made abstractly if it can be."""

    def model() -> Any:
        return make(nnx.Rngs(0))

    graphdef, state = nnx.split(nnx.eval_shape(model) if abstract else model())
    return Case(nnx.merge(graphdef, _draw_state(state)), None, inputs, **options)


def _draw_state(state: Any) -> Any:
    pure = nnx.to_pure_dict(state)
    nnx.replace_by_pure_dict(state, jax.tree.map(_key, draw(pure)))
    return state


def _key(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.random.key(0)
    return leaf


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


# jax-ml/bonsai, in its style: ViT and ResNet -------------------------------------------


class Embeddings(nnx.Module):
    def __init__(self, image: int, patch: int, hidden: int, *, rngs: nnx.Rngs):
        self.projection = nnx.Conv(
            3, hidden, kernel_size=(patch, patch), strides=(patch, patch), rngs=rngs
        )
        count = (image // patch) ** 2 + 1
        init = nnx.initializers.normal(0.02)
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, hidden)))
        self.pos_embeddings = nnx.Param(init(rngs.params(), (1, count, hidden)))

    def __call__(self, pixels):
        x = self.projection(pixels)
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        cls = jnp.tile(self.cls_token[...], (b, 1, 1))
        return jnp.concatenate([cls, x], axis=1) + self.pos_embeddings[...]


class TransformerEncoder(nnx.Module):
    def __init__(self, hidden: int, mlp: int, heads: int, *, rngs: nnx.Rngs):
        self.attn = nnx.MultiHeadAttention(heads, hidden, decode=False, rngs=rngs)
        self.linear1 = nnx.Linear(hidden, mlp, rngs=rngs)
        self.linear2 = nnx.Linear(mlp, hidden, rngs=rngs)
        self.layernorm_before = nnx.LayerNorm(hidden, rngs=rngs)
        self.layernorm_after = nnx.LayerNorm(hidden, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.layernorm_before(x))
        y = jax.nn.gelu(self.linear1(self.layernorm_after(x)), approximate=False)
        return x + self.linear2(y)


class ViT(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, hidden=32, depth=2):
        self.pos_embeddings = Embeddings(16, 4, hidden, rngs=rngs)
        layers = [TransformerEncoder(hidden, 64, 4, rngs=rngs) for _ in range(depth)]
        self.layers = nnx.Sequential(*layers)
        self.ln = nnx.LayerNorm(hidden, rngs=rngs)
        self.classifier = nnx.Linear(hidden, 10, rngs=rngs)

    def __call__(self, x):
        x = self.layers(self.pos_embeddings(x))
        return self.classifier(self.ln(x)[:, 0])


@MODELS("ViT (bonsai)")
def vit() -> Case:
    return case(ViT, normal(2, 16, 16, 3))


class Bottleneck(nnx.Module):
    def __init__(self, inputs: int, width: int, stride: int, *, rngs: nnx.Rngs):
        def conv(a, b, size, strides=1):
            pair = (size, size)
            return nnx.Conv(a, b, pair, strides=strides, use_bias=False, rngs=rngs)

        self.conv0, self.bn0 = conv(inputs, width, 1), nnx.BatchNorm(width, rngs=rngs)
        self.conv1 = conv(width, width, 3, stride)
        self.bn1 = nnx.BatchNorm(width, rngs=rngs)
        self.conv2 = conv(width, 4 * width, 1)
        self.bn2 = nnx.BatchNorm(4 * width, rngs=rngs)
        self.downsample = nnx.Sequential()
        if stride != 1 or inputs != 4 * width:
            self.downsample = nnx.Sequential(
                conv(inputs, 4 * width, 1, stride), nnx.BatchNorm(4 * width, rngs=rngs)
            )

    def __call__(self, x):
        y = nnx.relu(self.bn0(self.conv0(x)))
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(y)))))
        short = self.downsample(x) if self.downsample.layers else x
        return nnx.relu(y + short)


class ResNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, stages=(2, 1), width=8):
        self.stem = nnx.Conv(3, width, (7, 7), strides=2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        blocks, inputs = [], width
        for stage, count in enumerate(stages):
            for k in range(count):
                stride = 2 if stage and not k else 1
                blocks.append(Bottleneck(inputs, width * 2**stage, stride, rngs=rngs))
                inputs = 4 * width * 2**stage
        self.blocks = nnx.List(blocks)
        self.fc = nnx.Linear(inputs, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((1, 2)))


@MODELS("ResNet, bottleneck (bonsai)")
def resnet() -> Case:
    return case(ResNet, normal(2, 32, 32, 3))


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


# karpathy/nanoGPT, as ports to NNX write it --------------------------------------------


class CausalSelfAttention(nnx.Module):
    def __init__(self, n_embd: int, n_head: int, rngs: nnx.Rngs):
        self.c_attn = nnx.Linear(n_embd, 3 * n_embd, rngs=rngs)
        self.c_proj = nnx.Linear(n_embd, n_embd, rngs=rngs)
        self.n_head = n_head

    def __call__(self, x):
        b, t, c = x.shape
        q, k, v = jnp.split(self.c_attn(x), 3, axis=-1)
        q, k, v = (
            y.reshape(b, t, self.n_head, c // self.n_head).transpose(0, 2, 1, 3)
            for y in (q, k, v)
        )
        att = (q @ k.transpose(0, 1, 3, 2)) * (1.0 / math.sqrt(k.shape[-1]))
        mask = jnp.tril(jnp.ones((t, t)))
        att = jax.nn.softmax(jnp.where(mask == 0, -jnp.inf, att), axis=-1)
        y = (att @ v).transpose(0, 2, 1, 3).reshape(b, t, c)
        return self.c_proj(y)


class NanoGPT(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width=32, depth=2):
        self.wte = nnx.Embed(32, width, rngs=rngs)
        self.wpe = nnx.Embed(16, width, rngs=rngs)
        self.ln = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2 * depth)])
        self.attn = nnx.List(
            [CausalSelfAttention(width, 4, rngs) for _ in range(depth)]
        )
        self.mlp = nnx.List([MlpBlock(width, 64, rngs=rngs) for _ in range(depth)])
        self.ln_f = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, idx):
        x = self.wte(idx) + self.wpe(jnp.arange(idx.shape[1]))
        for k, (attn, mlp) in enumerate(zip(self.attn, self.mlp, strict=True)):
            x = x + attn(self.ln[2 * k](x))
            x = x + mlp(self.ln[2 * k + 1](x))
        return self.wte.attend(self.ln_f(x))


@MODELS("nanoGPT")
def nanogpt() -> Case:
    return case(NanoGPT, tokens(2, 8))
