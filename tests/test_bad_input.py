"""What users get wrong: each a PruneError with place, expected, found and remedy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import make, random_plan

import jaxprune as jp
from jaxprune import trees
from jaxprune.errors import (
    BudgetError,
    EmissionError,
    GraphError,
    PlanError,
    PruneError,
    ScoreError,
)
from jaxprune.records import Plan


@pytest.fixture(scope="module")
def small():
    model, variables, x = make("vgg_small")
    return model, variables, x, jp.trace(model, variables, x)


def _said(error, *parts):
    text = str(error.value)
    assert isinstance(error.value, PruneError)
    for part in parts:
        assert part in text, text


def test_a_missing_collection_is_named(small):
    model, variables, x, _ = small
    with pytest.raises(GraphError) as error:
        jp.trace(model, {"params": variables["params"]}, x)
    _said(error, "batch_stats", "/bn0", "found collections params (20)".capitalize())
    _said(error, "Pass the whole tree")
    with pytest.raises(GraphError) as error:
        jp.trace(model, variables["params"], x)
    _said(error, 'collection "params"', "/conv0", "Pass the whole tree")


def test_variables_of_another_model_are_named_with_both_shapes(small):
    model, variables, x, graph = small
    other = trees.replace(variables, {"params/conv1/kernel": jnp.zeros((3, 3, 5, 5))})
    with pytest.raises(GraphError) as error:
        jp.trace(model, other, x)
    _said(error, "/conv1", "(3, 3, 8, 8)", "(3, 3, 5, 5)", "vgg.py", "Pass the whole")
    with pytest.raises(GraphError) as error:
        jp.shrink(graph, graph.full_plan(), other)
    _said(error, "params/conv1/kernel: expected shape (3, 3, 8, 8), found (3, 3, 5, 5)")
    with pytest.raises(GraphError) as error:
        jp.trace(model, {**variables, "params": {"conv0": "kernel"}}, x)
    _said(error, "params/conv0 is no array but a str", "pass a tree of arrays")


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 8, 8, 4)])
def test_an_input_of_the_wrong_shape_is_shown(small, shape):
    model, variables, _, graph = small
    with pytest.raises(GraphError) as error:
        jp.trace(model, variables, jnp.zeros(shape))
    _said(error, "/conv0", f"inputs float32{list(shape)}", "an input of the shape")
    with pytest.raises(GraphError) as error:
        jp.verify(graph, {"conv0": [0, 1]}, jnp.zeros(shape))
    _said(error, "/conv0", f"inputs float32{list(shape)}")


def test_no_model_no_arrays_no_outputs(small):
    model, variables, x, _ = small
    with pytest.raises(GraphError, match="pass module instances, not classes"):
        jp.trace(type(model), variables, x)
    with pytest.raises(GraphError, match="inputs nothing"):
        jp.trace(model, variables)
    with pytest.raises(GraphError, match="at least one output, found"):
        jp.trace(lambda p, x: None, {"w": jnp.ones((3, 3))}, jnp.ones((2, 3)))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), variables)
    graph = jp.trace(model, shapes, x)
    with pytest.raises(GraphError, match=r"verify\(\.\.\., variables=arrays\)"):
        jp.verify(graph, {"conv0": [0, 1]}, x)
    assert jp.verify(graph, {"conv0": [0, 1]}, x, variables=variables) < 1e-4


DATA_DEPENDENT = {
    "mask": lambda p, x: x[x > 0] @ p["w"],
    "branch": lambda p, x: x if x.sum() > 0 else -x,
    "length": lambda p, x: jnp.zeros(int(x.sum())),
    "numpy": lambda p, x: np.asarray(x) @ p["w"],
    "nonzero": lambda p, x: jnp.nonzero(x)[0],
}


@pytest.mark.parametrize("name", list(DATA_DEPENDENT))
def test_data_dependent_shapes_are_refused_with_the_line(name):
    with pytest.raises(GraphError) as error:
        jp.trace(DATA_DEPENDENT[name], {"w": jnp.ones((3, 3))}, jnp.ones((3, 3)))
    _said(error, "depend on the values of arrays", "test_bad_input.py:", "jnp.where")


def test_plans_for_another_model_and_plans_that_are_none(small):
    _, _, _, graph = small
    with pytest.raises(PlanError) as error:
        jp.shrink(graph, {"conv9": [0]})
    _said(error, "'conv9' is not in this graph", "conv0", "jp.select")
    with pytest.raises(PlanError) as error:
        jp.shrink(graph, Plan({"conv0": [0]}, {"conv0": 64}))
    _said(error, "'conv0': expected 8 channels, found 64", "for another model")
    with pytest.raises(PlanError, match="expected a plan, .* found int"):
        jp.shrink(graph, 5)
    with pytest.raises(PlanError) as error:
        jp.shrink(graph, {"conv0": np.ones(8, bool)})
    _said(error, "found bool of shape (8,)", "Plan.from_masks")


def test_an_emptied_axis_is_refused(small):
    _, _, _, graph = small
    with pytest.raises(PlanError, match="nothing of its 8 channels is kept; keep at"):
        jp.shrink(graph, {"conv0": []})

    def product(p, x):  # rows and columns of one axis are separate groups
        y = (x @ p["a"]).reshape(-1, 2, 2)
        return jnp.einsum("bij,ij->bi", jnp.tanh(y), p["b"]).sum(1)

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((2, 2))}
    graph = jp.trace(product, params, jnp.ones((5, 3)))
    assert all(group.size == 2 for group in graph.groups)


def test_scores_that_are_no_numbers_are_counted(small):
    _, _, _, graph = small
    bad = {g.name: np.full(g.size, np.nan) for g in graph.groups}
    with pytest.raises(ScoreError) as error:
        jp.select(graph, bad, macs=0.5)
    _said(error, "'conv0': 8 of 8 scores are NaN", "one finite number per channel")
    short = {g.name: np.ones(3) for g in graph.groups}
    with pytest.raises(ScoreError, match=r"'conv0': expected \(8,\), found \(3,\)"):
        jp.select(graph, short, macs=0.5)


def test_outputs_that_do_not_exist_are_refused(small):
    model, variables, x, _ = small
    with pytest.raises(GraphError, match="matches none of the model's outputs"):
        jp.trace(model, variables, x, outputs="logits")
    with pytest.raises(GraphError, match="could not pick from what the model returns"):
        jp.trace(model, variables, x, outputs=lambda out: out["logits"])


def _several(params, x):
    y = jax.nn.relu(x @ params["a"])
    return {"features": y, "logits": y @ params["b"]}


@pytest.mark.parametrize("outputs", ["logits", ["log*"], lambda out: out["logits"]])
def test_outputs_frees_what_is_not_picked(outputs):
    params, x = {"a": jnp.ones((3, 6)), "b": jnp.ones((6, 2))}, jnp.ones((4, 3))
    whole = jp.trace(_several, params, x)
    assert whole.groups == () and "trace(outputs=) names" in whole.explain("a")
    graph = jp.trace(_several, params, x, outputs=outputs)
    assert [group.size for group in graph.groups] == [6]
    plan = random_plan(graph, 3)
    assert jp.verify(graph, plan, x) < 1e-6
    slim = jp.shrink(graph, plan)
    kept = len(next(iter(slim.plan.values())))
    assert slim.model(slim.variables, x)["features"].shape == (4, kept)


def test_a_model_in_which_nothing_can_go_has_no_groups():
    graph = jp.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 4))}, jnp.ones((2, 3)))
    assert graph.groups == () and graph.macs() == 12
    assert jp.verify(graph, {}, jnp.ones((2, 3))) == 0
    assert "an output of the model" in str(graph)


def test_a_model_of_nan_is_not_proven():
    model, variables, x = make("mlp")
    variables = jax.tree.map(lambda a: a * np.nan, variables)
    graph = jp.trace(model, variables, x)
    half = {g.name: np.arange(g.size // 2) for g in graph.groups}
    with pytest.raises(EmissionError, match="NaN throughout; check the weights"):
        jp.verify(graph, half, x)


def test_a_function_around_a_module_hears_why_nothing_can_be_pruned():
    class Stated(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            del train
            return nn.Dense(2, name="out")(nn.relu(nn.Dense(8, name="hidden")(x)))

    model, x = Stated(), np.ones((4, 3), np.float32)
    variables = model.init(jax.random.key(0), x)
    batches = [(x, np.zeros(4, int))]
    with pytest.raises(BudgetError) as error:
        jp.prune(model.apply, variables, batches, method="l2", macs=0.5)
    _said(error, "none of the 1 groups", "'hidden': ", "(3, 8)", "(3, 4)")
    _said(error, "Pass a Flax module itself", "apply=", "replay=True")
    graph = jp.trace(model.apply, variables, x, replay=True)
    plan = jp.select(graph, jp.score(graph, variables, "l2"), macs=0.5)
    assert jp.shrink(graph, plan).plan["hidden"].size == 4


def test_a_module_that_states_its_width_is_not_asked_to_be_a_module():
    class Literal(nn.Module):
        @nn.compact
        def __call__(self, x):
            hidden = nn.Dense(8, name="hidden")(x) * jnp.ones(8)
            return nn.Dense(2, name="out")(hidden)

    model, x = Literal(), np.ones((4, 3), np.float32)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(BudgetError) as error:
        jp.prune(model, variables, [(x, np.zeros(4, int))], method="l2", macs=0.5)
    _said(error, "group 'hidden': ", "\nPrune its program: plan = ", "replay=True")


@pytest.mark.parametrize(
    ("finetune", "error"),
    [
        (lambda m, v: None, r"b: expected shape \(4, 2\), found nothing"),
        (lambda m, v: {**v, "b": jnp.ones((8, 2))}, r"b: expected .* found \(8, 2\)"),
    ],
)
def test_fine_tuning_returns_what_it_is_given(finetune, error):
    params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
    batches = [(np.ones((4, 3), np.float32), np.zeros(4, int))]
    with pytest.raises(GraphError, match=f"finetune= must return(.|\n)*{error}"):
        jp.prune(
            lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, batches,
            method="l2", macs=0.5, finetune=finetune,
        )  # fmt: skip
