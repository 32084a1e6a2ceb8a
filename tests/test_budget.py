"""Budgets that cannot be met say the nearest that can, in the user's units."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import make

import jaxprune as jp
from jaxprune import models
from jaxprune.budget import one_budget, rounded_up
from jaxprune.errors import BudgetError, ScoreError


def _graph(name="vgg_small", shape=(4, 8, 8, 1)):
    model = models.create(name)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jp.trace(model, jax.eval_shape(model.init, jax.random.key(0), x), x)


def _scores(graph):
    return {g.name: np.linspace(1, 0, g.size) for g in graph.groups}


def _least(error, kind):
    found = re.search(rf"the least is {kind}=([0-9.e-]+),", str(error))
    assert found, str(error)
    return float(found.group(1))


@pytest.mark.parametrize("kind", ["macs", "params", "bytes", "keep"])
@pytest.mark.parametrize("options", [{}, {"round_to": 16}, {"min_ratio": 0.3}])
def test_the_least_is_named_and_can_be_asked_for(kind, options):
    graph = _graph()
    with pytest.raises(BudgetError) as caught:
        jp.select(graph, _scores(graph), **{kind: 1e-5}, **options)
    text = str(caught.value)
    assert text.startswith(f"{kind}=1e-05 cannot be met: the least is {kind}=")
    assert "every group at its smallest legal count" in text
    relax = [f"{name}={value}" for name, value in options.items()]
    assert text.endswith(f"or relax {relax[0]}" if relax else "ask for at least that")
    least = _least(text, kind)
    plan = jp.select(graph, _scores(graph), **{kind: least}, **options)
    low = {"round_to": 16}.get(next(iter(options), ""), 1)
    assert all(len(kept) <= max(low, 0.4 * plan.sizes[n]) for n, kept in plan.items())
    with pytest.raises(BudgetError, match="cannot be met"):
        jp.select(graph, _scores(graph), **{kind: 0.98 * least}, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("l1", {}),
        ("taylor", {"strategy": "global"}),
        ("lasso", {}),
        ("cpli", {"allocation": "uniform"}),
        ("importance_redundancy", {}),
    ],
)
def test_every_method_says_so_before_it_measures(method, options):
    model, variables, x = make("mlp")
    batches = [(np.zeros((4, 10), np.float32), np.zeros(4, int))]
    calls = []

    def loss_fn(outputs, y):
        calls.append(outputs)
        assert len(calls) == 1, "measured a network that cannot be pruned"
        return outputs.sum(1)  # its shape is checked before anything is measured

    with pytest.raises(BudgetError, match="macs=0.01 cannot be met") as caught:
        jp.prune(
            model, variables, batches, method=method, macs=0.01, loss_fn=loss_fn,
            min_keep=4, **options,
        )  # fmt: skip
    assert all(isinstance(outputs, jax.core.Tracer) for outputs in calls)
    assert str(caught.value).endswith("or relax min_keep=4")
    graph = jp.trace(model, variables, x)
    low = graph.macs({g.name: np.arange(4) for g in graph.groups})
    least = _least(caught.value, "macs")
    assert least * graph.macs() >= low > 0.99 * (least - 1e-3) * graph.macs()


def test_rounding_is_up_and_to_three_digits():
    for value in np.random.default_rng(0).uniform(0, 1, 200) ** 4:
        found = rounded_up(value)
        assert value <= found <= value * 1.011
        assert float(f"{found:.3g}") == found
    assert rounded_up(0.081) == 0.081
    assert rounded_up(1.0) == 1.0
    assert rounded_up(1 / 3) == 0.334
    assert rounded_up(12.341) == 12.4
    assert rounded_up(0.0) == 0.0


@pytest.mark.parametrize("share", [0.081, 0.57, 0.29])
def test_a_share_of_round_numbers_is_met_exactly(share):
    """0.29 * 100 is 28.999999999999996 in floating point."""
    model = models.create("mlp", hidden_widths=(100,), num_classes=2)
    x = jax.ShapeDtypeStruct((1, 8), jnp.float32)
    graph = jp.trace(model, jax.eval_shape(model.init, jax.random.key(0), x), x)
    plan = jp.select(graph, _scores(graph), macs=share)
    assert sum(len(kept) for kept in plan.values()) == int(100 * share + 1e-9)


def test_floors_can_differ_by_group():
    graph = _graph()
    plan = jp.select(
        graph, _scores(graph), macs=0.2, min_keep={"conv0": 30, "conv*": 3}
    )
    assert len(plan["conv0"]) >= 30
    assert min(len(kept) for kept in plan.values()) >= 3
    with pytest.raises(jp.PruneError, match=r"no group matches \['fc'\]"):
        jp.select(graph, _scores(graph), macs=0.2, min_keep={"fc": 3})
    with pytest.raises(jp.PruneError, match="min_keep must be an integer, 1 or more"):
        jp.select(graph, _scores(graph), macs=0.2, min_keep={"conv0": 0})


@pytest.mark.parametrize("value", [0, -2.0, float("inf"), "5"])
def test_milliseconds_are_above_zero(value):
    with pytest.raises(BudgetError, match="expected milliseconds above 0"):
        one_budget(latency_ms=value)


def test_scores_of_another_model_are_refused():
    graph = _graph()
    scores = _scores(graph) | {"head/other": np.ones(4)}
    with pytest.raises(ScoreError, match="1 groups that this graph lacks.*head/other"):
        jp.select(graph, scores, macs=0.5)
