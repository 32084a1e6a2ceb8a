"""Shrinking: the slim model equals the masked original, in every collection."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from zoo import ZOO, make, random_plan, randomise

import jaxprune as jp
from jaxprune import check, slicing, trees
from jaxprune.errors import EmissionError, GraphError, PlanError
from jaxprune.records import Plan
from jaxprune.verify import masked_outputs


def _outputs(model, variables, x):
    return jax.jit(lambda v: model.apply(v, x, train=False))(variables)


# Two plans for those that compile fast.
PLANS = [(n, 0) for n in ZOO] + [(n, 1) for n in ("mlp", "vgg_small", "vit_cifar")]


@pytest.mark.parametrize(("name", "seed"), PLANS)
def test_slim_equals_masked(name, seed):
    model, variables, x = make(name)
    graph = jp.trace(model, variables, x)
    plan = random_plan(graph, seed)
    slim = jp.shrink(graph, plan)
    found = np.asarray(_outputs(slim.model, slim.variables, x))
    oracle = np.asarray(masked_outputs(graph, plan, variables, (x,))[0])
    scale = max(1.0, np.abs(oracle).max())
    assert np.abs(found - oracle).max() <= 1e-5 * scale
    assert jp.verify(graph, plan, x) <= 1e-5 * scale
    if not name.startswith("vit"):  # no normalisation across pruned axes
        masked = slicing.mask_variables(graph, plan, variables)
        expected = np.asarray(_outputs(model, masked, x))
        assert np.abs(found - expected).max() <= 1e-5 * scale


@pytest.mark.parametrize("name", ["vgg_small", "resnet20", "vit_cifar"])
def test_slim_equals_masked_in_float64(name):
    with jax.enable_x64(True):
        model, variables, x = make(name)
        variables = jax.tree.map(lambda a: a.astype(jnp.float64), variables)
        x, model = x.astype(jnp.float64), model.clone(dtype=jnp.float64)
        graph = jp.trace(model, variables, x)
        assert jp.verify(graph, random_plan(graph), x, tolerance=1e-12) < 1e-12


@pytest.mark.parametrize("name", list(ZOO))
def test_keeping_all_is_the_identity(name):
    model, variables, x = make(name)
    graph = jp.trace(model, variables, x)
    slim = jp.shrink(graph, graph.full_plan())
    assert slim.model == model or name.endswith("_pad")
    for path, leaf in trees.flatten(slim.variables).items():
        np.testing.assert_array_equal(leaf, trees.flatten(variables)[path])
    np.testing.assert_allclose(
        _outputs(slim.model, slim.variables, x),
        _outputs(model, variables, x),
        rtol=1e-6,
    )


def test_a_wrong_slice_is_found_by_verify(monkeypatch):
    model, variables, x = make("vgg_small")
    graph = jp.trace(model, variables, x)
    plan = random_plan(graph, 3)
    right = slicing.take

    def wrong(leaf, keep):
        # Off by one on every axis that can shift, as a careless surgeon would be.
        moved = {a: np.where(k > 0, k - 1, k) for a, k in keep.items()}
        return right(leaf, moved)

    assert jp.verify(graph, plan, x) < 1e-4
    monkeypatch.setattr(slicing, "take", wrong)
    with pytest.raises(EmissionError, match="differs from the masked original"):
        jp.verify(graph, plan, x)


def test_the_callers_arrays_are_untouched():
    model, variables, x = make("resnet20")
    before = {k: np.array(v) for k, v in trees.flatten(variables).items()}
    graph = jp.trace(model, variables, x)
    jp.shrink(graph, random_plan(graph))
    for path, leaf in trees.flatten(variables).items():
        np.testing.assert_array_equal(leaf, before[path])


def test_a_slim_model_initialises_trains_and_mutates_as_any_other():
    model, variables, x = make("vgg_small")
    graph = jp.trace(model, variables, x)
    slim = jp.shrink(graph, random_plan(graph))
    fresh = jax.eval_shape(slim.model.init, jax.random.key(0), x)
    shapes = jax.tree.map(lambda a: a.shape, slim.variables)
    assert jax.tree.map(lambda a: a.shape, fresh) == shapes

    def loss(params):
        out, state = slim.model.apply(
            {**slim.variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return (out**2).mean(), state

    grads, state = jax.grad(loss, has_aux=True)(slim.variables["params"])
    assert float(optax.tree.norm(grads)) > 0
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()),
        state["batch_stats"],
        slim.variables["batch_stats"],
    )
    assert min(jax.tree.leaves(moved)) > 0


def test_optimizer_state_is_sliced_as_the_parameters():
    model, variables, x = make("vgg_small")
    graph = jp.trace(model, variables, x)
    plan = random_plan(graph)
    slim = jp.shrink(graph, plan)
    optimizer = optax.adam(1e-3)
    state = optimizer.init(variables["params"])
    # The first moment becomes the parameters, to see that the same indices stay.
    state = (state[0]._replace(mu=variables["params"]), *state[1:])
    small = jp.shrink_like(graph, plan, state)
    expected = optimizer.init(slim.variables["params"])
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, expected)
    for path, leaf in trees.flatten(small[0].mu).items():
        np.testing.assert_array_equal(
            leaf, trees.flatten(slim.variables["params"])[path]
        )


def test_plans_convert_and_complain():
    model, variables, x = make("mlp")
    graph = jp.trace(model, variables, x)
    plan = graph.complete(random_plan(graph))
    again = Plan.from_masks(plan.masks())
    assert {n: list(k) for n, k in again.items()} == {
        n: list(k) for n, k in plan.items()
    }
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    name = graph.groups[0].name
    with pytest.raises(PlanError, match="nothing of its 12 channels is kept"):
        jp.shrink(graph, {name: []})
    with pytest.raises(PlanError, match="do not lie in 0..11"):
        jp.shrink(graph, {name: [0, 12]})
    with pytest.raises(PlanError, match="listed twice"):
        jp.shrink(graph, {name: [3, 3]})
    with pytest.raises(PlanError, match="is not in this graph"):
        jp.shrink(graph, Plan({"nowhere": [0]}, {"nowhere": 4}))
    with pytest.raises(PlanError, match="expected 12 channels, found 5"):
        jp.shrink(graph, Plan({name: [0]}, {name: 5}))


def test_other_variables_are_refused_with_their_paths():
    model, variables, x = make("vgg_small")
    graph = jp.trace(model, variables, x)
    other = jax.tree.map(lambda a: a, variables)
    other["params"]["conv0"]["kernel"] = jnp.zeros((3, 3, 1, 2))
    with pytest.raises(GraphError, match=r"params/conv0/kernel: expected shape"):
        jp.shrink(graph, graph.full_plan(), other)
    del other["batch_stats"]
    with pytest.raises(GraphError, match="batch_stats/bn0/mean is missing"):
        jp.shrink(graph, graph.full_plan(), other)


class _Foreign(nn.Module):
    """A module that knows nothing of jaxprune and states its widths in its source."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(12, (3, 3))(x)
        x = nn.relu(nn.GroupNorm(3)(x))
        x = nn.Conv(12, (3, 3), feature_group_count=12)(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(4, qkv_features=16)(y, y)
        gate, value = jnp.split(nn.Dense(20)(x), 2, axis=-1)
        x = nn.BatchNorm(use_running_average=not train)(value * nn.sigmoid(gate))
        return nn.Dense(5)(x.mean(1))


@pytest.mark.parametrize("seed", range(3))
def test_foreign_modules_follow_their_arrays(seed):
    model, x = _Foreign(), jax.random.normal(jax.random.key(2), (2, 6, 6, 3))
    variables = randomise(model.init(jax.random.key(0), x))
    graph = jp.trace(model, variables, x)
    plan = random_plan(graph, seed)
    assert len(graph.groups) >= 6
    assert jp.verify(graph, plan, x) < 1e-5
    slim = jp.shrink(graph, plan)
    fresh = jax.eval_shape(slim.model.init, jax.random.key(0), x)
    shapes = jax.tree.map(lambda a: a.shape, slim.variables)
    assert jax.tree.map(lambda a: a.shape, fresh) == shapes


class _Stubborn(nn.Module):
    """A width in a reshape, and a branch on a shape."""

    branch: bool = False

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(8, name="a")(x)
        if self.branch:
            if y.shape[-1] != x.shape[-1]:
                y = nn.Dense(8, name="b")(y)
            return nn.Dense(3, name="c")(y)
        return nn.Dense(3, name="c")(y.reshape(-1, 2, 8).sum(1))


def test_sizes_that_do_not_follow_are_left_whole_and_never_silent():
    x = jnp.ones((2, 6))
    model = _Stubborn()
    variables = model.init(jax.random.key(0), x)
    graph = jp.trace(model, variables, x)
    with pytest.raises(EmissionError, match="did not follow"):
        check.align(graph, graph.complete({"a": np.arange(5)}))
    slim = jp.shrink(graph, {"a": np.arange(5)})
    assert len(slim.plan["a"]) == 8
    assert "did not follow" in slim.report["left_whole"]["a"]


def test_a_branch_that_would_flip_keeps_its_group_whole():
    x, model = jnp.ones((2, 6)), _Stubborn(branch=True)
    variables = model.init(jax.random.key(0), x)
    graph = jp.trace(model, variables, x)
    plan = {"a": np.arange(5), "b": np.arange(3)}
    assert jp.verify(graph, plan, x) < 1e-6
    assert jp.shrink(graph, plan).report["left_whole"] == {}
    # Six channels equal the input's six: `b` would silently be skipped.
    slim = jp.shrink(graph, {**plan, "a": np.arange(6)})
    assert [len(slim.plan[name]) for name in ("a", "b")] == [8, 3]
    assert list(slim.report["left_whole"]) == ["a"]
    assert jp.verify(graph, {**plan, "a": np.arange(6)}, x) < 1e-6


class _WithAuxiliary(nn.Module):
    """A second head that only training reads."""

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.relu(nn.Conv(8, (3, 3), name="a")(x))
        y = nn.Dense(3, name="head")(h.mean((1, 2)))
        if not (train or self.is_initializing()):
            return y
        return y, nn.Dense(2, name="auxiliary")(h.mean((1, 2)))


def test_parameters_that_the_call_does_not_read_are_named():
    model, x = _WithAuxiliary(), jnp.ones((2, 5, 5, 3))
    variables = model.init(jax.random.key(0), x)
    graph = jp.trace(model, variables, x)
    with pytest.warns(UserWarning, match="does not read params/auxiliary/bias"):
        slim = jp.shrink(graph, {"a": [1, 2]})
    expected = ["params/auxiliary/bias", "params/auxiliary/kernel"]
    assert slim.report["unread"] == expected == list(graph.unread)

    def both(model, variables, x):
        return model.apply(variables, x, train=True)

    graph = jp.trace(model, variables, x, apply=both)
    assert graph.unread == ()
    slim = jp.shrink(graph, {"a": [1, 2]})
    outputs = slim.model.apply(slim.variables, x, train=True)
    assert [y.shape for y in outputs] == [(2, 3), (2, 2)]
    assert jp.verify(graph, {"a": [1, 2]}, x) < 1e-5
