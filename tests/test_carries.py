"""Recurrent cells that are called without nn.RNN, and make their first carry."""

import concurrent.futures

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import randomise

import jaxprune as jp


class Heads(nn.RNNCellBase):
    """A cell of the user's, whose carry has the width that it states."""

    features: int
    heads: int = 2

    @nn.compact
    def __call__(self, carry, x):
        h = nn.Dense(self.features)(x).reshape(x.shape[0], self.heads, -1)
        h = h / (1 + jnp.abs(h).sum(-1, keepdims=True))
        carry = 0.9 * carry + h.reshape(x.shape[0], self.features)
        return carry, carry

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((input_shape[0], self.features))

    @property
    def num_feature_axes(self):
        return 1


class Looped(nn.Module):
    """A cell called step by step."""

    cell: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        cell = self.cell(10)
        carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
        for step in range(x.shape[1]):
            carry, y = cell(carry, x[:, step])
        return nn.Dense(3)(y)


class Scanned(nn.Module):
    """A cell lifted by nn.scan, which shares its arrays between the steps."""

    cell: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        lifted = nn.scan(
            self.cell, variable_broadcast="params", split_rngs={"params": False},
            in_axes=1, out_axes=1,
        )  # fmt: skip
        cell = lifted(10, name="cell")
        carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
        return nn.Dense(3)(cell(carry, nn.Dense(7)(x))[1])


class Convolved(nn.Module):
    @nn.compact
    def __call__(self, x):
        cell = nn.ConvLSTMCell(6, (3, 3))
        carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
        for step in range(x.shape[1]):
            carry, y = cell(carry, x[:, step])
        return nn.Dense(3)(y.mean((1, 2)))


class Wrapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(Heads(12))(x))


DENSE = (
    nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.MGUCell, nn.SimpleCell, Heads,
)  # fmt: skip
CELLS = (*DENSE, nn.ConvLSTMCell)
MODELS = [
    *((f"looped {cell.__name__}", Looped(cell), (2, 4, 5)) for cell in DENSE),
    *((f"scanned {cell.__name__}", Scanned(cell), (2, 4, 5)) for cell in DENSE),
    ("convolved", Convolved(), (2, 3, 5, 5, 2)),
    ("in Flax's RNN", Wrapped(), (2, 4, 5)),
]


@pytest.mark.parametrize(
    ("model", "shape"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS]
)
def test_the_carry_follows_the_cell(model, shape):
    own = [cell.initialize_carry for cell in CELLS]
    x = jax.random.normal(jax.random.key(1), shape)
    variables = randomise(model.init(jax.random.key(0), x))
    graph = jp.trace(model, variables, x)
    plan = graph.complete({g.name: np.arange(1, g.size, 2) for g in graph.groups})
    slim = jp.shrink(graph, plan)
    assert slim.report["left_whole"] == {}
    assert jp.verify(graph, plan, x) < 1e-5
    shapes = jax.eval_shape(slim.model.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, slim.variables) == jax.tree.map(
        lambda leaf: leaf.shape, shapes
    )
    assert [cell.initialize_carry for cell in CELLS] == own


def test_models_in_several_threads_keep_their_widths():
    x = jnp.ones((2, 4, 5))
    model = Looped(nn.GRUCell)
    variables = model.init(jax.random.key(0), x)
    graph = jp.trace(model, variables, x)
    (group,) = graph.groups
    slims = [jp.shrink(graph, {group.name: np.arange(k)}) for k in (3, 5, 8)]
    models = [(model, variables), *((slim.model, slim.variables) for slim in slims)]
    expected = [m.apply(v, x) for m, v in models]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda m: m[0].apply(m[1], x), 5 * models))
    for y, wanted in zip(found, 5 * expected, strict=True):
        np.testing.assert_allclose(y, wanted, rtol=1e-6)


class Begun(nn.Module):
    """memax: a method outside of Flax's scopes makes a cell to ask for its carry."""

    width: int

    def setup(self):
        self.inner = nn.Dense(self.width)
        self.gate = nn.Dense(self.width)
        self.outer = nn.Dense(3)

    def __call__(self, carry, xs):
        for x in xs:
            both = jnp.concatenate([carry, self.inner(x)], -1)
            carry = carry + jnp.tanh(self.gate(both))
        return self.outer(carry)

    @nn.nowrap
    def begin(self):
        return Begun(width=self.width).zeros()

    @nn.nowrap
    def zeros(self):
        return jnp.zeros(self.width)


def test_a_carry_that_a_method_outside_of_scopes_makes_follows():
    xs, model = jax.random.normal(jax.random.key(0), (5, 4)), Begun(8)
    variables = model.init(jax.random.key(1), model.begin(), xs)

    def apply(model, variables, xs):
        return model.apply(variables, model.begin(), xs)

    graph = jp.trace(model, variables, xs, apply=apply)
    plan = {group.name: np.arange(0, group.size, 2) for group in graph.groups}
    slim = jp.shrink(graph, plan)
    assert slim.report["left_whole"] == {}
    assert slim.model.begin().shape == (4,)
    assert jp.verify(graph, plan, xs) < 1e-6
