"""Small networks of other families than the VGGs and ResNets of the model zoo."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class MobileNet(nn.Module):
    """Inverted residuals: Sandler et al., CVPR 2018, arXiv:1801.04381."""

    # Output width, expansion and stride of each block.
    blocks: tuple[tuple[int, int, int], ...] = (
        *((16, 1, 1), (24, 4, 2), (24, 4, 1)),
        *((40, 4, 2), (40, 4, 1), (64, 4, 1)),
    )

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def conv(x: jax.Array, width: int, size: int, **options: int) -> jax.Array:
            x = nn.Conv(width, (size, size), use_bias=False, **options)(x)
            return nn.BatchNorm(not train, momentum=0.9)(x)

        x = nn.relu6(conv(x, 16, 3))
        for width, expansion, stride in self.blocks:
            y, inner = x, expansion * x.shape[-1]
            if expansion > 1:
                y = nn.relu6(conv(y, inner, 1))
            y = nn.relu6(conv(y, inner, 3, strides=stride, feature_group_count=inner))
            y = conv(y, width, 1)
            x = x + y if x.shape == y.shape else y
        return nn.Dense(10)(nn.relu6(conv(x, 160, 1)).mean((1, 2)))


class DenseNet(nn.Module):
    """Concatenations: Huang et al., CVPR 2017, arXiv:1608.06993."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def conv(x: jax.Array, width: int, size: int) -> jax.Array:
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
            return nn.Conv(width, (size, size), use_bias=False)(x)

        x = nn.Conv(24, (3, 3), use_bias=False)(x)
        for block in range(3):
            for _ in range(4):
                x = jnp.concatenate([x, conv(conv(x, 48, 1), 12, 3)], -1)
            if block < 2:
                x = nn.avg_pool(conv(x, x.shape[-1] // 2, 1), (2, 2), (2, 2))
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class SEResNet(nn.Module):
    """Squeeze-and-excitation (arXiv:1709.01507) and group normalisation."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train

        def conv(x: jax.Array, width: int, size: int, stride: int = 1) -> jax.Array:
            x = nn.Conv(width, (size, size), strides=stride, use_bias=False)(x)
            return nn.GroupNorm(num_groups=4)(x)

        x = nn.relu(conv(x, 16, 3))
        for width, stride in ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
            y = conv(nn.relu(conv(x, width, 3, stride)), width, 3)
            gate = nn.Dense(width)(nn.relu(nn.Dense(width // 4)(y.mean((1, 2)))))
            y = y * nn.sigmoid(gate)[:, None, None]
            x = nn.relu(y + (x if x.shape == y.shape else conv(x, width, 1, stride)))
        return nn.Dense(10)(x.mean((1, 2)))


class ViT(nn.Module):
    """Four blocks of pre-norm attention over 4x4 patches: arXiv:2010.11929."""

    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train
        x = nn.Conv(self.width, (4, 4), strides=4)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        shape = (1, x.shape[1], self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), shape)
        for _ in range(4):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(y, y)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class UNet(nn.Module):
    """Skips by concatenation and transposed convolutions; returns an image."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train

        def twice(x: jax.Array, width: int) -> jax.Array:
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            return nn.relu(nn.Conv(width, (3, 3))(x))

        def joined(x: jax.Array, skip: jax.Array) -> jax.Array:
            width = skip.shape[-1]
            x = nn.ConvTranspose(width, (2, 2), strides=(2, 2))(x)
            x = jnp.concatenate([x, skip], -1)
            return nn.relu(nn.Conv(width, (3, 3))(x))

        large = twice(x, 16)
        middle = twice(nn.max_pool(large, (2, 2), (2, 2)), 32)
        x = twice(nn.max_pool(middle, (2, 2), (2, 2)), 64)
        return nn.Conv(3, (1, 1))(joined(joined(x, middle), large))
