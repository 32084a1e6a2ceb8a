"""Every layer of flax.linen that holds arrays, through the interceptor."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import half_plan, random_variables, tree_shapes

import jaxprune as jp
from jaxprune.graph import interpret

SEQUENCE, IMAGE, VOLUME = (2, 6, 5), (2, 6, 6, 5), (2, 4, 4, 4, 5)


class _Between(nn.Module):
    """A layer between two others, so that both of its sides can shrink."""

    make: Callable[[], nn.Module]
    call: Callable[..., Any] | None = None
    width: int = 8

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.tanh(nn.Dense(self.width, name="before")(x))
        layer = self.make()
        x = layer(x) if self.call is None else self.call(layer, x)
        return nn.DenseGeneral(3, axis=tuple(range(2, x.ndim)), name="after")(x)


def _bidirectional():
    return nn.Bidirectional(nn.RNN(nn.LSTMCell(6)), nn.RNN(nn.GRUCell(7)))


class _Block(nn.Module):
    """A layer of a scanned stack."""

    width: int = 8

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        y = nn.gelu(nn.Dense(12, name="up")(y))
        return x + nn.Dense(self.width, name="down")(y), None


def _scanned(remat):
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nn.remat(_Block) if remat else _Block
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return stack()(x, None)[0]

    return Stack


class _Experts(nn.Module):
    """Stacked layers on the same input, in parallel."""

    @nn.compact
    def __call__(self, x):
        layers = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=0,
            axis_size=3,
        )
        return layers(7)(x).sum(0)


class _Setup(nn.Module):
    """Submodules made in setup, one of them used twice, one in a list."""

    def setup(self):
        self.first = nn.Dense(12)
        self.twice = nn.Dense(12)
        self.rest = [nn.Dense(10), nn.Dense(9)]

    def __call__(self, x):
        x = self.twice(nn.relu(self.twice(nn.relu(self.first(x)))))
        for layer in self.rest:
            x = nn.relu(layer(x))
        return x


class _Shared(nn.Module):
    """A module that runs its inner one in its own scope."""

    inner: nn.Module

    def setup(self):
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(x) * 2


class _Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(9)(nn.relu(nn.Dense(7)(x)))


class _Gain(nn.Module):
    """Parameters of the user's own: by the input's shape, and a literal one."""

    literal: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12)(x)
        shape = (12,) if self.literal else x.shape[-1:]
        x = x * self.param("gain", nn.initializers.ones, shape)
        moved = self.variable("stats", "seen", jnp.zeros, shape)
        return nn.relu(x + moved.value)


ATTENTION = nn.MultiHeadDotProductAttention
LAYERS = {
    "dense": (lambda: nn.Dense(9), SEQUENCE),
    "dense_general": (lambda: nn.DenseGeneral((3, 4)), SEQUENCE),
    "dense_general_axes": (lambda: nn.DenseGeneral(9, axis=(-2, -1)), IMAGE),
    "dense_general_batch": (
        lambda: nn.DenseGeneral(9, axis=-1, batch_dims=0),
        SEQUENCE,
    ),
    "einsum": (lambda: nn.Einsum((8, 3, 4), "bti,iho->btho"), SEQUENCE),
    "embed_attend": (
        lambda: nn.Embed(11, 8),
        SEQUENCE,
        lambda layer, x: layer.attend(x + layer(jnp.arange(6))),
    ),
    "conv1d": (lambda: nn.Conv(9, 3), SEQUENCE),
    "conv2d": (lambda: nn.Conv(9, (3, 3), padding="CIRCULAR"), IMAGE),
    "conv3d": (lambda: nn.Conv(9, (3, 3, 3), strides=2), VOLUME),
    "conv_grouped": (lambda: nn.Conv(12, (3, 3), feature_group_count=4), IMAGE),
    "conv_depthwise": (lambda: nn.Conv(16, (3, 3), feature_group_count=8), IMAGE),
    "conv_local": (lambda: nn.ConvLocal(9, (3, 3)), IMAGE),
    "conv_transpose": (lambda: nn.ConvTranspose(9, (3, 3), (2, 2)), IMAGE),
    "conv_transpose_t": (
        lambda: nn.ConvTranspose(9, (3, 3), (2, 2), transpose_kernel=True),
        IMAGE,
    ),
    "batch_norm": (lambda: nn.BatchNorm(use_running_average=True), SEQUENCE),
    "layer_norm": (lambda: nn.LayerNorm(), SEQUENCE),
    "rms_norm": (lambda: nn.RMSNorm(), SEQUENCE),
    "group_norm": (lambda: nn.GroupNorm(4), IMAGE),
    "group_norm_size": (lambda: nn.GroupNorm(None, group_size=2), IMAGE),
    "instance_norm": (lambda: nn.InstanceNorm(), IMAGE),
    "weight_norm": (lambda: nn.WeightNorm(nn.Dense(9)), SEQUENCE),
    "spectral_norm": (
        lambda: nn.SpectralNorm(nn.Conv(9, 3)),
        SEQUENCE,
        lambda layer, x: layer(x, update_stats=False),
    ),
    "prelu": (lambda: nn.PReLU(), SEQUENCE),
    "attention": (lambda: ATTENTION(4, qkv_features=24, normalize_qk=True), SEQUENCE),
    "attention_cross": (
        lambda: ATTENTION(4, qkv_features=24, out_features=10),
        SEQUENCE,
        lambda layer, x: layer(x, x[:, ::-1]),
    ),
    "attention_dropout": (
        lambda: ATTENTION(4, dropout_rate=0.1, deterministic=True),
        SEQUENCE,
    ),
    "lstm": (lambda: nn.RNN(nn.LSTMCell(7)), SEQUENCE),
    "lstm_optimized": (lambda: nn.RNN(nn.OptimizedLSTMCell(7)), SEQUENCE),
    "gru": (lambda: nn.RNN(nn.GRUCell(7)), SEQUENCE),
    "mgu": (lambda: nn.RNN(nn.MGUCell(7)), SEQUENCE),
    "simple_cell": (lambda: nn.RNN(nn.SimpleCell(7)), SEQUENCE),
    "conv_lstm": (lambda: nn.RNN(nn.ConvLSTMCell(7, (3, 3))), (2, 3, 4, 4, 5)),
    "bidirectional": (_bidirectional, SEQUENCE),
    "scanned": (lambda: _scanned(False)(), SEQUENCE),
    "scanned_remat": (lambda: _scanned(True)(), SEQUENCE),
    "vmapped": (lambda: _Experts(), SEQUENCE),
    "setup": (lambda: _Setup(), SEQUENCE),
    "share_scope": (lambda: _Shared(_Inner()), SEQUENCE),
    "own_parameters": (lambda: _Gain(), SEQUENCE),
    "literal_parameters": (lambda: _Gain(literal=True), SEQUENCE),
    "sequential": (lambda: nn.Sequential([nn.Dense(9), nn.relu, nn.Dense(7)]), SEQUENCE),
}  # fmt: skip


def _make(name):
    make, shape, *call = LAYERS[name]
    model = _Between(make, *call)
    x = jax.random.normal(jax.random.key(1), shape)
    return model, random_variables(model, x), x


# Widths that the source states to a transformation: groups that stay whole.
WHOLE = {"vmapped": {"_Experts_0/VmapDense_0"}}


@pytest.mark.parametrize("name", list(LAYERS))
def test_every_layer_follows_its_arrays(name):
    model, variables, x = _make(name)
    graph = jp.trace(model, variables, x)
    plan = half_plan(graph)
    slim = jp.shrink(graph, plan)
    assert len(graph.groups) >= 1
    assert set(slim.report["left_whole"]) == WHOLE.get(name, set())
    assert jp.verify(graph, plan, x) < 1e-5
    fresh = jax.eval_shape(slim.model.init, jax.random.key(0), x)
    assert tree_shapes(fresh) == tree_shapes(slim.variables)


class _Unscaled(nn.Module):
    """A GroupNorm that holds no array, below a remat."""

    @nn.compact
    def __call__(self, x):
        return nn.GroupNorm(4, use_bias=False, use_scale=False)(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.GroupNorm(4, use_bias=False, use_scale=False),
        lambda: nn.GroupNorm(None, group_size=2, use_bias=False, use_scale=False),
        _Unscaled,
        nn.remat(_Unscaled),
    ],
)
def test_groups_of_a_norm_without_arrays_follow(make, tmp_path):
    model = _Between(make)
    x = jax.random.normal(jax.random.key(1), IMAGE)
    variables = random_variables(model, x)
    graph = jp.trace(model, variables, x)
    assert {g.name: g.size for g in graph.groups} == {"before": 4, "before.1": 2}
    for plan in (
        {"before": [1, 3]},
        {"before.1": [0]},
        {"before": [2], "before.1": [1]},
    ):
        slim = jp.shrink(graph, plan)
        assert slim.report["left_whole"] == {}
        assert jp.verify(graph, plan, x) < 1e-5
    jp.save(tmp_path / "slim", slim)
    loaded = jp.load(tmp_path / "slim", model)
    np.testing.assert_array_equal(
        loaded.model.apply(loaded.variables, x), slim.model.apply(slim.variables, x)
    )


def test_a_width_that_no_array_tells_is_left_whole(monkeypatch):
    monkeypatch.setattr(interpret, "scope_of", lambda eqn: "")  # as without Linen
    model = _Between(lambda: nn.GroupNorm(4, use_bias=False, use_scale=False))
    x = jax.random.normal(jax.random.key(1), IMAGE)
    variables = random_variables(model, x)
    graph = jp.trace(model, variables, x)
    assert {g.name: g.size for g in graph.groups} == {"before": 4, "before.1": 2}
    slim = jp.shrink(graph, {"before": [1, 3], "before.1": [0]})
    assert list(slim.report["left_whole"]) == ["before"]
    assert "did not follow" in slim.report["left_whole"]["before"]
    assert jp.verify(graph, slim.plan, x) < 1e-5
