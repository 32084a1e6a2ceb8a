"""Equinox models: its own layers and equimo; functions of their arrays."""

from __future__ import annotations

from typing import Any

import equimo.models as equimo
import equinox as eqx
import jax
import jax.numpy as jnp

from .case import SEED, Case, Shelf, draw, normal, tokens

MODELS = Shelf()
KEY = jax.random.key(SEED)


def case(model: Any, *inputs: Any, keyed: bool = False, **options: Any) -> Case:
    """A model of one example, mapped over the batch, as (arrays, *inputs)."""
    arrays, static = eqx.partition(eqx.nn.inference_mode(model), eqx.is_array)

    def call(variables: Any, *inputs: Any) -> Any:
        whole = eqx.combine(variables, static)
        given = {**options, "key": KEY} if keyed else options
        return jax.vmap(lambda *x: whole(*x, **given))(*inputs)

    return Case(call, draw(arrays), inputs)


@MODELS("MLP (Equinox)")
def mlp() -> Case:
    return case(eqx.nn.MLP(10, 5, 32, 2, key=KEY), normal(3, 10))


class Cnn(eqx.Module):
    layers: list[Any]

    def __init__(self, key: Any):
        keys = jax.random.split(key, 4)
        self.layers = [
            eqx.nn.Conv2d(1, 3, kernel_size=4, key=keys[0]),
            eqx.nn.MaxPool2d(kernel_size=2),
            jax.nn.relu,
            jnp.ravel,
            eqx.nn.Linear(1728, 64, key=keys[1]),
            jax.nn.sigmoid,
            eqx.nn.Linear(64, 32, key=keys[2]),
            jax.nn.relu,
            eqx.nn.Linear(32, 10, key=keys[3]),
            jax.nn.log_softmax,
        ]

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


@MODELS("MNIST CNN (Equinox example)")
def cnn() -> Case:
    return case(Cnn(KEY), normal(2, 1, 28, 28))


class Rnn(eqx.Module):
    cell: eqx.nn.GRUCell
    linear: eqx.nn.Linear

    def __call__(self, x: Any) -> Any:
        hidden = jnp.zeros((self.cell.hidden_size,))
        out, _ = jax.lax.scan(lambda h, row: (self.cell(row, h), None), hidden, x)
        return jax.nn.sigmoid(self.linear(out))


@MODELS("GRU classifier (Equinox example)")
def rnn() -> Case:
    keys = jax.random.split(KEY)
    cell = eqx.nn.GRUCell(6, 16, key=keys[0])
    return case(Rnn(cell, eqx.nn.Linear(16, 3, key=keys[1])), normal(2, 7, 6))


class Encoder(eqx.Module):
    """The layers of Equinox's BERT example."""

    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    norms: list[eqx.nn.LayerNorm]
    dense: list[eqx.nn.Linear]
    head: eqx.nn.Linear

    def __init__(self, key: Any):
        keys = jax.random.split(key, 5)
        self.embed = eqx.nn.Embedding(32, 24, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(4, 24, key=keys[1])
        self.norms = [eqx.nn.LayerNorm(24), eqx.nn.LayerNorm(24)]
        self.dense = [
            eqx.nn.Linear(24, 48, key=keys[2]),
            eqx.nn.Linear(48, 24, key=keys[3]),
        ]
        self.head = eqx.nn.Linear(24, 5, key=keys[4])

    def __call__(self, x: Any) -> Any:
        x = jax.vmap(self.embed)(x)
        x = jax.vmap(self.norms[0])(x + self.attention(x, x, x))
        y = jax.vmap(self.dense[1])(jax.nn.gelu(jax.vmap(self.dense[0])(x)))
        x = jax.vmap(self.norms[1])(x + y)
        return self.head(x[0])


@MODELS("BERT layer (Equinox example)")
def encoder() -> Case:
    return case(Encoder(KEY), tokens(2, 8))


@MODELS("ViT (equimo)")
def vit() -> Case:
    model = equimo.VisionTransformer(
        img_size=16,
        in_channels=3,
        dim=32,
        patch_size=4,
        num_heads=4,
        depths=[2],
        num_classes=5,
        key=KEY,
    )
    return case(model, normal(2, 3, 16, 16), keyed=True)


@MODELS("ConvNeXt (equimo)")
def convnext() -> Case:
    model = equimo.ConvNeXt(
        3, depths=[1, 1, 1, 1], dims=[8, 16, 24, 32], num_classes=5, key=KEY
    )
    return case(model, normal(2, 3, 32, 32), keyed=True)


@MODELS("MLLA, linear attention (equimo)")
def mlla() -> Case:
    model = equimo.Mlla(
        16, 3, dim=16, depths=[1, 1], num_heads=[2, 4], num_classes=5, key=KEY
    )
    return case(model, normal(2, 3, 16, 16), keyed=True)
