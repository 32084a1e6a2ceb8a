"""Small models of the patterns that decide a channel graph's worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# name: (module, input shape or shapes, names of groups that must be prunable)
PATTERNS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {}
IMAGE, TOKENS = (2, 8, 8, 3), (2, 6, 8)


def pattern(*groups: str, x: Any = IMAGE) -> Callable[[Any], Any]:
    """Registers the body of a compact Linen module under the function's name."""

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        call = nn.compact(lambda self, *xs: body(*xs))
        call.__name__ = "__call__"
        kind = type(body.__name__.title(), (nn.Module,), {"__call__": call})
        PATTERNS[body.__name__] = (kind(), x, groups)
        return body

    return register


def conv(features: int, name: str, size: int = 3, **options: Any) -> nn.Conv:
    return nn.Conv(features, (size, size), name=name, **options)


def head(x: jax.Array) -> jax.Array:
    return nn.Dense(3, name="head")(x.mean(tuple(range(1, x.ndim - 1))))


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


# Sequences ------------------------------------------------------------------------


@pattern("up", x=TOKENS)
def glu(x):
    gate, value = jnp.split(nn.Dense(12, name="up")(x), 2, -1)
    x = x + nn.Dense(8, name="down")(nn.silu(gate) * value)
    return head(x)


@pattern("embed", "token", "channel", x=TOKENS)
def mixer(x):
    x = nn.Dense(10, name="embed")(x)
    y = nn.LayerNorm(name="n0")(x).swapaxes(1, 2)
    y = nn.Dense(6, name="token_out")(nn.gelu(nn.Dense(7, name="token")(y)))
    x = x + y.swapaxes(1, 2)
    y = nn.gelu(nn.Dense(9, name="channel")(nn.LayerNorm(name="n1")(x)))
    return head(x + nn.Dense(10, name="channel_out")(y))


@pattern("a", x=TOKENS)
def concat_last_axis_of_a_sequence(x):
    a = nn.relu(nn.Dense(6, name="a")(x))
    b = nn.relu(nn.Dense(5, name="b")(x))
    c = jnp.concatenate([a.swapaxes(1, 2), b.swapaxes(1, 2)], 1).swapaxes(1, 2)
    return head(nn.relu(nn.Dense(7, name="c")(c)))


@pattern("embed", "att/query", "att/value", "mlp", x=TOKENS)
def attention(x):
    x = nn.Dense(12, name="embed")(x)
    y = nn.LayerNorm(name="norm")(x)
    x = x + nn.MultiHeadDotProductAttention(4, qkv_features=16, name="att")(y, y)
    y = nn.gelu(nn.Dense(9, name="mlp")(nn.LayerNorm(name="norm2")(x)))
    return head(x + nn.Dense(12, name="out")(y))


@pattern("att/query", "att/value", x=TOKENS)
def attention_with_normed_queries(x):
    att = nn.MultiHeadDotProductAttention(
        4, qkv_features=24, normalize_qk=True, use_bias=False, name="att"
    )
    return head(att(x, x))


def _attend(q, k, v):
    """Heads at axis -2: (B, T, H, D)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)


def _project(x):
    x = x.reshape(*x.shape[:2], -1)
    return head(nn.relu(nn.Dense(6, name="project")(x)))


def _heads(features, heads, name):
    return nn.DenseGeneral((heads, features), name=name)


@pattern("q", "v", x=TOKENS)
def gqa_by_repeat(x):
    q, k, v = _heads(6, 4, "q")(x), _heads(6, 2, "k")(x), _heads(5, 2, "v")(x)
    rep = q.shape[2] // k.shape[2]
    return _project(_attend(q, jnp.repeat(k, rep, 2), jnp.repeat(v, rep, 2)))


@pattern("q", "v", x=TOKENS)
def gqa_by_reshape(x):
    q, k, v = _heads(6, 4, "q")(x), _heads(6, 2, "k")(x), _heads(5, 2, "v")(x)
    b, t, h, d = q.shape
    q = q.reshape(b, t, k.shape[2], h // k.shape[2], d)
    scores = nn.softmax(jnp.einsum("bqhgd,bkhd->bhgqk", q, k) / np.sqrt(d))
    return _project(jnp.einsum("bhgqk,bkhd->bqhgd", scores, v))


@pattern("q", x=TOKENS)
def multi_query(x):
    q, k, v = _heads(6, 4, "q")(x), nn.Dense(6, name="k")(x), nn.Dense(5, name="v")(x)
    scores = nn.softmax(jnp.einsum("bqhd,bkd->bhqk", q, k) * q.shape[-1] ** -0.5)
    return _project(jnp.einsum("bhqk,bkd->bqhd", scores, v))


@pattern("qkv", x=TOKENS)
def fused_qkv_by_split(x):
    parts = jnp.split(nn.Dense(48, name="qkv")(x), 3, -1)
    q, k, v = (p.reshape(*p.shape[:2], 4, -1) for p in parts)
    return _project(_attend(q, k, v))


@pattern("qkv", x=TOKENS)
def fused_qkv_by_reshape(x):
    qkv = nn.Dense(48, name="qkv")(x)
    qkv = qkv.reshape(*qkv.shape[:2], 3, 4, -1).transpose(2, 0, 1, 3, 4)
    return _project(_attend(qkv[0], qkv[1], qkv[2]))


@pattern("qkv", x=TOKENS)
def fused_qkv_within_heads(x):
    qkv = nn.Dense(48, name="qkv")(x)
    qkv = qkv.reshape(*qkv.shape[:2], 4, -1)
    return _project(_attend(*jnp.split(qkv, 3, -1)))


def _rope(x):
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] / 100 ** (np.arange(half) / half)
    sin, cos = np.sin(angles)[:, None], np.cos(angles)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


@pattern("q", "v", x=TOKENS)
def rope(x):
    q, k, v = _heads(6, 4, "q")(x), _heads(6, 4, "k")(x), _heads(5, 4, "v")(x)
    return _project(_attend(_rope(q), _rope(k), v))


class RelativePositions(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (_heads(6, 4, name)(x) for name in "qkv")
        table = self.param("table", nn.initializers.normal(), (11, 4))
        place = np.arange(6)[:, None] - np.arange(6) + 5
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
        scores = scores + table[place].transpose(2, 0, 1)
        return _project(jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v))


PATTERNS["relative_positions"] = (RelativePositions(), TOKENS, ("v",))


@pattern("embed", x=np.arange(12).reshape(2, 6) % 11)
def tied_embedding(x):
    embed = nn.Embed(11, 8, name="embed")
    x = embed(x)
    x = x + nn.Dense(8, name="down")(nn.relu(nn.Dense(9, name="up")(x)))
    return embed.attend(x)


@pattern("embed", "up", x=TOKENS)
def mixture_of_experts(x):
    x = nn.Dense(10, name="embed")(x)
    weights, chosen = jax.lax.top_k(nn.softmax(nn.Dense(4, name="router")(x)), 2)
    gate = (jax.nn.one_hot(chosen, 4) * weights[..., None]).sum(-2)
    many = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    dense = nn.vmap(nn.Dense, in_axes=None, out_axes=-2, axis_size=4, **many)
    y = nn.relu(dense(9, name="up")(x))
    dense = nn.vmap(nn.Dense, in_axes=-2, out_axes=-2, axis_size=4, **many)
    y = dense(10, name="down")(y)
    return head(x + (y * gate[..., None]).sum(-2))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.gelu(nn.Dense(9, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(x.shape[-1], name="down")(y), None


@pattern("embed", "up", x=TOKENS)
def scanned_remat_stack(x):
    x = nn.Dense(10, name="embed")(x)
    stack = nn.scan(
        nn.remat(Block),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
    )
    return head(stack(name="stack")(x, None)[0])


def _recurrent(cell, **options):
    def body(x):
        x = nn.relu(nn.Dense(7, name="embed")(x))
        x = nn.RNN(cell(6, name="cell"), **options)(x)
        return head(nn.relu(nn.Dense(5, name="out")(x)))

    return body


for _cell in (nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.MGUCell, nn.SimpleCell):
    _body = _recurrent(_cell)
    _body.__name__ = _cell.__name__.lower()
    pattern("embed", "cell", "out", x=TOKENS)(_body)


@pattern("embed", "out", x=TOKENS)
def bidirectional(x):
    x = nn.relu(nn.Dense(7, name="embed")(x))
    ahead, back = nn.RNN(nn.LSTMCell(6, name="f")), nn.RNN(nn.GRUCell(5, name="g"))
    x = nn.Bidirectional(ahead, back)(x)
    return head(nn.relu(nn.Dense(5, name="out")(x)))


@pattern("out", x=(2, 3, 6, 6, 2))
def conv_lstm(x):
    x = nn.RNN(nn.ConvLSTMCell(4, (3, 3), name="cell"))(x)
    return head(nn.relu(nn.Dense(5, name="out")(x)))


@pattern("a", "b", x=TOKENS)
def einsum_layers(x):
    x = nn.Einsum((8, 3, 4), "btc,chd->bthd", name="a")(x)
    x = nn.Einsum((3, 4, 9), "bthd,hde->bte", name="b")(nn.relu(x))
    return head(nn.relu(x))


@pattern("a", "b", x=TOKENS)
def norms_and_gates(x):
    x = nn.RMSNorm(name="rms")(nn.Dense(8, name="a")(x))
    x = nn.PReLU(name="prelu")(x)
    return head(nn.swish(nn.Dense(6, name="b")(x)))


@pattern("a", "b", x=((2, 5), (2, 4)))
def two_inputs(x, y):
    x = nn.relu(nn.Dense(6, name="a")(x) + nn.Dense(6, name="a2")(y))
    return nn.Dense(3, name="head")(nn.relu(nn.Dense(5, name="b")(x)))


@pattern("a", x=(2, 5))
def several_outputs(x):
    x = nn.relu(nn.Dense(6, name="a")(x))
    y = nn.relu(nn.Dense(5, name="b")(x))
    return {"features": y, "logits": nn.Dense(3, name="head")(y)}


@pattern("a", "b", x=(2, 5))
def linear_bottleneck_by_matmul(x):
    x = nn.relu(nn.Dense(6, name="a")(x))
    y = nn.Dense(6, name="a2")(x)
    return nn.Dense(3, name="head")(nn.relu(nn.Dense(7, name="b")((x @ y.T) @ x)))


@pattern("a", "b")
def while_and_cond(x):
    x = nn.relu(conv(6, "a")(x))

    def body(state):
        return state[0] + 1, jnp.tanh(state[1]) * 1.5

    _, x = jax.lax.while_loop(lambda s: s[0] < 3, body, (0, x))
    x = jax.lax.cond(x.sum() > 0, lambda v: v * 2, lambda v: v - 1, x)
    x = jax.lax.fori_loop(0, 2, lambda k, v: v + 0.1 * k, x)
    return head(nn.relu(conv(5, "b")(x)))
