"""Convolutional networks of public code bases, written anew in their style."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .case import Case, Shelf, linen, normal

MODELS = Shelf()


# facebookresearch/ConvNeXt, as ports to Flax write it -----------------------------


class ConvNeXtBlock(nn.Module):
    dim: int
    layer_scale_init_value: float = 1e-6

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.dim, (7, 7), feature_group_count=self.dim, name="dwconv")(x)
        y = nn.LayerNorm(epsilon=1e-6, name="norm")(y)
        y = nn.gelu(nn.Dense(4 * self.dim, name="pwconv1")(y))
        y = nn.Dense(self.dim, name="pwconv2")(y)
        init = nn.initializers.constant(self.layer_scale_init_value)
        return x + self.param("gamma", init, (self.dim,)) * y


class ConvNeXt(nn.Module):
    depths: Sequence[int] = (1, 1, 2, 1)
    dims: Sequence[int] = (8, 16, 24, 32)
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, deterministic: bool = True):
        for stage, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
            size = 4 if stage == 0 else 2
            if stage:
                x = nn.LayerNorm(epsilon=1e-6)(x)
            x = nn.Conv(dim, (size, size), strides=size, padding="VALID")(x)
            if not stage:
                x = nn.LayerNorm(epsilon=1e-6)(x)
            for _ in range(depth):
                x = ConvNeXtBlock(dim)(x)
        x = nn.LayerNorm(epsilon=1e-6)(jnp.mean(x, (1, 2)))
        return nn.Dense(self.num_classes)(x)


@MODELS("ConvNeXt")
def convnext() -> Case:
    return linen(ConvNeXt(), normal(2, 32, 32, 3))


# google/flax, examples/imagenet: ResNet ---------------------------------------------

ModuleDef = Any


class BottleneckBlock(nn.Module):
    filters: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[..., Any]
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        residual = x
        y = self.act(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = self.conv(self.filters, (3, 3), self.strides)(y)
        y = self.conv(self.filters * 4, (1, 1))(self.act(self.norm()(y)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)
        if residual.shape != y.shape:
            residual = self.conv(
                self.filters * 4, (1, 1), self.strides, name="conv_proj"
            )(residual)
            residual = self.norm(name="norm_proj")(residual)
        return self.act(residual + y)


class ImagenetResNet(nn.Module):
    stage_sizes: Sequence[int] = (1, 2, 1, 1)
    num_classes: int = 10
    num_filters: int = 8

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, axis_name="batch"
        )
        x = conv(self.num_filters, (7, 7), (2, 2), padding=[(3, 3)] * 2, name="init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for i, block_size in enumerate(self.stage_sizes):
            for j in range(block_size):
                strides = (2, 2) if i > 0 and j == 0 else (1, 1)
                x = BottleneckBlock(
                    self.num_filters * 2**i, conv, norm, nn.relu, strides
                )(x)
        x = nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)))
        return jnp.asarray(x, jnp.float32)


@MODELS("ResNet, bottleneck (flax examples/imagenet)")
def imagenet_resnet() -> Case:
    return linen(ImagenetResNet(), normal(2, 32, 32, 3))


# google/automl: EfficientNet's MBConv with squeeze-excite ---------------------------


class MBConv(nn.Module):
    features: int
    expand: int = 4
    strides: int = 1
    se_ratio: float = 0.25

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.99)
        inputs, filters = x, x.shape[-1] * self.expand
        if self.expand != 1:
            x = nn.swish(norm()(nn.Conv(filters, (1, 1), use_bias=False)(x)))
        x = nn.Conv(
            filters,
            (3, 3),
            strides=self.strides,
            feature_group_count=filters,
            use_bias=False,
        )(x)
        x = nn.swish(norm()(x))
        reduced = max(1, int(inputs.shape[-1] * self.se_ratio))
        s = jnp.mean(x, (1, 2), keepdims=True)
        s = nn.Conv(filters, (1, 1))(nn.swish(nn.Conv(reduced, (1, 1))(s)))
        x = norm()(nn.Conv(self.features, (1, 1), use_bias=False)(nn.sigmoid(s) * x))
        return x + inputs if x.shape == inputs.shape else x


class EfficientNet(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = partial(nn.BatchNorm, use_running_average=not train)
        x = nn.swish(norm()(nn.Conv(16, (3, 3), strides=2, use_bias=False)(x)))
        x = MBConv(8, expand=1)(x, train)
        for features, strides in ((12, 2), (12, 1), (20, 2), (20, 1)):
            x = MBConv(features, strides=strides)(x, train)
        x = nn.swish(norm()(nn.Conv(64, (1, 1), use_bias=False)(x)))
        x = nn.Dropout(0.2, deterministic=not train)(jnp.mean(x, (1, 2)))
        return nn.Dense(self.num_classes)(x)


@MODELS("EfficientNet with squeeze-excite (automl)")
def efficientnet() -> Case:
    return linen(EfficientNet(), normal(2, 32, 32, 3))


# ShuffleNet (arXiv:1707.01083) and GhostNet (arXiv:1911.11907) -----------------------


class ShuffleUnit(nn.Module):
    features: int
    groups: int = 4

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = partial(nn.BatchNorm, use_running_average=not train)
        middle = self.features // 4
        y = nn.Conv(middle, (1, 1), feature_group_count=self.groups, use_bias=False)(x)
        y = nn.relu(norm()(y))
        b, h, w, c = y.shape
        y = y.reshape(b, h, w, self.groups, c // self.groups)
        y = jnp.swapaxes(y, -1, -2).reshape(b, h, w, c)
        y = nn.Conv(c, (3, 3), feature_group_count=c, use_bias=False)(y)
        y = nn.Conv(
            self.features, (1, 1), feature_group_count=self.groups, use_bias=False
        )(norm()(y))
        return nn.relu(x + norm()(y))


class ShuffleNet(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        for _ in range(2):
            x = ShuffleUnit(64)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


@MODELS("ShuffleNet")
def shufflenet() -> Case:
    return linen(ShuffleNet(), normal(2, 16, 16, 3))


class GhostModule(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        half = self.features // 2
        a = nn.relu(nn.Conv(half, (1, 1), use_bias=False)(x))
        b = nn.Conv(half, (3, 3), feature_group_count=half, use_bias=False)(a)
        return jnp.concatenate([a, nn.relu(b)], axis=-1)


class GhostNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
        for _ in range(2):
            x = x + GhostModule(16)(GhostModule(32)(x))
        return nn.Dense(10)(x.mean((1, 2)))


@MODELS("GhostNet")
def ghostnet() -> Case:
    return linen(GhostNet(), normal(2, 16, 16, 3))


# U-Net (arXiv:1505.04597) for segmentation -------------------------------------------


class UNet(nn.Module):
    widths: Sequence[int] = (8, 16, 24)
    classes: int = 3

    @nn.compact
    def __call__(self, x, train: bool = False):
        def double(x, width):
            for _ in range(2):
                x = nn.Conv(width, (3, 3), use_bias=False)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            return x

        skips = []
        for width in self.widths[:-1]:
            x = double(x, width)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = double(x, self.widths[-1])
        for width, skip in zip(self.widths[-2::-1], skips[::-1], strict=True):
            x = nn.ConvTranspose(width, (2, 2), strides=(2, 2))(x)
            x = double(jnp.concatenate([skip, x], axis=-1), width)
        return nn.Conv(self.classes, (1, 1))(x)


@MODELS("U-Net for segmentation")
def unet() -> Case:
    return linen(UNet(), normal(2, 16, 16, 3))


# Feature pyramid on a small backbone, with two heads (RetinaNet, arXiv:1708.02002) ---


class RetinaNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        levels = []
        for width in (8, 16, 24):
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
            levels.append(nn.Conv(12, (1, 1))(x))
        merged = [levels[-1]]
        for level in levels[-2::-1]:
            shape = level.shape[:3] + merged[-1].shape[-1:]
            merged.append(level + jax.image.resize(merged[-1], shape, "nearest"))
        heads = {
            name: [nn.Conv(12, (3, 3), name=f"{name}{k}") for k in range(2)]
            + [nn.Conv(out, (3, 3), name=f"{name}_out")]
            for name, out in (("classes", 9), ("boxes", 4))
        }
        found = {}
        for name, (*tower, last) in heads.items():
            rows = []
            for level in merged:
                for layer in tower:
                    level = nn.relu(layer(level))
                rows.append(last(level).reshape(level.shape[0], -1, last.features))
            found[name] = jnp.concatenate(rows, axis=1)
        return found


@MODELS("RetinaNet: feature pyramid, shared heads")
def retinanet() -> Case:
    return linen(RetinaNet(), normal(2, 32, 32, 3))
