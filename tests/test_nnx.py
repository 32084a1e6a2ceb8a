"""NNX objects: the user's stays as it is, and slim objects live on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_zoo import moved
from zoo import random_plan

import jaxprune as jp
from jaxprune import slicing, trees
from jaxprune.errors import GraphError


class _Net(nnx.Module):
    """Statistics, dropout, a grouped convolution, a layer used twice."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 12, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.grouped = nnx.Conv(12, 12, (3, 3), feature_group_count=3, rngs=rngs)
        self.group_norm = nnx.GroupNorm(12, num_groups=3, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.shared = nnx.Linear(12, 12, rngs=rngs)
        self.tied = self.shared
        self.head = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = nnx.relu(self.group_norm(self.grouped(x))).mean((1, 2))
        x = nnx.relu(self.shared(self.drop(x)))
        return self.head(self.tied(x))


def _net():
    model = moved(_Net(nnx.Rngs(0)))
    return model, jax.random.normal(jax.random.key(2), (4, 5, 5, 3))


def _leaves(model):
    """Array leaves of an object by name, without random number state."""
    state = nnx.state(model, nnx.Not(nnx.RngState))
    return trees.flatten(nnx.to_pure_dict(state))


def test_the_users_object_is_never_changed():
    model, x = _net()
    before = {k: np.array(v) for k, v in _leaves(model).items()}
    graphdef = nnx.graphdef(model)
    graph = jp.trace(model, x)
    jp.verify(graph, random_plan(graph), x)
    assert nnx.graphdef(model) == graphdef  # in train mode as before, no size changed
    assert not model.drop.deterministic
    for name, leaf in _leaves(model).items():
        np.testing.assert_array_equal(leaf, before[name])


def test_a_trace_is_of_the_object_as_it_was():
    model, x = _net()
    graph = jp.trace(model, x)
    old = np.array(model.head.kernel[...])
    model.head.kernel.set_value(jnp.zeros((12, 4)))
    model.conv.out_features = 99
    slim = jp.shrink(graph, graph.full_plan())
    np.testing.assert_array_equal(slim.model.head.kernel[...], old)
    assert slim.model.conv.out_features == 12


def test_keeping_all_is_the_identity():
    model, x = _net()
    graph = jp.trace(model, x)
    slim = jp.shrink(graph, graph.full_plan())
    assert nnx.graphdef(slim.model) == nnx.graphdef(model)
    for name, leaf in _leaves(slim.model).items():
        np.testing.assert_array_equal(leaf, _leaves(model)[name])
    assert slim.model.tied is slim.model.shared
    assert slim.model is not model


def test_masking_the_consumers_is_the_same_where_no_norm_crosses_channels():
    rngs = nnx.Rngs(0)
    model = moved(
        nnx.Sequential(
            nnx.Conv(3, 12, (3, 3), rngs=rngs),
            nnx.BatchNorm(12, rngs=rngs),
            nnx.relu,
            nnx.Conv(12, 9, (3, 3), rngs=rngs),
            nnx.Dropout(0.5, rngs=rngs),
            nnx.Linear(9, 2, rngs=rngs),
        )
    )
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 3))
    graph = jp.trace(model, x)
    plan = random_plan(graph, 2)
    slim = jp.shrink(graph, plan)
    masked = slicing.mask_variables(graph, plan, graph.variables)
    expected = graph.handle(masked, x)
    slim.model.eval()
    np.testing.assert_allclose(slim.model(x), expected, atol=1e-5)
    # A wrong plan for the mask must not agree.
    other = {name: (kept + 1) % graph.group(name).size for name, kept in plan.items()}
    wrong = graph.handle(slicing.mask_variables(graph, other, graph.variables), x)
    assert float(jnp.abs(slim.model(x) - wrong).max()) > 1e-2


def test_parameters_are_those_of_nnx_param():
    model, x = _net()
    graph = jp.trace(model, x)
    assert graph.params() == sum(
        a.size for a in jax.tree.leaves(nnx.state(model, nnx.Param))
    )
    assert not graph.handle.is_parameter("norm/mean")
    plan = random_plan(graph)
    left = nnx.state(jp.shrink(graph, plan).model, nnx.Param)
    assert graph.params(plan) == sum(a.size for a in jax.tree.leaves(left))


def _step(model, optimizer, x, y):
    def loss(model):
        logits = model(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def test_a_slim_object_trains_with_its_sliced_optimizer():
    model, x = _net()
    y = jnp.arange(4)
    step = nnx.jit(_step)
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.Param)
    graph = jp.trace(model, x)
    plan = {g.name: np.arange(max(1, g.size - 1)) for g in graph.groups}
    step(model, optimizer, x, y)
    graph = jp.trace(model, x)
    slim = jp.shrink(graph, plan).model
    small = nnx.Optimizer(slim, optax.adam(3e-2), wrt=nnx.Param)
    state = jp.shrink_like(graph, plan, nnx.state(optimizer))
    nnx.update(small, state)
    np.testing.assert_array_equal(
        small.opt_state[0].mu["head"]["kernel"][...],
        slicing.take(
            optimizer.opt_state[0].mu["head"]["kernel"][...],
            slicing.keep_indices(graph, plan)["head/kernel"],
        ),
    )
    statistics = np.array(slim.norm.mean[...])
    key = int(slim.drop.rngs.count[...])
    losses = [float(step(slim, small, x, y)) for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert np.abs(slim.norm.mean[...] - statistics).max() > 0
    assert int(slim.drop.rngs.count[...]) == key + 30
    again = nnx.merge(*nnx.split(slim))
    again.eval(), slim.eval()
    np.testing.assert_array_equal(again(x), slim(x))


class _Modes(nnx.Module):
    """An inference call that no default would guess."""

    def __init__(self, rngs):
        self.a = nnx.Linear(4, 8, rngs=rngs)
        self.b = nnx.Linear(8, 2, rngs=rngs)
        self.training = True

    def encode(self, x):
        assert not self.training
        return self.b(nnx.relu(self.a(x)))

    def __call__(self, x, *, mask, train=True):
        assert not train
        return self.encode(x) * mask


def test_the_inference_call_can_be_given():
    model, x = _Modes(nnx.Rngs(0)), jnp.ones((2, 4))
    graph = jp.trace(model, x, apply=lambda model, x: model.encode(x))
    plan = {"a": np.arange(3)}
    assert jp.verify(graph, plan, x) < 1e-6
    slim = jp.shrink(graph, plan)
    assert slim.model.training and slim.model.a.out_features == 3
    with pytest.raises(GraphError, match="missing 1 required keyword.*'mask'"):
        jp.trace(model, x)


def test_abstract_objects_trace():
    real, x = _net()
    abstract = nnx.eval_shape(lambda: _Net(nnx.Rngs(0)))
    graph = jp.trace(abstract, jax.ShapeDtypeStruct((9, 5, 5, 3), jnp.float32))
    full = jp.trace(real, x)
    assert {g.name: g.size for g in graph.groups} == {
        g.name: g.size for g in full.groups
    }
    assert graph.macs() == full.macs()
    slim = jp.shrink(graph, {"grouped": [0, 2]})
    assert slim.model.grouped.feature_group_count == 3
    assert slim.model.head.in_features == 6


def test_sharding_metadata_stays_on_the_variables():
    rngs = nnx.Rngs(0)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    with jax.set_mesh(jax.make_mesh((1,), ("model",))):
        model = nnx.Sequential(
            nnx.Linear(4, 8, kernel_init=init, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
        )
    graph = jp.trace(model, jnp.ones((2, 4)))
    slim = jp.shrink(graph, {graph.groups[0].name: [1, 5]}).model
    kernel, before = slim.layers[0].kernel, model.layers[0].kernel
    assert kernel.shape == (4, 2)
    assert kernel.get_metadata() == before.get_metadata()
    assert "model" in str(kernel.get_metadata())


class _Heads(nnx.Module):
    """Attention written by hand: a number that it makes at every call, and states not."""

    def __init__(self, rngs):
        self.qkv = nnx.Linear(6, 36, rngs=rngs)
        self.out = nnx.Linear(12, 2, rngs=rngs)

    def count(self):
        return 4

    def __call__(self, x):
        b, t, _ = x.shape
        heads = self.count()
        q, k, v = jnp.split(self.qkv(x).reshape(b, t, heads, -1), 3, axis=-1)
        weights = nnx.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        found = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return self.out(found.reshape(b, t, heads * 3))


class _Following(_Heads):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.inverse = 1 / 4  # no whole number

    def count(self):
        return round(1 / self.inverse)

    def follow_arrays(self):
        self.inverse = 3 / self.out.kernel.shape[0]


def test_modules_say_how_their_own_sizes_follow():
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    for kind, left in ((_Heads, 4), (_Following, 2)):
        graph = jp.trace(kind(nnx.Rngs(0)), x)
        heads = next(g for g in graph.groups if g.size == 4)
        slim = jp.shrink(graph, {heads.name: [0, 3]})
        assert len(slim.plan[heads.name]) == left
        assert jp.verify(graph, slim.plan, x) < 1e-5
        assert (left == 4) == (heads.name in slim.report["left_whole"])


def test_wrong_input_is_explained():
    model, x = _net()
    graph = jp.trace(model, x)
    with pytest.raises(GraphError, match="pass module instances, not classes"):
        jp.trace(_Net, x)
    with pytest.raises(GraphError, match="does not run on these"):
        jp.trace(model, jnp.ones((2, 5, 5, 4)))
    other = dict(graph.variables)
    del other["head"]
    with pytest.raises(GraphError, match="head/bias is missing"):
        jp.shrink(graph, graph.full_plan(), other)
    with pytest.raises(GraphError, match="needs 'head/bias'"):
        graph.handle(other, x)


class _Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.BatchNorm(True)(nn.Dense(16)(x)))
        h = nn.MultiHeadDotProductAttention(4, qkv_features=16)(h, h)
        return nn.Dense(12)(nn.gelu(nn.Dense(20)(h)))


class _Bridged(nnx.Module):
    def __init__(self, x, rngs):
        self.encoder = nnx.bridge.ToNNX(_Encoder(), rngs=rngs).lazy_init(x)
        self.head = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.encoder(x)))


def test_a_linen_module_inside_follows(tmp_path):
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    model = _Bridged(x, nnx.Rngs(0))
    graph = jp.trace(model, x)
    plan = {g.name: np.arange(g.size // 2) for g in graph.groups}
    slim = jp.shrink(graph, plan)
    assert slim.report["left_whole"] == {} and len(plan) == 7
    assert jp.verify(graph, plan, x[:1]) < 1e-5
    jp.save(tmp_path / "slim", slim)
    loaded = jp.load(tmp_path / "slim", model)
    np.testing.assert_array_equal(loaded.model(x), slim.model(x))
    second = jp.trace(slim.model, x)
    one = {g.name: [0] for g in second.groups}
    assert jp.shrink(second, one).report["left_whole"] == {}
    assert isinstance(model.encoder.to_nnx__module, _Encoder)  # as it was
