"""Residual networks, in their CIFAR and ImageNet forms.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016,
arXiv:1512.03385, table 1 and section 4.2. Bottlenecks stride in their 3x3
convolution, as torchvision's do ("v1.5").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune.errors import ConfigError
from jaxprune.models.layers import (
    as_logits,
    check_lengths,
    conv,
    scale_width,
    width_of,
)

Shortcut = Literal["identity", "projection", "pad"]


class Block(nn.Module):
    """A basic block (one inner width) or a bottleneck (two), with its shortcut.

    Shortcuts: "identity", "projection" (strided 1x1 convolution and BatchNorm) or
    "pad" (option A: every `stride`-th pixel, zeros appended to the channels).
    """

    inner_widths: tuple[int, ...]
    out_width: int
    stride: int
    shortcut: Shortcut
    bn_epsilon: float
    bn_momentum: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def norm(name: str) -> nn.BatchNorm:
            return nn.BatchNorm(
                use_running_average=not train,
                epsilon=self.bn_epsilon,
                momentum=self.bn_momentum,
                dtype=self.dtype,
                name=name,
            )

        kernels = (1, 3, 1) if len(self.inner_widths) == 2 else (3, 3)
        strided = kernels.index(3)
        widths = (*self.inner_widths, self.out_width)
        y = x
        for i, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
            y = conv(
                width,
                kernel=kernel,
                stride=self.stride if i == strided else 1,
                dtype=self.dtype,
                name=f"conv{i + 1}",
            )(y)
            y = norm(f"bn{i + 1}")(y)
            if i + 1 < len(widths):
                y = nn.relu(y)
        if self.shortcut == "projection":
            x = conv(
                self.out_width,
                kernel=1,
                stride=self.stride,
                dtype=self.dtype,
                name="proj",
            )(x)
            x = norm("proj_bn")(x)
        elif self.shortcut == "pad":
            x = x[:, :: self.stride, :: self.stride]
            x = jnp.pad(x, ((0, 0),) * 3 + ((0, self.out_width - x.shape[-1]),))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Stem, stages of residual blocks, global average pool, linear layer.

    Layers are named `conv`, `bn`, `block0/conv1`, `block0/bn1`, .., `block0/proj`,
    `block0/proj_bn`, .., `linear`. Which blocks project follows from the structure,
    never from a comparison of widths, so that it is the same after pruning.

    Attributes:
      stem: "cifar" (3x3) or "imagenet" (7x7 stride 2, 3x3 max pool stride 2).
      stem_width: channels of the stem; those of the first stage where that stage
        starts with an identity shortcut.
      stage_widths: channels of each stage's residual stream.
      stage_blocks: number of blocks of each stage.
      inner_widths: per block, one (basic) or two (bottleneck) inner widths.
      shortcut: where a stage begins, "projection" or "pad" (option A, which needs
        widths that do not fall from stage to stage).
      project_first: whether the first stage starts with a projection too, as
        bottleneck networks do.
      dtype: of the computation; parameters are float32. None follows the inputs.
    """

    stem: Literal["cifar", "imagenet"]
    stem_width: int
    stage_widths: tuple[int, ...]
    stage_blocks: tuple[int, ...]
    inner_widths: tuple[tuple[int, ...], ...]
    shortcut: Literal["projection", "pad"] = "projection"
    project_first: bool = False
    num_classes: int = 10
    bn_epsilon: float = 1e-5
    bn_momentum: float = 0.9
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (B, num_classes) of images (B, H, W, 3)."""
        self._check()
        large = self.stem == "imagenet"
        x = conv(
            self.stem_width,
            kernel=7 if large else 3,
            stride=2 if large else 1,
            dtype=self.dtype,
            name="conv",
        )(x)
        x = nn.BatchNorm(
            use_running_average=not train,
            epsilon=self.bn_epsilon,
            momentum=self.bn_momentum,
            dtype=self.dtype,
            name="bn",
        )(x)
        x = nn.relu(x)
        if large:
            # Flax takes pairs too, though it annotates a string only.
            pads: Any = ((1, 1), (1, 1))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=pads)
        for i, (stage, first) in enumerate(self._blocks()):
            starts = first and (stage > 0 or self.project_first)
            x = Block(
                inner_widths=self.inner_widths[i],
                out_width=self.stage_widths[stage],
                stride=2 if first and stage > 0 else 1,
                shortcut=self.shortcut if starts else "identity",
                bn_epsilon=self.bn_epsilon,
                bn_momentum=self.bn_momentum,
                dtype=self.dtype,
                name=f"block{i}",
            )(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return as_logits(nn.Dense(self.num_classes, dtype=self.dtype, name="linear")(x))

    def resized(self, variables: Mapping[str, Any]) -> ResNet:
        """This architecture with the widths that the shapes of `variables` have.

        Raises:
          GraphError: a layer is missing from `variables`.
        """

        def width(name: str) -> int:
            return width_of(variables, f"params/{name}/kernel")

        last_conv = len(self.inner_widths[0]) + 1
        first_blocks = [i for i, (_, first) in enumerate(self._blocks()) if first]
        return self.clone(
            stem_width=width("conv"),
            stage_widths=tuple(
                width(f"block{i}/conv{last_conv}") for i in first_blocks
            ),
            inner_widths=tuple(
                tuple(width(f"block{i}/conv{j + 1}") for j in range(len(inner)))
                for i, inner in enumerate(self.inner_widths)
            ),
            num_classes=width("linear"),
        )

    def _blocks(self) -> list[tuple[int, bool]]:
        """Per block: its stage, and whether it is the first of it."""
        return [
            (stage, block == 0)
            for stage, count in enumerate(self.stage_blocks)
            for block in range(count)
        ]

    def _check(self) -> None:
        check_lengths(self, sum(self.stage_blocks), "inner_widths")
        if not self.project_first and self.stem_width != self.stage_widths[0]:
            raise ConfigError(
                f"ResNet.stem_width: expected {self.stage_widths[0]}, the width of "
                "the first stage, which starts with an identity shortcut; found "
                f"{self.stem_width}; make them equal or set project_first=True"
            )
        widths = (self.stem_width, *self.stage_widths)
        if self.shortcut == "pad" and list(widths) != sorted(widths):
            raise ConfigError(
                'ResNet.stage_widths: shortcut="pad" appends zero channels, so widths '
                f"must not fall from stage to stage; found {widths}; use "
                'shortcut="projection"'
            )


def resnet_cifar(
    *,
    depth: int = 20,
    num_classes: int = 10,
    width: float = 1.0,
    shortcut: Literal["projection", "pad"] = "projection",
) -> ResNet:
    """The 6n + 2 layer network for 32x32 images: 16, 32 and 64 channels."""
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ConfigError(
            f"depth: expected 6 n + 2, such as 20, 32, 56 or 110, found {depth}"
        )
    stage_widths = tuple(scale_width(w, width) for w in (16, 32, 64))
    return ResNet(
        stem="cifar",
        stem_width=stage_widths[0],
        stage_widths=stage_widths,
        stage_blocks=(blocks,) * 3,
        inner_widths=tuple((w,) for w in stage_widths for _ in range(blocks)),
        shortcut=shortcut,
        num_classes=num_classes,
    )


def resnet_imagenet(
    *,
    stage_blocks: tuple[int, ...] = (2, 2, 2, 2),
    bottleneck: bool = False,
    num_classes: int = 1000,
    width: float = 1.0,
) -> ResNet:
    """The network for 224x224 images: inner widths 64, 128, 256 and 512."""
    inner = tuple(scale_width(w, width) for w in (64, 128, 256, 512))
    return ResNet(
        stem="imagenet",
        stem_width=inner[0],
        stage_widths=tuple(4 * w for w in inner) if bottleneck else inner,
        stage_blocks=stage_blocks,
        inner_widths=tuple(
            (w, w) if bottleneck else (w,)
            for w, count in zip(inner, stage_blocks, strict=True)
            for _ in range(count)
        ),
        project_first=bottleneck,
        num_classes=num_classes,
    )
