"""Ways in which public code bases write models, each once refused or in the way."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from zoo import half_plan, random_variables, tree_shapes

import jaxprune as jp
from jaxprune.errors import GraphError

X = jax.random.normal(jax.random.key(0), (8, 5, 4))
LABELS = jnp.arange(8) % 7


class ProjectedPositions(nn.Module):
    """DETR's queries, Perceiver's latents, SAVi's positions: a layer that reads them."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12, name="in")(x)
        positions = self.param("positions", nn.initializers.normal(1.0), (1, 5, 6))
        x = x + nn.Dense(12, name="project")(positions)
        return nn.Dense(7, name="head")(nn.relu(x).mean(1))


def test_learned_vectors_and_the_layer_that_reads_them_have_roles():
    graph = jp.trace(ProjectedPositions(), random_variables(ProjectedPositions(), X), X)
    group = graph.group("positions")
    assert group.size == 6
    assert {slot.path: slot.role for slot in group.slots} == {
        "params/positions": "producer",
        "params/project/kernel": "consumer",
    }
    (slot,) = (s for s in graph.group("in").slots if s.path == "params/project/kernel")
    assert slot.role == "producer"


@pytest.mark.parametrize(
    "method", ["cpli", "lasso", "l1", "fpgm", "lamp", "gate_gain", "taylor"]
)
def test_learned_vectors_are_pruned(method):
    model = ProjectedPositions()
    variables = random_variables(model, X)
    slim = jp.prune(model, variables, [(X, LABELS)], method=method, params=0.5)
    assert slim.report["achieved"]["params"] <= 0.5
    assert slim.report["verify_max_abs_error"] < 1e-5


def test_channels_that_no_kernel_has_are_ranked_by_what_they_have():
    class Gates(nn.Module):
        @nn.compact
        def __call__(self, x):
            one = self.param("one", nn.initializers.normal(1.0), (6,))
            two = self.param("two", nn.initializers.normal(1.0), (6,))
            return nn.Dense(3)(x) * (one * two).sum()

    variables = random_variables(Gates(), X)
    graph = jp.trace(Gates(), variables, X)
    found = jp.score(graph, variables, "l1")
    (values,) = found.values()
    expected = sum(jnp.abs(variables["params"][k]) for k in ("one", "two"))
    np.testing.assert_allclose(values, expected, rtol=1e-6)


class Flagged(nn.Module):
    """Flax's own idiom for flags: once, to the constructor or to the call."""

    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic=None):
        flag = nn.merge_param("deterministic", self.deterministic, deterministic)
        x = nn.Dropout(0.5)(nn.relu(nn.Dense(12)(x)), flag)
        return nn.Dense(7)(x)


@pytest.mark.parametrize("given", [True, None])
def test_a_flag_is_not_given_twice(given):
    model = Flagged(deterministic=given)
    variables = random_variables(Flagged(deterministic=True), X)
    graph = jp.trace(model, variables, X)
    assert jp.verify(graph, half_plan(graph), X) < 1e-5


def test_a_flag_that_the_call_demands_is_given():
    class Demanding(nn.Module):
        deterministic: bool = True

        @nn.compact
        def __call__(self, x, deterministic):
            x = nn.Dropout(0.5)(nn.relu(nn.Dense(12)(x)), deterministic)
            return nn.Dense(7)(x)

    variables = Demanding().init(jax.random.key(0), X, True)
    graph = jp.trace(Demanding(), variables, X)
    assert jp.verify(graph, half_plan(graph), X) < 1e-5


def test_a_flag_among_the_inputs_is_explained():
    variables = random_variables(Flagged(deterministic=True), X)
    with pytest.raises(GraphError, match="Python flag among the inputs"):
        jp.trace(Flagged(), variables, (X, True))
    found = jp.trace(
        Flagged(), variables, X, apply=lambda model, v, x: model.apply(v, x, True)
    )
    assert [group.size for group in found.groups] == [12]


def test_flags_by_name_alone_are_given():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, *inputs, train):
            x = nn.Dense(12)(sum(inputs))
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dense(7)(x)

    variables = Named().init(jax.random.key(0), X, X, train=False)
    graph = jp.trace(Named(), variables, (X, X))
    assert jp.verify(graph, half_plan(graph), (X, X)) < 1e-5


class Embedder(nn.Module):
    width: int

    def setup(self):
        self.table = self.param("table", nn.initializers.normal(), (11, self.width))

    def encode(self, tokens):
        return self.table[tokens]


class Jitted(nn.Module):
    """Gemma's transformer: a call under nn.jit, its parts made in setup."""

    heads: int = 4

    def setup(self):
        self.embedder, self.q, self.out = Embedder(8), nn.Dense(12), nn.Dense(3)

    @nn.jit
    def __call__(self, tokens):
        x = self.q(self.embedder.encode(tokens))
        x = x.reshape(*x.shape[:2], self.heads, -1)
        x = x / (1 + jnp.abs(x).sum(-1, keepdims=True))
        return self.out(x.reshape(*x.shape[:2], -1))


def test_a_jitted_call_with_parts_from_setup_follows():
    tokens = jnp.arange(6).reshape(2, 3)
    variables = random_variables(Jitted(), tokens)
    graph = jp.trace(Jitted(), variables, tokens)
    slim = jp.shrink(graph, {g.name: range(g.size // 2) for g in graph.groups})
    assert len(slim.report["left_whole"]) < len(graph.groups)
    assert ("", "heads", 2) in slim.report["settings"]
    assert jp.verify(graph, slim.plan, tokens) < 1e-5


class Limit(nn.Module):
    """Batch renormalisation as CrossQ has it: a variable that begins as a number."""

    @nn.compact
    def __call__(self, x):
        limit = self.variable("batch_stats", "limit", lambda value: value, 3)
        return nn.Dense(1)(nn.relu(nn.Dense(8)(x)) * limit.value)


def test_a_variable_may_begin_as_a_number_under_vmap():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes, split = {"params": 0, "batch_stats": 0}, {"params": True}
            kind = nn.vmap(Limit, axes, split_rngs=split, in_axes=None, axis_size=2)
            return kind()(x)

    variables = Two().init(jax.random.key(0), X)
    graph = jp.trace(Two(), variables, X)
    slim = jp.shrink(graph, half_plan(graph))
    made = slim.model.init(jax.random.key(0), X)
    assert tree_shapes(made) == tree_shapes(slim.variables)


def test_an_assertion_without_words_leaves_a_group_whole():
    class Asserted(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8)(x))
            if x.shape[-1] != 8:
                raise AssertionError  # which pytest gives words, if it is written so
            return nn.Dense(3)(x)

    variables = random_variables(Asserted(), X)
    slim = jp.shrink(jp.trace(Asserted(), variables, X), {"Dense_0": [0, 1]})
    (why,) = slim.report["left_whole"].values()
    assert re.search(r"AssertionError at test_idioms.py:\d+ \(raise Asser", why)


class Masked(nn.Module):
    """A recurrent step with resets: with one channel left nothing is broadcast."""

    @nn.compact
    def __call__(self, x, mask):
        x = nn.Dense(8)(x)
        x = jnp.where(mask[:, None], x, nn.tanh(nn.Dense(8)(x)))
        return nn.Dense(3)(x)


def test_prune_takes_what_fits_with_more_than_one_channel():
    inputs = X[:, 0], jnp.arange(8) % 2 == 0
    variables = Masked().init(jax.random.key(0), *inputs)
    slim = jp.prune(Masked(), variables, [(inputs, LABELS % 3)], method="l1", macs=0.5)
    assert slim.report["achieved"]["macs"] <= 0.5


class Einsum(nnx.Module):
    def __init__(self, equation, shape, *, rngs):
        self.equation, self.shape = equation, shape
        self.w = nnx.Param(nnx.initializers.normal()(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class KeyHeads(nnx.Module):
    """Gemma's attention in NNX: how many heads there are is read off a part."""

    def __init__(self, rngs):
        self.q = Einsum("btd,ndh->btnh", (8, 4, 6), rngs=rngs)
        self.kv = Einsum("btd,ndh->btnh", (4, 4, 6), rngs=rngs)
        self.out = Einsum("btnh,nhd->btd", (8, 6, 3), rngs=rngs)

    @property
    def heads(self):
        return self.kv.shape[0]

    def __call__(self, x):
        q, kv = self.q(x), self.kv(x)
        q = q.reshape(*q.shape[:2], self.heads, -1, q.shape[-1])
        scores = nnx.softmax(jnp.einsum("btkgh,bskh->btkgs", q, kv), -1)
        y = jnp.einsum("btkgs,bskh->btkgh", scores, kv)
        return self.out(y.reshape(*y.shape[:2], -1, y.shape[-1]))


def test_numbers_of_a_part_follow():
    graph = jp.trace(KeyHeads(nnx.Rngs(0)), X)
    (group,) = (g for g in graph.groups if g.size == 4)
    slim = jp.shrink(graph, {group.name: [0, 2]})
    assert slim.report["left_whole"] == {}
    assert slim.model.q.w.shape[0] == 4 and slim.model.kv.w.shape[0] == 2
    assert jp.verify(graph, slim.plan, X) < 1e-5


class Padded(nn.Module):
    """Causal video autoencoders repeat the first and the last frames."""

    mode: str

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = jnp.pad(x, ((0, 0), (2, 1), (0, 0)), mode=self.mode)
            x = nn.relu(nn.Conv(8, (3,), padding="VALID")(x))
        return nn.Dense(3)(x.mean(1))


@pytest.mark.parametrize("mode", ["edge", "mean", "maximum", "reflect", "wrap"])
@pytest.mark.parametrize("replay", [False, True])
def test_pads_of_no_width_leave_channels_alone(mode, replay):
    variables = random_variables(Padded(mode), X)
    graph = jp.trace(Padded(mode), variables, X, replay=replay)
    assert [group.size for group in graph.groups] == [8, 8]
    slim = jp.shrink(graph, half_plan(graph))
    assert slim.report["left_whole"] == {}
    assert jp.verify(graph, slim.plan, X) < 1e-6


def test_a_mask_over_heads_meets_the_one_head_that_is_left():
    class Causal(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = nn.make_causal_mask(x[..., 0])
            x = nn.MultiHeadDotProductAttention(2, name="attention")(x, mask=mask)
            return nn.Dense(3)(x)

    graph = jp.trace(Causal(), random_variables(Causal(), X), X)
    plan = {"attention/query": [1], "attention/value": [0]}
    slim = jp.shrink(graph, plan)
    assert not slim.report["left_whole"]
    assert jp.verify(graph, plan, X) < 1e-5


def test_weights_drawn_at_every_call_and_left_unused_follow():
    """StyleGAN2's layers draw their initial weights outside of the initialiser."""

    class Drawn(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x):
            shape = (x.shape[-1], self.features)
            drawn = jax.random.normal(jax.random.key(0), shape)
            return nn.relu(x @ self.param("w", lambda *_: drawn))

    model = nn.Sequential([Drawn(8), Drawn(8), nn.Dense(3)])
    graph = jp.trace(model, random_variables(model, X), X)
    plan = half_plan(graph, 0)
    slim = jp.shrink(graph, plan)
    assert not slim.report["left_whole"]
    assert jp.verify(graph, plan, X) < 1e-5


def test_nodes_beside_their_adjacency_are_proved_on_a_whole_graph():
    class Neighbours(nn.Module):
        @nn.compact
        def __call__(self, x, adjacency):
            x = nn.relu(adjacency @ nn.Dense(8)(x))
            return nn.Dense(3)(adjacency @ x)

    nodes = 12
    x, adjacency = jnp.ones((nodes, 4)), jnp.eye(nodes)
    model = Neighbours()
    variables = model.init(jax.random.key(0), x, adjacency)
    batches = [((x, adjacency), jnp.arange(nodes) % 3)]
    slim = jp.prune(model, variables, batches, method="l1", params=0.6)
    assert slim.report["achieved"]["params"] <= 0.6
    assert slim.report["verify_max_abs_error"] < 1e-5
