"""Which module's number is to follow, where several of a class run."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp

X = jax.random.normal(jax.random.key(0), (5, 3))
WIDTHS = (3, 9, 7, 11, 2)


class Basis(nn.Module):
    """Kolmogorov-Arnold layers: one array with the widths of both sides."""

    n_in: int
    n_out: int

    def setup(self):
        shape = (self.n_out, self.n_in, 2)
        self.c = self.param("c", nn.initializers.normal(), shape)

    def __call__(self, x):
        basis = jnp.cos(jnp.arange(1, 3) * x[..., None]).reshape(len(x), -1)
        return basis @ self.c.reshape(self.n_out, -1).T


class Chain(nn.Module):
    layers: tuple[nn.Module, ...]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class NnxBasis(nnx.Module):
    def __init__(self, n_in, n_out, *, rngs):
        self.n_out = n_out
        self.c = nnx.Param(jax.random.normal(rngs(), (n_out, n_in, 2)) / 9)

    def __call__(self, x):
        basis = jnp.cos(jnp.arange(1, 3) * x[..., None]).reshape(len(x), -1)
        return basis @ self.c[...].reshape(self.n_out, -1).T


def _chain(linen):
    sides = list(itertools.pairwise(WIDTHS))
    if not linen:
        rngs = nnx.Rngs(0)
        return jp.trace(nnx.Sequential(*(NnxBasis(*s, rngs=rngs) for s in sides)), X)
    model = Chain(tuple(Basis(*s) for s in sides))
    return jp.trace(model, model.init(jax.random.key(1), X), X)


@pytest.mark.parametrize("linen", [True, False])
def test_numbers_of_every_layer_of_a_class_follow(linen):
    """Each layer's array has channels of the one before it, which lies as near."""
    graph = _chain(linen)
    assert len(graph.groups) == 3
    for group in graph.groups:
        slim = jp.shrink(graph, {group.name: np.arange(0, group.size, 2)})
        assert slim.report["left_whole"] == {}
        assert [row[1:] for row in slim.report["settings"]] == [
            ("n_out", -(-group.size // 2))
        ]
        assert jp.verify(graph, slim.plan, X) < 1e-6


class Stated(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        kernel = nn.initializers.lecun_normal()
        kernel = self.param("kernel", kernel, (x.shape[-1], self.features))
        y = (x @ kernel).reshape(-1, x.shape[1], self.features)
        return y + self.param("bias", nn.initializers.ones, (self.features,))


class Row(nn.Module):
    widths: tuple[int, ...] = (8, 8, 8)

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.relu(Stated(width)(x))
        return nn.Dense(3)(x.mean(1))


@pytest.mark.parametrize("widths", [(8, 8, 8), (8, 10, 12)])
def test_what_a_plan_gives_does_not_depend_on_those_before_it(widths):
    x, model = jnp.ones((4, 6, 2)), Row(widths)
    graph = jp.trace(model, model.init(jax.random.key(1), x), x)
    names = [group.name for group in graph.groups]
    for counts in ((4, 5, 6), (4, 4, 4), (4, 5, 6), (4, 3, 8)):
        slim = jp.shrink(graph, dict(zip(names, map(np.arange, counts), strict=True)))
        assert tuple(kept.size for kept in slim.plan.values()) == counts
        assert jp.verify(graph, slim.plan, x) < 1e-6


class Square(nn.Module):
    """Attention with as many heads as a head has channels, on a stated stream."""

    heads: int = 4

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        parts = jnp.split(nn.Dense(3 * width)(x), 3, axis=-1)
        q, k, v = (p.reshape(*x.shape[:2], self.heads, -1) for p in parts)
        q = q.reshape(*x.shape[:2], self.heads, width // self.heads)
        y = nn.dot_product_attention(q, k, v)
        return x + nn.Dense(width)(y.reshape(x.shape))


class Stream(nn.Module):
    width: int = 16

    @nn.compact
    def __call__(self, x):
        n, t, _ = x.shape
        y = nn.silu(nn.Dense(self.width)(x.reshape(n * t, -1)))
        x = nn.Dense(self.width)(y).reshape(n, t, self.width)
        x = Square()(nn.RMSNorm()(x))
        return nn.Dense(1)(nn.silu(nn.Dense(12)(x.reshape(n * t, self.width))))


@pytest.mark.parametrize("seed", range(3))
def test_the_plan_that_was_found_best_is_the_one_that_is_cut(seed):
    x = jax.random.normal(jax.random.key(0), (5, 5, 3))
    model, rng = Stream(), np.random.default_rng(seed)
    graph = jp.trace(model, model.init(jax.random.key(1), x), x)
    plan = {g.name: rng.permutation(g.size)[: -(-g.size // 2)] for g in graph.groups}
    first, second = jp.shrink(graph, plan), jp.shrink(graph, plan)
    assert first.report["left_whole"].keys() == second.report["left_whole"].keys()
    assert jp.verify(graph, first.plan, x) < 1e-5
