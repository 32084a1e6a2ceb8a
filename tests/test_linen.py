"""Slim Linen modules live on: training, collections, names, other methods."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from zoo import half_plan, random_variables, tree_shapes

import jaxprune as jp


class _Net(nn.Module):
    """Statistics, dropout, partitioned parameters, a remat, own state, all at once."""

    @nn.compact
    def __call__(self, x, train=False):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        x = nn.remat(nn.Dense)(16, kernel_init=init, name="up")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        count = self.variable("state", "calls", jnp.zeros, (16,))
        if train:
            count.value = count.value + 1
        x = x * (1 + 0 * count.value)
        return nn.Dense(3, kernel_init=init, name="down")(x)


def test_a_slim_module_trains_and_keeps_its_collections():
    model, x = _Net(), jax.random.normal(jax.random.key(0), (32, 5))
    y = jnp.argmax(x[:, :3], -1)
    variables = model.init(jax.random.key(1), x)
    graph = jp.trace(model, variables, x)
    (group,) = graph.groups
    plan = {group.name: np.array([1, 2, 5, 7, 8, 15])}
    slim = jp.shrink(graph, plan)
    assert slim.report["left_whole"] == {}
    assert jp.verify(graph, plan, x) < 1e-6
    # The boxes that say how parameters are partitioned are still there.
    kernel = slim.variables["params"]["up"]["kernel"]
    assert isinstance(kernel, nn.Partitioned) and kernel.names == (None, "model")
    assert kernel.value.shape == (5, 6)
    assert nn.get_partition_spec(slim.variables) == nn.get_partition_spec(variables)
    fresh = slim.model.init(jax.random.key(1), x)
    assert jax.tree.structure(fresh) == jax.tree.structure(slim.variables)
    assert tree_shapes(fresh) == tree_shapes(slim.variables)

    def loss(params, rest, key):
        logits, changed = slim.model.apply(
            {"params": params, **rest},
            x,
            train=True,
            mutable=["batch_stats", "state"],
            rngs={"dropout": key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), changed

    rest = {k: v for k, v in slim.variables.items() if k != "params"}
    params = slim.variables["params"]
    optimizer = optax.adam(3e-2)
    state = optimizer.init(params)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    losses = []
    for k in range(30):
        (value, rest), grads = step(params, rest, jax.random.key(k))
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    np.testing.assert_array_equal(rest["state"]["calls"], np.full(6, 30.0))
    assert np.abs(rest["batch_stats"]["norm"]["mean"]).max() > 0


def test_the_users_module_is_not_touched():
    layer = nn.RNN(nn.LSTMCell(7))
    model, x = nn.Sequential([nn.Dense(8), layer, nn.Dense(2)]), jnp.ones((2, 6, 5))
    graph = jp.trace(model, random_variables(model, x), x)
    slim = jp.shrink(graph, half_plan(graph))
    out = slim.model.apply(slim.variables, x)
    assert out.shape == (2, 6, 2)
    assert layer.cell.features == 7 and "param" not in vars(layer.cell)
    full = model.apply(graph.variables, x)
    assert full.shape == out.shape
    # A model pruned before can be pruned again.
    again = jp.trace(slim.model, slim.variables, x)
    assert [g.size for g in again.groups] == [4, 3]
    assert jp.verify(again, half_plan(again), x) < 1e-5


class _Named(nn.Module):
    """Layers that bear the names of the wrapper's own fields."""

    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        for name in self.names:
            x = nn.relu(nn.Dense(8, name=name)(x))
        return nn.Dense(3)(x)


def test_layers_may_bear_any_name():
    model = _Named(("inner", "shapes", "settings", "model", "module"))
    x = jax.random.normal(jax.random.key(0), (4, 5))
    variables = model.init(jax.random.key(1), x)
    graph = jp.trace(model, variables, x)
    assert len(graph.groups) == 5
    slim = jp.shrink(graph, {group.name: np.arange(4) for group in graph.groups})
    assert slim.model.apply(slim.variables, x).shape == (4, 3)
    assert slim.variables["params"]["inner"]["kernel"].shape == (5, 4)


class _Encoder(nn.Module):
    """A module of which a method is called."""

    def setup(self):
        self.first, self.second, self.last = nn.Dense(12), nn.Dense(10), nn.Dense(3)

    def encode(self, x):
        return self.second(nn.relu(self.first(x)))

    def __call__(self, x):
        return self.last(nn.relu(self.encode(x)))


@pytest.mark.parametrize(
    "call",
    [
        lambda m, v, x: m.apply(v, x, method="encode"),
        lambda m, v, x: m.apply(v, x, method=m.encode),
        lambda m, v, x: m.apply(v, x, method=_Encoder.encode),
        lambda m, v, x: m.bind(v).encode(x),
        lambda m, v, x: m.apply(v, x, method=lambda m, x: m.second(m.first(x))),
    ],
)
def test_the_call_may_be_of_any_method(call):
    model, x = _Encoder(), jax.random.normal(jax.random.key(1), (4, 5))
    variables = random_variables(model, x)
    graph = jp.trace(model, variables, x, apply=call)
    assert [g.name for g in graph.groups] == ["first"]
    plan = {"first": [0, 2, 7]}
    slim = jp.shrink(graph, plan)
    assert slim.report["left_whole"] == {}
    assert jp.verify(graph, plan, x) < 1e-5


def test_a_slim_module_has_the_methods_of_the_users():
    model, x = _Encoder(), jax.random.normal(jax.random.key(1), (4, 5))
    variables = random_variables(model, x)
    slim = jp.shrink(jp.trace(model, variables, x), {"first": [0, 2, 7]})
    module, found = slim.model, slim.model.apply(slim.variables, x, method="encode")
    silent = jax.tree.map(lambda leaf: leaf, variables)
    kernel = silent["params"]["second"]["kernel"]
    gone = np.setdiff1d(np.arange(12), [0, 2, 7])
    silent["params"]["second"]["kernel"] = kernel.at[gone].set(0.0)
    expected = model.apply(silent, x, method="encode")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    bound = module.bind(slim.variables)
    np.testing.assert_array_equal(bound.encode(x), found)
    np.testing.assert_array_equal(
        module.apply(slim.variables, x, method=module.encode), found
    )
    with pytest.raises(AttributeError, match="decode"):
        module.decode  # noqa: B018


class _StandardisedConv(nn.Conv):
    """Weight standardisation as BiT writes it: its `param` changes what it returns."""

    def param(self, name, *args, **kwargs):
        param = super().param(name, *args, **kwargs)
        if name == "kernel":
            param = param - param.mean((0, 1, 2), keepdims=True)
            param = param / jnp.sqrt(jnp.square(param).mean((0, 1, 2)) + 1e-10)
        return param


class _Standardised(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(_StandardisedConv(8, (3, 3), name="a")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize("replay", [False, True])
def test_a_layer_may_change_its_parameters(replay):
    model, x = _Standardised(), jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
    variables = model.init(jax.random.key(0), x)
    graph = jp.trace(model, variables, x, replay=replay)
    slim = jp.shrink(graph, {"a": np.arange(4)})
    kernel = variables["params"]["head"]["kernel"]
    head = {**variables["params"]["head"], "kernel": kernel.at[4:].set(0)}
    masked = {"params": {**variables["params"], "head": head}}
    apply = slim.model if replay else slim.model.apply
    np.testing.assert_allclose(
        apply(slim.variables, x), model.apply(masked, x), atol=1e-5
    )
    assert jp.verify(graph, {"a": np.arange(4)}, x) < 1e-5


class _FromOthers(nn.Module):
    """The LRU's: an initialiser whose first argument is no shape but two arrays."""

    @nn.compact
    def __call__(self, x):
        one = self.param("one", nn.initializers.normal(), (6,))
        two = self.param("two", nn.initializers.normal(), (6,))
        third = self.param("third", lambda _, given: given[0] * given[1], (one, two))
        return nn.Dense(3)(nn.Dense(6, name="in")(x) * jnp.exp(third) * one * two)


def test_a_parameter_may_be_made_from_others():
    model, x = _FromOthers(), jax.random.normal(jax.random.key(1), (4, 5))
    graph = jp.trace(model, random_variables(model, x), x)
    slim = jp.shrink(graph, half_plan(graph))
    assert (
        slim.report["left_whole"] == {} and slim.variables["params"]["third"].size == 3
    )
    assert tree_shapes(slim.model.init(jax.random.key(0), x)) == tree_shapes(
        slim.variables
    )
    assert jp.verify(graph, slim.plan, x) < 1e-5


class _OwnArrays(nn.Module):
    """Arrays that the module makes itself, at widths its source states."""

    @nn.compact
    def __call__(self, x, _):
        up = self.param("up", nn.initializers.normal(), (x.shape[-1], 12))
        down = self.param("down", nn.initializers.normal(), (12, x.shape[-1]))
        return x + nn.relu(x @ up) @ down, None


@pytest.mark.parametrize("stacked_on", [0, 1])
def test_init_gives_slim_shapes_to_arrays_made_inside_a_scan(stacked_on):
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, name="in")(x)
            layers = nn.scan(
                _OwnArrays,
                variable_axes={"params": stacked_on},
                split_rngs={"params": True},
                length=3,
            )
            x, _ = layers(name="layers")(x, None)
            return nn.Dense(3, name="head")(x)

    model, x = Stack(), jax.random.normal(jax.random.key(1), (4, 5))
    variables = random_variables(model, x)
    graph = jp.trace(model, variables, x)
    slim = jp.shrink(graph, half_plan(graph))
    assert slim.report["left_whole"] == {}
    shapes = tree_shapes(slim.variables)
    assert shapes["params"]["layers"]["up"] == ((3, 4, 6), (4, 3, 6))[stacked_on]
    assert tree_shapes(slim.model.init(jax.random.key(0), x)) == shapes


def test_decoding_with_a_cache_shrinks():
    """JAX writes `0 < 0 ? 0 + width : 0` for the places the cache is updated at."""
    attention = nn.MultiHeadDotProductAttention(
        num_heads=4, qkv_features=24, out_features=8, decode=True
    )
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    variables = attention.init(jax.random.key(0), x)

    def apply(model, variables, token):
        return model.apply(variables, token, mutable=["cache"])[0]

    graph = jp.trace(attention, variables, x[:, :1], apply=apply)
    plan = {group.name: np.arange(group.size // 2) for group in graph.groups}
    slim = jp.shrink(graph, plan)
    assert slim.report["left_whole"] == {}
    assert slim.variables["cache"]["cached_key"].shape == (2, 5, 2, 3)
    assert jp.verify(graph, plan, x[:, :1]) < 1e-5


class _Bridged(nn.Module):
    """NNX layers inside a Linen module."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nnx.bridge.to_linen(nnx.Linear, 8, 16, name="first")(x))
        norm = nnx.bridge.to_linen(nnx.BatchNorm, 16, name="norm")
        x = nn.relu(nn.Dense(12)(norm(x)))
        attention = nnx.bridge.to_linen(
            nnx.MultiHeadAttention, num_heads=2, in_features=12, decode=False, name="at"
        )
        return nn.Dense(3)(attention(x))


def test_nnx_layers_inside_linen_modules_shrink():
    model, x = _Bridged(), jax.random.normal(jax.random.key(0), (2, 5, 8))
    variables = random_variables(model, x)
    graph = jp.trace(model, variables, x)
    plan = half_plan(graph)
    slim = jp.shrink(graph, plan, variables)
    assert slim.report["left_whole"] == {}
    assert jp.verify(graph, plan, x) < 1e-6
    assert slim.variables["params"]["at"]["query"]["kernel"].shape == (6, 1, 3)
    made = slim.model.init(jax.random.key(1), x)
    assert tree_shapes(made) == tree_shapes(slim.variables)
    assert slim.model.apply(made, x).shape == (2, 5, 3)
