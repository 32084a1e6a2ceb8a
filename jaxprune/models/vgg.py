"""VGG, in its CIFAR and ImageNet forms.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", ICLR 2015, arXiv:1409.1556, table 1: configurations A, B, D and E.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxprune.conv import max_pool_2x2
from jaxprune.errors import ConfigError
from jaxprune.models.layers import as_logits, conv, scale_width, width_of

_CONVS_PER_STAGE = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_STAGE_WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """3x3 convolutions in stages that end in a 2x2 max pool, then Dense layers.

    Layers are named `conv0`, `bn0`, .., `hidden0`, .., `linear`. With
    `dropout` > 0, training needs the PRNG stream "dropout".

    Attributes:
      conv_widths: output channels of each convolution.
      pool_after: indices of the convolutions that a pool follows.
      hidden_widths: units of each hidden Dense layer; () for a linear head.
      conv_bias: whether convolutions have a bias; torchvision's have one even before
        a BatchNorm, which cancels it.
      dropout: rate after each hidden Dense layer.
      dtype: of the computation; parameters are float32. None follows the inputs.
    """

    conv_widths: tuple[int, ...]
    pool_after: tuple[int, ...]
    hidden_widths: tuple[int, ...] = ()
    num_classes: int = 10
    batch_norm: bool = True
    conv_bias: bool = False
    dropout: float = 0.0
    bn_epsilon: float = 1e-5
    bn_momentum: float = 0.9
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (B, num_classes) of images (B, H, W, 3)."""
        for i, width in enumerate(self.conv_widths):
            x = conv(width, use_bias=self.conv_bias, dtype=self.dtype, name=f"conv{i}")(
                x
            )
            if self.batch_norm:
                x = nn.BatchNorm(
                    use_running_average=not train,
                    epsilon=self.bn_epsilon,
                    momentum=self.bn_momentum,
                    dtype=self.dtype,
                    name=f"bn{i}",
                )(x)
            x = nn.relu(x)
            if i in self.pool_after:
                x = max_pool_2x2(x)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden_widths):
            x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"hidden{i}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return as_logits(nn.Dense(self.num_classes, dtype=self.dtype, name="linear")(x))

    def resized(self, variables: Mapping[str, Any]) -> VGG:
        """This architecture with the widths that the shapes of `variables` have.

        Raises:
          GraphError: a layer is missing from `variables`.
        """
        return self.clone(
            conv_widths=tuple(
                width_of(variables, f"params/conv{i}/kernel")
                for i in range(len(self.conv_widths))
            ),
            hidden_widths=tuple(
                width_of(variables, f"params/hidden{i}/kernel")
                for i in range(len(self.hidden_widths))
            ),
            num_classes=width_of(variables, "params/linear/kernel"),
        )


def _stages(depth: int) -> tuple[int, ...]:
    if depth not in _CONVS_PER_STAGE:
        known = ", ".join(map(str, _CONVS_PER_STAGE))
        raise ConfigError(f"depth: expected one of {known}, found {depth}")
    return _CONVS_PER_STAGE[depth]


def _vgg(
    convs_per_stage: tuple[int, ...],
    stage_widths: tuple[int, ...],
    hidden_widths: tuple[int, ...],
    *,
    width: float,
    num_classes: int,
    batch_norm: bool,
    conv_bias: bool,
    dropout: float,
) -> VGG:
    ends, widths = [], []
    for count, stage_width in zip(convs_per_stage, stage_widths, strict=True):
        widths += [scale_width(stage_width, width)] * count
        ends.append(len(widths) - 1)
    return VGG(
        conv_widths=tuple(widths),
        pool_after=tuple(ends),
        hidden_widths=tuple(scale_width(w, width) for w in hidden_widths),
        num_classes=num_classes,
        batch_norm=batch_norm,
        conv_bias=conv_bias,
        dropout=dropout,
    )


def vgg_cifar(
    *,
    depth: int = 16,
    num_classes: int = 10,
    width: float = 1.0,
    batch_norm: bool = True,
    hidden_widths: tuple[int, ...] = (),
    dropout: float = 0.0,
) -> VGG:
    """VGG for 32x32 images: five stages, then `hidden_widths` and a linear layer.

    Convolutions have a bias exactly where no BatchNorm follows.
    """
    return _vgg(
        _stages(depth),
        _STAGE_WIDTHS,
        hidden_widths,
        width=width,
        num_classes=num_classes,
        batch_norm=batch_norm,
        conv_bias=not batch_norm,
        dropout=dropout,
    )


def vgg_imagenet(
    *,
    depth: int = 16,
    num_classes: int = 1000,
    width: float = 1.0,
    batch_norm: bool = False,
    dropout: float = 0.5,
) -> VGG:
    """VGG for 224x224 images: five stages, two hidden layers of 4096."""
    return _vgg(
        _stages(depth),
        _STAGE_WIDTHS,
        (4096, 4096),
        width=width,
        num_classes=num_classes,
        batch_norm=batch_norm,
        conv_bias=True,
        dropout=dropout,
    )


def vgg_small(
    *,
    num_classes: int = 10,
    width: float = 1.0,
    batch_norm: bool = True,
) -> VGG:
    """Six convolutions in three stages, for images of 8x8 such as the digits."""
    return _vgg(
        (2, 2, 2),
        (32, 64, 128),
        (),
        width=width,
        num_classes=num_classes,
        batch_norm=batch_norm,
        conv_bias=not batch_norm,
        dropout=0.0,
    )
