"""dm-haiku's networks: functions of a parameter tree, made by hk.transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from .case import SEED, Case, Shelf, draw, normal, tokens

MODELS = Shelf()


def case(body: Callable[..., Any], *inputs: Any, statistics: bool = False) -> Case:
    """A Haiku function as (params, *inputs); Haiku checks every parameter's shape.

    statistics: it takes a flag is_training, without which it makes no statistics.
    """
    transformed = hk.transform_with_state(body)
    key = jax.random.key(SEED)
    training, inference = ((True,), (False,)) if statistics else ((), ())
    params, state = jax.eval_shape(
        lambda *x: transformed.init(key, *x, *training), *inputs
    )

    def call(variables: Any, *inputs: Any) -> Any:
        given = variables["params"], variables["state"]
        return transformed.apply(*given, key, *inputs, *inference)[0]

    variables = draw({"params": params, "state": state})
    return Case(call, variables, inputs, replay_only=True)


@MODELS("MLP (Haiku)")
def mlp() -> Case:
    return case(lambda x: hk.nets.MLP([32, 24, 5])(x), normal(3, 10))


@MODELS("ResNet-18 (Haiku)")
def resnet18() -> Case:
    def body(x: Any, is_training: bool) -> Any:
        return hk.nets.ResNet18(5, resnet_v2=True)(x, is_training)

    return case(body, normal(1, 32, 32, 3), statistics=True)


@MODELS("ResNet-50 (Haiku)")
def resnet50() -> Case:
    def body(x: Any, is_training: bool) -> Any:
        return hk.nets.ResNet50(5)(x, is_training)

    return case(body, normal(1, 32, 32, 3), statistics=True)


@MODELS("MobileNetV1 (Haiku)")
def mobilenet() -> Case:
    def body(x: Any, is_training: bool) -> Any:
        return hk.nets.MobileNetV1(
            strides=(1, 2, 1, 2), channels=(16, 16, 24, 24), num_classes=5
        )(x, is_training)

    return case(body, normal(1, 32, 32, 3), statistics=True)


@MODELS("IMPALA-like LSTM agent (Haiku example)")
def agent() -> Case:
    def body(x: Any) -> Any:
        torso = hk.Sequential(
            [hk.Conv2D(8, 3, 2), jax.nn.relu, hk.Conv2D(12, 3, 2), jax.nn.relu]
        )
        y = hk.BatchApply(lambda z: hk.Flatten()(torso(z)))(x)
        core = hk.LSTM(16)
        y, _ = hk.dynamic_unroll(core, y, core.initial_state(x.shape[1]))
        return hk.BatchApply(hk.Linear(6))(y), hk.BatchApply(hk.Linear(1))(y)

    return case(body, normal(4, 2, 16, 16, 3))


@MODELS("transformer language model (Haiku example)")
def transformer() -> Case:
    def body(x: Any) -> Any:
        width, heads = 32, 4
        init = hk.initializers.VarianceScaling(1.0)
        h = hk.Embed(32, width)(x)
        positions = hk.get_parameter("positions", [x.shape[1], width], init=init)
        h = h + positions
        mask = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1])))
        for _ in range(2):
            y = hk.LayerNorm(-1, True, True)(h)
            attend = hk.MultiHeadAttention(heads, width // heads, w_init=init)
            h = h + attend(y, y, y, mask=mask)
            y = hk.LayerNorm(-1, True, True)(h)
            dense = hk.Sequential([hk.Linear(48), jax.nn.gelu, hk.Linear(width)])
            h = h + dense(y)
        return hk.Linear(32)(hk.LayerNorm(-1, True, True)(h))

    return case(body, tokens(2, 8))


@MODELS("VQ-VAE encoder and decoder (Haiku example)")
def vqvae() -> Case:
    def body(x: Any) -> Any:
        x = jax.nn.relu(hk.Conv2D(8, 4, 2)(x))
        x = jax.nn.relu(hk.Conv2D(16, 4, 2)(x))
        for _ in range(2):
            y = jax.nn.relu(hk.Conv2D(6, 3)(jax.nn.relu(x)))
            x = x + hk.Conv2D(16, 1)(y)
        x = jax.nn.relu(hk.Conv2D(12, 1)(x))
        x = jax.nn.relu(hk.Conv2DTranspose(8, 4, 2)(x))
        return hk.Conv2DTranspose(3, 4, 2)(x)

    return case(body, normal(1, 16, 16, 3))
