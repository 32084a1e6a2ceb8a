"""Networks as ports to NNX write them, in their authors' style."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from .case import Case, Shelf, normal, tokens
from .nnx_case import case
from .nnx_examples import MlpBlock

MODELS = Shelf()


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
