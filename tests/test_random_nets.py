"""Random architectures, random plans: the slim model equals the masked original."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from zoo import random_plan

import jaxprune as jp
from jaxprune import slicing
from jaxprune.errors import EmissionError

Op = tuple[Any, ...]

widths = st.integers(2, 8)
activation = st.sampled_from(["relu", "tanh", "gelu", "silu"])
simple = st.one_of(
    st.tuples(st.just("conv"), widths, st.sampled_from([1, 3])),
    st.tuples(st.just("grouped"), st.sampled_from([2, 3]), st.integers(1, 3)),
    st.tuples(st.just("depthwise"), st.sampled_from([1, 2])),
    st.tuples(st.just("dense"), widths),
    st.tuples(st.just("act"), activation),
    st.tuples(st.just("batch_norm")),
    st.tuples(st.just("layer_norm")),
    st.tuples(st.just("rms_norm")),
    st.tuples(st.just("group_norm"), st.sampled_from([2, 3])),
    st.tuples(st.just("flip")),
    st.tuples(st.just("roll"), st.integers(1, 3)),
    st.tuples(st.just("pad"), st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.just("shuffle"), st.sampled_from([2, 3])),
    st.tuples(st.just("glu")),
    st.tuples(st.just("maxout")),
    st.tuples(st.just("transpose_conv"), widths),
    st.tuples(st.just("pool")),
    st.tuples(st.just("space_to_depth")),
    st.tuples(st.just("depth_to_space")),
    st.tuples(st.just("attention"), st.sampled_from([1, 2]), st.integers(2, 4)),
    st.tuples(st.just("tokens"), widths),
    st.tuples(st.just("squeeze_excite"), widths),
    st.tuples(st.just("statistics")),
    st.tuples(st.just("twice")),
    st.tuples(st.just("gram")),
    st.tuples(st.just("loop"), st.integers(1, 3)),
    st.tuples(st.just("slices"), st.sampled_from([2, 3])),
)
branch = st.lists(simple, min_size=1, max_size=3).map(tuple)
block = st.one_of(
    simple,
    st.tuples(st.just("residual"), branch, st.booleans()),
    st.tuples(st.just("concat"), branch, branch),
    st.tuples(st.just("gate"), branch),
    st.tuples(st.just("shared"), branch),
)
networks = st.lists(block, min_size=2, max_size=5).map(tuple)


class Net(nn.Module):
    """What a list of operations says; every width follows the arrays."""

    ops: tuple[Op, ...]

    @nn.compact
    def __call__(self, x):
        x = run(self.ops, nn.Conv(6, (3, 3), name="stem")(x), "")
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def run(ops: tuple[Op, ...], x: jax.Array, path: str) -> jax.Array:
    for number, op in enumerate(ops):
        x = OPS[op[0]](x, f"{path}{op[0]}{number}_", *op[1:])
    return x


def conv(x, name, features, size=3, **options):
    return nn.Conv(features, (size, size), name=f"{name}conv", **options)(x)


def grouped(x, name, groups, each):
    x = conv(x, f"{name}in", groups * 2, 1)
    return conv(x, name, groups * each, feature_group_count=groups)


def depthwise(x, name, multiplier):
    c = x.shape[-1]
    return conv(x, name, c * multiplier, feature_group_count=c)


def group_norm(x, name, groups):
    x = conv(x, name, groups * 3, 1)
    return nn.GroupNorm(groups, name=f"{name}norm")(x)


def shuffle(x, name, groups):
    x = conv(x, name, groups * 4, 1)
    *rest, c = x.shape
    return x.reshape(*rest, groups, c // groups).swapaxes(-1, -2).reshape(*rest, c)


def glu(x, name):
    a, b = jnp.split(conv(x, name, 8, 1), 2, -1)
    return a * nn.sigmoid(b)


def maxout(x, name):
    x = conv(x, name, 6, 1)
    return x.reshape(*x.shape[:-1], -1, 2).max(-1)


def space_to_depth(x, name):
    b, h, w, c = x.shape
    if h % 2:
        return x
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // 2, w // 2, 4 * c)


def depth_to_space(x, name):
    x = conv(x, name, 12, 1)
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return nn.max_pool(x.reshape(b, 2 * h, 2 * w, c // 4), (2, 2), (2, 2))


def attention(x, name, heads, width):
    b, h, w, c = x.shape
    y = x.reshape(b, h * w, c)
    att = nn.MultiHeadDotProductAttention(
        heads, qkv_features=heads * width, name=f"{name}attention"
    )
    return x + att(y, y).reshape(b, h, w, c)


def tokens(x, name, features):
    b, h, w, c = x.shape
    y = x.reshape(b, h * w, c).swapaxes(1, 2)
    y = nn.gelu(nn.Dense(features, name=f"{name}up")(y))
    y = nn.Dense(h * w, name=f"{name}down")(y).swapaxes(1, 2)
    return x + y.reshape(b, h, w, c)


def squeeze_excite(x, name, features):
    s = nn.relu(nn.Dense(features, name=f"{name}squeeze")(x.mean((1, 2))))
    s = nn.sigmoid(nn.Dense(x.shape[-1], name=f"{name}excite")(s))
    return x * s[:, None, None]


def statistics(x, name):
    stats = jnp.stack([x.mean(-1), x.max(-1)], -1)
    return x * nn.sigmoid(conv(stats, name, 1))


def twice(x, name):
    layer = nn.Conv(x.shape[-1], (3, 3), name=f"{name}conv")
    return layer(nn.tanh(layer(x)))


def gram(x, name):
    b, h, w, c = x.shape
    y = x.reshape(b, h * w, c)
    gram = jnp.einsum("bnc,bnd->bcd", y, y) / (h * w)
    return jnp.einsum("bnc,bcd->bnd", y, gram).reshape(b, h, w, c)


def loop(x, name, steps):
    scale = conv(x, name, x.shape[-1], 1)
    body = lambda k, v: jnp.tanh(v * scale) + 0.1 * v
    return jax.lax.fori_loop(0, steps, body, x)


def slices(x, name, parts):
    pieces = jnp.split(conv(x, name, 3 * parts, 1), parts, -1)
    out = pieces[0]
    for piece in pieces[1:]:
        out = out * nn.tanh(piece)
    return out


def residual(x, name, ops, project):
    y = run(ops, x, name)
    y = conv(y, f"{name}out", x.shape[-1], 1)
    x = conv(x, f"{name}project", x.shape[-1], 1) if project else x
    return x + jax.image.resize(y, x.shape, "nearest") if y.shape != x.shape else x + y


def concat(x, name, left, right):
    a, b = run(left, x, f"{name}l"), run(right, x, f"{name}r")
    h = min(a.shape[1], b.shape[1])
    return jnp.concatenate([a[:, :h, :h], b[:, :h, :h], x[:, :h, :h]], -1)


def gate(x, name, ops):
    y = run(ops, x, name).mean((1, 2))
    return x * nn.sigmoid(nn.Dense(x.shape[-1], name=f"{name}gate")(y))[:, None, None]


class Body(nn.Module):
    ops: tuple[Op, ...]
    features: int

    @nn.compact
    def __call__(self, x):
        y = run(self.ops, x, "").mean((1, 2), keepdims=True)
        return x + nn.Dense(x.shape[-1], name="out")(y)


def shared(x, name, ops):
    body = Body(ops, x.shape[-1], name=f"{name}body")
    return body(nn.tanh(body(x)))


OPS: dict[str, Any] = {
    "conv": conv,
    "grouped": grouped,
    "depthwise": depthwise,
    "dense": lambda x, n, f: nn.Dense(f, name=f"{n}dense")(x),
    "act": lambda x, n, kind: getattr(nn, kind)(x),
    "batch_norm": lambda x, n: nn.BatchNorm(True, name=f"{n}norm")(x),
    "layer_norm": lambda x, n: nn.LayerNorm(name=f"{n}norm")(x),
    "rms_norm": lambda x, n: nn.RMSNorm(name=f"{n}norm")(x),
    "group_norm": group_norm,
    "flip": lambda x, n: jnp.flip(x, -1),
    "roll": lambda x, n, k: jnp.roll(x, k, -1),
    "pad": lambda x, n, a, b: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (a, b))),
    "shuffle": shuffle,
    "glu": glu,
    "maxout": maxout,
    "transpose_conv": lambda x, n, f: nn.max_pool(
        nn.ConvTranspose(f, (2, 2), strides=(2, 2), name=f"{n}up")(x), (2, 2), (2, 2)
    ),
    "pool": lambda x, n: nn.avg_pool(x, (3, 3), (1, 1), "SAME"),
    "space_to_depth": space_to_depth,
    "depth_to_space": depth_to_space,
    "attention": attention,
    "tokens": tokens,
    "squeeze_excite": squeeze_excite,
    "statistics": statistics,
    "twice": twice,
    "gram": gram,
    "loop": loop,
    "slices": slices,
    "residual": residual,
    "concat": concat,
    "gate": gate,
    "shared": shared,
}


def prepare(ops: tuple[Op, ...]) -> tuple[Any, Any, jax.Array]:
    model, rng = Net(ops), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 4, 2)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key in ("var", "scale"):
            return jnp.asarray(0.5 + np.abs(noise))
        fan = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 4
        return jnp.asarray(noise / np.sqrt(fan))

    return model, jax.tree_util.tree_map_with_path(draw, shapes), x


def prove(ops: tuple[Op, ...], seed: int) -> jp.Slim:
    with jax.enable_x64(True):
        model, variables, x = prepare(ops)
        graph = jp.trace(model, variables, x)
        plan = random_plan(graph, seed)
        jp.verify(graph, plan, x, tolerance=1e-8)
        return jp.shrink(graph, plan)


COMMON = {
    "deadline": None,
    "phases": [Phase.explicit, Phase.generate],
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "database": None,
}


@settings(max_examples=25, **COMMON)
@given(networks, st.integers(0, 99))
def test_slim_equals_masked_on_random_networks(ops, seed):
    prove(ops, seed)


@pytest.mark.slow
@settings(max_examples=1000, **COMMON)
@given(networks, st.integers(0, 99))
def test_slim_equals_masked_on_a_thousand_random_networks(ops, seed):
    prove(ops, seed)
    if seed % 8 == 0:  # compiled programs of a thousand networks fill the memory
        jax.clear_caches()


def test_a_surgeon_who_slips_by_one_is_found_on_a_random_network(monkeypatch):
    ops = (("conv", 6, 3), ("residual", (("conv", 5, 1), ("act", "relu")), False))
    prove(ops, 1)
    right = slicing.take
    monkeypatch.setattr(
        slicing,
        "take",
        lambda leaf, keep: right(
            leaf, {a: np.where(k > 0, k - 1, k) for a, k in keep.items()}
        ),
    )
    with pytest.raises(EmissionError, match="differs from the masked original"):
        prove(ops, 1)
