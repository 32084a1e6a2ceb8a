"""keras.applications on JAX: a function of a tree of arrays, through stateless_call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
from keras import applications, layers

from .case import Case, Shelf, draw, normal, tokens

MODELS = Shelf()

# name: (function, options, pixels)
ROWS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "MobileNet": (applications.MobileNet, {"alpha": 0.25}, 32),
    "MobileNetV2": (applications.MobileNetV2, {"alpha": 0.35}, 32),
    "MobileNetV3 small": (applications.MobileNetV3Small, {}, 32),
    "EfficientNetB0": (applications.EfficientNetB0, {}, 32),
    "ResNet50": (applications.ResNet50, {}, 32),
    "DenseNet121": (applications.DenseNet121, {}, 32),
    "VGG16": (applications.VGG16, {}, 32),
}


def case(model: keras.Model, *inputs: Any) -> Case:
    """A Keras model as a function (params, *inputs); Keras checks every width."""
    kinds = {
        "trainable": model.trainable_variables,
        "state": model.non_trainable_variables,
    }

    def named(variables: Sequence[Any]) -> dict[str, Any]:
        return {f"{k:03d}/{v.path}": v.value for k, v in enumerate(variables)}

    def call(params: Any, *inputs: Any) -> Any:
        values = [list(params[kind].values()) for kind in kinds]
        given = inputs if len(inputs) > 1 else inputs[0]
        return model.stateless_call(*values, given, training=False)[0]

    shapes = {kind: named(variables) for kind, variables in kinds.items()}
    params = draw(jax.tree.map(lambda leaf: leaf, shapes))
    return Case(call, params, inputs, replay_only=True)


def _application(name: str) -> Case:
    make, options, pixels = ROWS[name]
    keras.utils.set_random_seed(0)
    model = make(
        weights=None,
        classes=5,
        classifier_activation=None,
        input_shape=(pixels, pixels, 3),
        **options,
    )
    return case(model, normal(1, pixels, pixels, 3))


for _name in ROWS:
    MODELS(f"{_name} (Keras)")(lambda _name=_name: _application(_name))


@MODELS("transformer classifier (Keras layers)")
def transformer() -> Case:
    inputs = keras.Input((8,), dtype="int32")
    x = layers.Embedding(32, 24)(inputs)
    y = layers.MultiHeadAttention(4, 6)(x, x)
    x = layers.LayerNormalization()(x + y)
    y = layers.Dense(24)(layers.Dense(48, activation="gelu")(x))
    x = layers.LayerNormalization()(x + y)
    x = layers.GlobalAveragePooling1D()(x)
    return case(keras.Model(inputs, layers.Dense(5)(x)), tokens(2, 8))


@MODELS("bidirectional LSTM and GRU (Keras layers)")
def recurrent() -> Case:
    inputs = keras.Input((7, 6))
    x = layers.Bidirectional(layers.LSTM(10, return_sequences=True))(inputs)
    x = layers.GRU(12)(x)
    return case(keras.Model(inputs, layers.Dense(5)(x)), normal(2, 7, 6))


@MODELS("U-Net with separable convolutions (Keras example)")
def segmentation() -> Case:
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(8, 3, strides=2, padding="same")(inputs)
    x = layers.Activation("relu")(layers.BatchNormalization()(x))
    before = x
    for filters in (12, 16):
        for _ in range(2):
            x = layers.SeparableConv2D(filters, 3, padding="same")(
                layers.Activation("relu")(x)
            )
            x = layers.BatchNormalization()(x)
        x = layers.MaxPooling2D(3, strides=2, padding="same")(x)
        short = layers.Conv2D(filters, 1, strides=2, padding="same")(before)
        x = before = layers.add([x, short])
    for filters in (16, 12, 8):
        for _ in range(2):
            x = layers.Conv2DTranspose(filters, 3, padding="same")(
                layers.Activation("relu")(x)
            )
            x = layers.BatchNormalization()(x)
        x = layers.UpSampling2D(2)(x)
        short = layers.Conv2D(filters, 1, padding="same")(
            layers.UpSampling2D(2)(before)
        )
        x = before = layers.add([x, short])
    outputs = layers.Conv2D(3, 3, padding="same")(x)
    return case(keras.Model(inputs, outputs), normal(1, 16, 16, 3))
