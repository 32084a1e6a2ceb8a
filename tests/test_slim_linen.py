"""How slim Linen modules are used: alone, within others, as the user's own module was."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import random_variables

import jaxprune as jp
from jaxprune import trees


class _Attends(nn.Module):
    heads: int = 4
    doubled: bool = False
    body: nn.Module | None = None

    def setup(self):
        self.q, self.k, self.v = nn.Dense(16), nn.Dense(16), nn.Dense(16)
        self.norm, self.out = nn.GroupNorm(4), nn.Dense(12)

    def encode(self, x):
        x = x if self.body is None else self.body(x)
        q, k, v = (
            layer(x).reshape(*x.shape[:2], self.heads, -1)
            for layer in (self.q, self.k, self.v)
        )
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], -1)

    def __call__(self, x):
        y = self.out(self.norm(self.encode(x)))
        return 2 * y if self.doubled else y

    @property
    def pairs(self):
        return self.heads // 2


@pytest.fixture(scope="module")
def attends():
    model, x = _Attends(), jax.random.normal(jax.random.key(1), (2, 5, 6))
    graph = jp.trace(model, random_variables(model, x), x)
    return jp.shrink(graph, {g.name: np.arange(g.size // 2) for g in graph.groups}), x


def test_a_slim_module_may_be_part_of_another(attends):
    slim, x = attends
    assert {row[1] for row in slim.report["settings"]} >= {"heads", "num_groups"}
    expected = slim.model.apply(slim.variables, x)

    class Tower(nn.Module):
        backbone: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(self.backbone(x))

    for whole, place in (
        (nn.Sequential([slim.model, lambda x: x]), "layers_0"),
        (Tower(slim.model), "backbone"),
    ):
        variables = whole.init(jax.random.key(0), x)
        shapes = [
            {name: leaf.shape for name, leaf in trees.flatten(tree).items()}
            for tree in (variables["params"][place], slim.variables["params"])
        ]
        assert shapes[0] == shapes[1]
        held = {**variables["params"], place: slim.variables["params"]}
        found = whole.apply({"params": held}, x)
        if place == "layers_0":
            np.testing.assert_allclose(found, expected, atol=1e-6)
    # A second round, of the larger module: its numbers win.
    graph = jp.trace(whole, {"params": held}, x)
    heads = next(g for g in graph.groups if g.name == "backbone/q")
    again = jp.shrink(graph, {heads.name: [1]})
    assert again.report["left_whole"] == {} and heads.size == 2
    assert jp.verify(graph, {heads.name: [1]}, x) < 1e-5


class _Scaled(nn.Module):
    by: int = 2

    def __call__(self, x):
        return x * self.by


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = _Attends(name="attends")(x)
        return nn.Dense(3, name="out")(_Scaled(name="no_arrays")(x))


@pytest.mark.parametrize("around", [False, True])
def test_numbers_follow_whatever_calls_the_module(around):
    """As the wrapper classes of transformers do, or as part of another module."""
    model, x = _Block(), jax.random.normal(jax.random.key(1), (2, 5, 6))

    class Around(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.inner(x)

    def call(model, variables, x):
        if around:
            return Around(model).apply({"params": {"inner": variables["params"]}}, x)
        return model.apply({"params": variables["params"]}, x)

    variables = random_variables(model, x)
    graph = jp.trace(model, variables, x, apply=call)
    plan = {g.name: np.arange(g.size // 2) for g in graph.groups}
    slim = jp.shrink(graph, plan)
    assert slim.report["left_whole"] == {}
    assert ("attends", "heads", 2) in slim.report["settings"]
    found = slim.model.apply(slim.variables, x)
    np.testing.assert_allclose(found, call(slim.model, slim.variables, x), atol=1e-6)
    assert jp.verify(graph, plan, x) < 1e-5


def test_a_slim_module_may_be_applied_within_a_call_of_another(attends):
    """A program of its own, whose paths are the other's by chance."""
    slim, x = attends

    class Student(nn.Module):
        heads: int = 4

        @nn.compact
        def __call__(self, x):
            h = nn.Dense(16, name="q")(x).reshape(*x.shape[:2], self.heads, -1)
            h = jnp.einsum("bqhd,bkhd->bhqk", h, h).sum(1) @ x
            return nn.Dense(3, name="out")(h), slim.model.apply(slim.variables, x)

    model = Student()
    graph = jp.trace(model, random_variables(model, x), x)
    heads = next(g for g in graph.groups if g.size == 4 and g.name == "q")
    student = jp.shrink(graph, {heads.name: [1]})
    assert student.report["settings"] == (("", "heads", 1),)
    _, found = student.model.apply(student.variables, x)
    np.testing.assert_allclose(found, slim.model.apply(slim.variables, x), atol=1e-6)


def test_a_slim_module_is_used_as_the_users_was(attends):
    slim, x = attends
    model, variables = slim.model, slim.variables
    encoded = model.apply(variables, x, method="encode")
    for method in (_Attends.encode, _Attends().encode, model.encode):
        np.testing.assert_array_equal(model.apply(variables, x, method=method), encoded)
    made = model.init(jax.random.key(0), x, method=_Attends.encode)
    assert made["params"]["q"]["kernel"].shape == (6, encoded.shape[-1])
    once = model.apply(variables, x, method=_Attends.__call__)
    for twice in (model.clone(doubled=True), model.copy(doubled=True)):
        np.testing.assert_allclose(twice.apply(variables, x), 2 * once, rtol=1e-6)
        assert twice.doubled and not model.doubled
    assert (model.heads, model.pairs, model.body) == (2, 1, None)
    around = model.clone(body=nn.Dense(6))
    with pytest.raises(AttributeError, match="module of the original"):
        around.body  # noqa: B018


class _Scoped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(self.head(self.block(x, 10)))

    @nn.compact_name_scope
    def block(self, x, width):
        return nn.relu(nn.Dense(width)(x))

    @nn.compact_name_scope
    def head(self, x):
        return nn.relu(nn.Dense(8)(x))


class _Twice(nn.Module):
    part: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.part(x) + self.part(2 * x)


def test_methods_with_a_name_scope_of_their_own_are_of_the_slim_module():
    model, x = _Scoped(), jax.random.normal(jax.random.key(1), (4, 6))
    variables = random_variables(model, x)
    graph = jp.trace(model, variables, x)
    assert [g.name for g in graph.groups] == ["block/Dense_0", "head/Dense_0"]
    slim = jp.shrink(graph, {"block/Dense_0": [1, 4, 7], "head/Dense_0": [0, 2]})
    assert slim.report["left_whole"] == {}
    assert jp.verify(graph, slim.plan, x) < 1e-6
    made = slim.model.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, slim.variables)
    around, parts = _Twice(slim.model), {"part": slim.variables["params"]}
    assert trees.flatten(around.init(jax.random.key(0), x)).keys() == {
        f"params/{path}" for path in trees.flatten(parts)
    }
    found = slim.model.apply(slim.variables, x) + slim.model.apply(
        slim.variables, 2 * x
    )
    np.testing.assert_allclose(around.apply({"params": parts}, x), found, rtol=1e-6)
