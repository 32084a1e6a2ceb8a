"""Patterns of image networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from pattern_registry import conv, head, pattern

# Convolutions and shortcuts -----------------------------------------------------


@pattern("stem", "a")
def residual(x):
    x = conv(8, "stem")(x)
    return head(x + conv(8, "b")(nn.relu(conv(6, "a")(nn.relu(x)))))


@pattern("stem", "a", "b", "c")
def bottleneck_with_projection(x):
    x = nn.relu(conv(6, "stem")(x))
    y = nn.relu(nn.BatchNorm(True, name="bn")(conv(4, "a", 1)(x)))
    y = nn.relu(conv(4, "b", strides=2)(y))
    return head(nn.relu(conv(12, "c", 1)(y) + conv(12, "proj", 1, strides=2)(x)))


@pattern("a", "b")
def grouped(x):
    x = nn.relu(conv(12, "a")(x))
    return head(nn.relu(conv(18, "b", feature_group_count=3)(x)))


@pattern("a")
def depthwise(x):
    x = nn.relu(conv(8, "a", 1)(x))
    x = nn.relu(conv(8, "d", feature_group_count=8)(x))
    return head(conv(6, "p", 1)(x))


@pattern("a")
def depthwise_multiplier_2(x):
    x = nn.relu(conv(6, "a", 1)(x))
    x = nn.relu(conv(12, "d", feature_group_count=6)(x))
    return head(conv(6, "p", 1)(x))


@pattern("a", "squeeze", "c")
def squeeze_excite(x):
    x = nn.relu(conv(8, "a")(x))
    s = nn.relu(nn.Dense(4, name="squeeze")(x.mean((1, 2))))
    s = nn.sigmoid(nn.Dense(8, name="excite")(s))
    return head(nn.relu(conv(6, "c")(x * s[:, None, None])))


@pattern("d0", "d1", "d2")
def dense_concat(x):
    for k in range(3):
        y = nn.relu(nn.BatchNorm(True, name=f"bn{k}")(x))
        x = jnp.concatenate([x, conv(4, f"d{k}")(y)], -1)
    return head(nn.relu(x))


@pattern("down", "mid", "up", "out")
def unet(x):
    a = nn.relu(conv(6, "down")(x))
    b = nn.relu(conv(8, "mid")(nn.max_pool(a, (2, 2), (2, 2))))
    u = nn.ConvTranspose(6, (2, 2), strides=(2, 2), name="up")(b)
    y = nn.relu(conv(7, "out")(jnp.concatenate([u, a], -1)))
    return conv(2, "last", 1)(y)


@pattern("a", "b")
def transposed_kernel(x):
    x = nn.relu(conv(6, "a")(x))
    x = nn.ConvTranspose(5, (3, 3), transpose_kernel=True, name="b")(x)
    return head(nn.relu(x))


@pattern("a", "b")
def group_norm(x):
    x = nn.relu(nn.GroupNorm(4, name="norm")(conv(16, "a")(x)))
    return head(conv(6, "b")(x))


@pattern("c")
def group_norm_after_concat(x):
    a, b = conv(8, "a")(x), conv(8, "b")(x)
    x = nn.GroupNorm(4, name="norm")(jnp.concatenate([a, b], -1))
    return head(nn.relu(conv(6, "c")(nn.relu(x))))


@pattern("a")
def instance_norm(x):
    x = nn.relu(nn.InstanceNorm(name="norm")(conv(8, "a")(x)))
    return head(x)


@pattern("stem", "a")
def pad_shortcut(x):
    x = nn.relu(conv(4, "stem")(x))
    y = conv(8, "b", strides=2)(nn.relu(conv(6, "a")(x)))
    short = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
    return head(nn.relu(y + short))


@pattern("a", "b")
def channel_shuffle(x):
    x = nn.relu(conv(12, "a")(x))
    b, h, w, c = x.shape
    x = jnp.swapaxes(x.reshape(b, h, w, 3, c // 3), 3, 4).reshape(b, h, w, c)
    return head(nn.relu(conv(8, "b")(x)))


@pattern("c")
def grouped_shuffle_grouped(x):
    x = nn.relu(conv(12, "a", feature_group_count=3)(x))
    b, h, w, c = x.shape
    x = jnp.swapaxes(x.reshape(b, h, w, 3, c // 3), 3, 4).reshape(b, h, w, c)
    x = nn.relu(conv(12, "b", feature_group_count=3)(x))
    return head(nn.relu(conv(8, "c")(x)))


@pattern("a", "b", "c")
def grouped_shuffle_in_whole_groups(x):
    x = nn.relu(conv(6, "stem")(x))
    x = nn.relu(conv(18, "a", feature_group_count=3)(x))
    b, h, w, c = x.shape
    x = jnp.swapaxes(x.reshape(b, h, w, 3, c // 3), 3, 4).reshape(b, h, w, c)
    x = nn.relu(conv(12, "b", feature_group_count=3)(x))
    return head(nn.relu(conv(8, "c")(x)))


@pattern("a", "b")
def pixel_shuffle(x):
    x = conv(16, "a")(x)
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, 2 * h, 2 * w, c // 4)
    return head(nn.relu(conv(6, "b")(nn.relu(x))))


@pattern("a", "b")
def pixel_shuffle_channels_first(x):
    x = conv(16, "a")(x)
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    x = x.reshape(b, 2 * h, 2 * w, c // 4)
    return head(nn.relu(conv(6, "b")(nn.relu(x))))


@pattern("a", "b")
def space_to_depth(x):
    x = nn.relu(conv(6, "a")(x))
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, h // 2, w // 2, 4 * c)
    return head(nn.relu(conv(6, "b")(x)))


@pattern("a", "b")
def patch_merge(x):
    x = nn.relu(conv(6, "a")(x))
    parts = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return head(nn.relu(nn.Dense(8, name="b")(jnp.concatenate(parts, -1))))


@pattern("a", "b")
def flattened(x):
    x = nn.max_pool(nn.relu(conv(5, "a")(x)), (2, 2), (2, 2))
    x = nn.relu(nn.Dense(7, name="b")(x.reshape(x.shape[0], -1)))
    return nn.Dense(3, name="head")(x)


@pattern("a")
def one_layer_twice(x):
    x = conv(8, "stem")(x)
    layer = conv(8, "shared")
    x = layer(nn.relu(layer(nn.relu(x))))
    return head(nn.relu(conv(6, "a")(x)))


@pattern("a", "b")
def frozen_part(x):
    x = jax.lax.stop_gradient(nn.relu(conv(6, "a")(x)))
    return head(nn.relu(conv(6, "b")(x)))


@pattern("a", "b")
def weight_norm(x):
    x = nn.relu(nn.WeightNorm(conv(6, "a"))(x))
    return head(nn.relu(nn.WeightNorm(conv(5, "b"))(x)))


@pattern("a", "b")
def spectral_norm(x):
    x = nn.relu(nn.SpectralNorm(conv(6, "a"))(x, update_stats=False))
    return head(nn.relu(conv(5, "b")(x)))


@pattern("a", "b")
def weight_standardised(x):
    x = nn.relu(nn.GroupNorm(None, group_size=4, name="n")(conv(8, "a")(x)))
    return head(nn.relu(conv(5, "b")(x)))


@pattern("b")
def flip(x):
    x = jnp.flip(nn.relu(conv(8, "a")(x)), -1)
    return head(nn.relu(conv(6, "b")(x)))


@pattern("b")
def roll(x):
    x = jnp.roll(nn.relu(conv(8, "a")(x)), 3, -1)
    return head(nn.relu(conv(6, "b")(x)))


@pattern("a", "b")
def channel_pad(x):
    x = jnp.pad(nn.relu(conv(8, "a")(x)), ((0, 0), (0, 0), (0, 0), (1, 3)))
    return head(nn.relu(conv(6, "b")(x)))


@pattern("a", "b")
def gram_matrix(x):
    x = nn.relu(conv(5, "a")(x))
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    gram = jnp.einsum("bnc,bnd->bcd", x, x).reshape(x.shape[0], -1)
    return nn.Dense(3, name="head")(nn.relu(nn.Dense(6, name="b")(gram)))


@pattern("a", "b")
def reduce_and_concat(x):
    """CBAM: statistics over channels, concatenated, gate the map."""
    x = nn.relu(conv(6, "a")(x))
    stats = jnp.stack([x.mean(-1), x.max(-1)], -1)
    x = x * nn.sigmoid(conv(1, "gate", 5)(stats))
    return head(nn.relu(conv(6, "b")(x)))


@pattern("a", "b")
def maxout(x):
    x = conv(8, "a")(x)
    x = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).max(-1)
    return head(nn.relu(conv(6, "b")(x)))


@pattern("a")
def channel_slices(x):
    x = nn.relu(conv(12, "a")(x))
    u, v, w = jnp.split(x, 3, -1)
    return head(u * v + w)


@pattern("a", "b")
def inception(x):
    a = nn.relu(conv(4, "a", 1)(x))
    b = nn.relu(conv(5, "b")(x))
    p = nn.avg_pool(x, (3, 3), (1, 1), "SAME")
    return head(nn.relu(conv(6, "c")(jnp.concatenate([a, b, p], -1))))


@pattern("a", "b")
def one_dimensional(x):
    x = nn.relu(nn.Conv(6, (3,), name="a")(x.reshape(x.shape[0], -1, 3)))
    return head(nn.relu(nn.Conv(5, (3,), kernel_dilation=2, name="b")(x)))


@pattern("a", "b", x=(2, 4, 4, 4, 2))
def three_dimensional(x):
    x = nn.relu(nn.Conv(6, (2, 2, 2), name="a")(x))
    return head(nn.relu(nn.Conv(5, (3, 3, 3), name="b")(x)))
