"""Numbers that modules state follow the plan: heads and widths of others' attention."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import jaxprune as jp
from jaxprune.errors import GraphError
from jaxprune.frameworks.stated import numbers_of, with_number
from jaxprune.running import names_read

X = jax.random.normal(jax.random.key(0), (2, 5, 12))


def _attend(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)


@dataclasses.dataclass(frozen=True)
class Config:
    """As code bases write them: one object for all layers."""

    width: int = 12
    heads: int = 4
    layers: int = 2

    @property
    def head_width(self):
        return self.width // self.heads


class SetupAttention(nn.Module):
    """The width of a head is computed in setup, as in transformers."""

    config: Any

    def setup(self):
        self.head_width = self.config.width // self.config.heads
        self.q, self.k, self.v, self.out = (nn.Dense(self.config.width) for _ in "qkvo")

    def split(self, x):
        return x.reshape(*x.shape[:2], self.config.heads, self.head_width)

    def __call__(self, x):
        y = _attend(*(self.split(layer(x)) for layer in (self.q, self.k, self.v)))
        return self.out(y.reshape(*x.shape[:2], self.config.width))


class CompactAttention(nn.Module):
    """Widths are fields; one projection for all three."""

    dim: int = 12
    heads: int = 4

    @nn.compact
    def __call__(self, x):
        width = self.dim // self.heads
        qkv = nn.Dense(3 * self.dim)(x).reshape(*x.shape[:2], 3, self.heads, width)
        y = _attend(*jnp.moveaxis(qkv, 2, 0))
        return nn.Dense(12)(y.reshape(*x.shape[:2], self.heads * width))


class Stack(nn.Module):
    config: Any = Config()
    kind: Any = SetupAttention

    @nn.compact
    def __call__(self, x):
        for _ in range(self.config.layers):
            layer = (
                SetupAttention(self.config)
                if self.kind is SetupAttention
                else self.kind()
            )
            x = x + layer(nn.LayerNorm()(x))
        return nn.Dense(3)(x)


def _traced(model, x=X):
    graph = jp.trace(model, model.init(jax.random.key(1), x), x)
    return graph, {g.name: [*range(1, g.size // 2 + 1)] for g in graph.groups}


@pytest.mark.parametrize(
    "config", [Config(), ml_collections.ConfigDict(vars(Config()))]
)
@pytest.mark.parametrize("kind", [SetupAttention, CompactAttention])
def test_heads_and_their_widths_follow_in_linen(kind, config, tmp_path):
    model = Stack(config, kind)
    graph, plan = _traced(model)
    assert {g.size for g in graph.groups} == {4, 3}
    slim = jp.shrink(graph, plan)
    assert slim.report["left_whole"] == {}
    assert jp.verify(graph, slim.plan, X[:1]) < 1e-5
    made = slim.model.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, slim.variables)
    jp.save(tmp_path / "slim", slim)
    again = jp.load(tmp_path / "slim", model)
    expected = slim.model.apply(slim.variables, X)
    np.testing.assert_array_equal(again.model.apply(again.variables, X), expected)
    # A second round starts from the numbers of the first.
    second = jp.trace(slim.model, slim.variables, X)
    one = {g.name: [0] for g in second.groups}
    assert jp.shrink(second, one).report["left_whole"] == {}
    assert jp.verify(second, one, X) < 1e-5
    assert (config.width, config.heads) == (12, 4)  # the user's own is as it was


class NnxAttention(nnx.Module):
    def __init__(self, config, rngs):
        self.config, self._heads = config, config["heads"]
        self.qkv = nnx.Linear(12, 3 * config["dim"], rngs=rngs)
        self.out = nnx.Linear(config["dim"], 12, rngs=rngs)

    def __call__(self, x):
        width = self.config["dim"] // self._heads
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self._heads, width)
        y = _attend(*jnp.moveaxis(qkv, 2, 0))
        return x + self.out(y.reshape(*x.shape[:2], self.config["dim"]))


class NnxStack(nnx.Module):
    def __init__(self, config, rngs):
        self.layers = nnx.List([NnxAttention(config, rngs) for _ in range(3)])
        self.head = nnx.Linear(12, 2, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("wrapped", [dict, FrozenDict])
def test_only_modules_that_shrink_follow_and_the_users_object_stays(wrapped):
    config = wrapped({"heads": 4, "dim": 12})
    model = NnxStack(config, nnx.Rngs(0))
    graph = jp.trace(model, X)
    assert [g.size for g in graph.groups] == [4, 3] * 3
    middle = {g.name: [2] for g in graph.groups if "layers/1/" in g.name}
    slim = jp.shrink(graph, middle)
    assert slim.report["left_whole"] == {} and len(middle) == 2
    assert {path for path, *_ in slim.report["settings"]} == {"layers/1"}
    assert jp.verify(graph, middle, X) < 1e-5
    assert slim.model.layers[1]._heads == slim.model.layers[1].config["dim"] == 1
    assert slim.model.layers[0].config["dim"] == model.layers[1].config["dim"] == 12
    # Layers that shrink unlike each other.
    sizes = {"0": ([1, 2], [0, 2]), "1": ([3], [1]), "2": ([0, 1, 3], [0, 1])}
    plan = {g.name: sizes[g.name.split("/")[1]][g.size == 3] for g in graph.groups}
    assert jp.shrink(graph, plan).report["left_whole"] == {}
    assert jp.verify(graph, plan, X) < 1e-5


def test_one_number_for_two_widths_follows_only_where_they_are_equal():
    graph, _ = _traced(Stack(Config(layers=1)))
    heads, keys, values = (g.name for g in graph.groups)
    slim = jp.shrink(graph, {heads: [1, 2], keys: [0, 2], values: [1]})
    assert sorted(slim.report["left_whole"]) == [keys, values]
    assert slim.plan[heads].size == 2  # a number of its own
    assert jp.verify(graph, slim.plan, X) < 1e-5
    assert not jp.shrink(graph, {keys: [0, 2], values: [0, 1]}).report["left_whole"]
    tied = jp.trace(graph.handle.model, graph.variables, X, tied=[(keys, values)])
    assert [g.name for g in tied.groups] == [heads, keys]
    slots = {slot.path.split("/")[2] for slot in tied.groups[1].slots}
    assert slots == {"q", "k", "v", "out"}
    assert jp.verify(tied, {keys: [0, 2]}, X) < 1e-5
    for names, said in (
        ((keys, "none"), "names no group"),
        ((heads, keys), "one size"),
        (keys, "sets of group names"),
        (3, "sets of group names"),
    ):
        with pytest.raises(GraphError, match=said):
            jp.trace(graph.handle.model, graph.variables, X, tied=[names])


def _loss(logits, labels):
    chosen = jnp.take_along_axis(nn.log_softmax(logits), labels[..., None], -1)
    return -chosen.mean((1, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "cpli", "macs": 0.7},
        {"method": "l1", "params": 0.7, "strategy": "global"},
        {"method": "l2", "macs": 0.7, "finetune": lambda model, variables: variables},
        {"method": "l2", "macs": 0.6, "schedule": "linear", "steps": 2},
    ],
)
def test_prune_keeps_widths_equal_that_one_number_states(options):
    model = Stack()
    variables = model.init(jax.random.key(1), X)
    labels = jax.random.randint(jax.random.key(2), X.shape[:2], 0, 3)
    slim = jp.prune(model, variables, [(X, labels)], loss_fn=_loss, **options)
    assert slim.report["left_whole"] == {}
    assert slim.report["verify_max_abs_error"] < 1e-5
    kind = "params" if "params" in options else "macs"
    assert slim.report["achieved"][kind] <= options[kind]
    for layer in (0, 1):
        keys, values = (slim.plan[f"SetupAttention_{layer}/{n}"] for n in ("q.1", "v"))
        np.testing.assert_array_equal(keys, values)
    # By the groups of a graph without ties.
    graph = jp.trace(model, variables, X)
    moments = jp.shrink_like(graph, slim.plan, variables)
    assert jax.tree.map(jnp.shape, moments) == jax.tree.map(jnp.shape, slim.variables)


class Widths(NamedTuple):
    hidden: list
    channels: int


class Table(nn.Module):
    """Numbers in lists and properties; one that is read has nothing to do with it."""

    widths: Any = dataclasses.field(default_factory=lambda: Widths([6, 8], 2))
    seed: int = 8

    @functools.cached_property
    def first(self):
        return self.out

    @property
    def out(self):
        return self.widths.hidden[1]

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="first")(x)
        x = x + jax.random.normal(jax.random.key(self.seed), (1,))
        x = x.reshape(-1, self.first)
        return nn.Dense(self.widths.channels)(x)


def test_numbers_in_tuples_and_properties_follow_and_no_other_does():
    graph, plan = _traced(Table())
    slim = jp.shrink(graph, plan)
    assert slim.report["left_whole"] == {}
    assert slim.report["settings"] == (("", "widths.hidden.1", 4),)
    assert jp.verify(graph, plan, X) < 1e-5


class Rows(nn.Module):
    width: int = 8
    folded: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        return x.reshape(-1, self.width) if self.folded else x


class TwoKinds(nn.Module):
    """Of two modules of one class only the first reads its number where it runs."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(2)(Rows(name="folded")(x)).reshape(*x.shape[:2], 2)
        return y + nn.Dense(2)(nn.relu(Rows(folded=False, name="plain")(x)))


def test_a_module_that_stays_as_it_was_keeps_its_numbers():
    graph, _ = _traced(TwoKinds())
    (group,) = (g for g in graph.groups if "folded" in g.name)
    slim = jp.shrink(graph, {group.name: [0, 3, 5]})
    assert slim.report["left_whole"] == {}
    assert slim.report["settings"] == (("folded", "width", 3),)


class Basis(nnx.Module):
    """As networks of Legendre polynomials: the width is read before any array is."""

    def __init__(self, width, features, *, rngs):
        self.width, self.features = width, features
        self.weights = nnx.Param(rngs.params.normal((features, width, 3)))

    def __call__(self, x):
        basis = jnp.ones((x.shape[0], self.width, 3)).at[:, :, 1].set(jnp.tanh(x))
        flat = self.weights[...].reshape(self.features, -1)
        return basis.reshape(x.shape[0], -1) @ flat.T


def test_a_width_follows_where_merged_axes_tie_it_to_the_layer_before():
    layers = [Basis(12, 10, rngs=nnx.Rngs(0)), Basis(10, 8, rngs=nnx.Rngs(1))]
    model = nnx.Sequential(*layers, nnx.Linear(8, 3, rngs=nnx.Rngs(2)))
    x = X[:, 0]
    graph = jp.trace(model, x)
    (group,) = [g for g in graph.groups if g.size == 10]
    slim = jp.shrink(graph, {group.name: np.arange(5)})
    assert slim.report["left_whole"] == {}
    assert {row[1:] for row in slim.report["settings"]} == {
        ("features", 5),
        ("width", 5),
    }
    assert jp.verify(graph, slim.plan, x) < 1e-5


class Stacked(nn.Module):
    """A width in its code, next to a number that is another's."""

    parts: int = 4

    @nn.compact
    def __call__(self, x):
        weights = self.param("weights", nn.initializers.ones, (self.parts, 12, 8))
        total = jnp.zeros((x.shape[0], 8))
        for part in weights:
            total = total + x @ part
        return nn.Dense(3)(nn.relu(total))


def test_the_reason_is_what_differs_not_what_a_wrong_number_raised():
    model, x = Stacked(), X[:, 0]
    graph = jp.trace(model, model.init(jax.random.key(0), x), x)
    slim = jp.shrink(graph, {"weights": [0, 2, 3, 7]})
    assert list(slim.report["left_whole"]) == ["weights"]
    reason = slim.report["left_whole"]["weights"]
    assert "expected shape (2, 4), found (2, 8)" in reason
    assert "initializer" not in reason


def test_numbers_are_found_and_changed_without_touching_the_original():
    @dataclasses.dataclass
    class Settings:
        sizes: tuple = (4, (5, 6))
        flag: bool = True
        scale: float = 2.0
        nested: Any = dataclasses.field(default_factory=lambda: {"a": {"b": 7}, 3: 9})
        call: Any = np.sum
        array: Any = dataclasses.field(default_factory=lambda: np.arange(3))

    class Module:
        pass

    module = Module()
    module.config, module.name, module.k = Settings(), 5, np.int64(3)
    found = numbers_of(module)
    sizes = {"config.sizes.0": 4, "config.sizes.1.0": 5, "config.sizes.1.1": 6}
    assert found == {**sizes, "config.nested.a.b": 7, "k": 3}
    new = with_number(module.config, "sizes.0", 2)
    assert new.sizes == (2, (5, 6)) and module.config.sizes == (4, (5, 6))
    assert with_number({"a": {"b": 7}}, "a.b", 3) == {"a": {"b": 3}}
    assert with_number(Widths([1, 2], 3), "hidden.1", 5) == Widths([1, 5], 3)
    for name in ("sizes.5", "none", "nested.x"):
        with pytest.raises((AttributeError, KeyError, IndexError)):
            with_number(module.config, name, 1)


def test_the_names_that_are_read_at_a_line():
    first = SetupAttention.split.__wrapped__.__code__
    place = (first.co_filename, first.co_firstlineno + 1)
    depth, names = names_read(SetupAttention, (("elsewhere.py", 1), place))
    assert depth == 1 and {"heads", "head_width"} <= names and "layers" not in names
    assert names_read(SetupAttention, (("elsewhere.py", 1),)) == (1, frozenset())
