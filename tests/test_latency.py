"""Latency budgets: the table against a made-up device that is exact, and a real one."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import make

import jaxprune as jp
from jaxprune import budget, cost, models
from jaxprune.errors import BudgetError
from jaxprune.graph.evaluate import sub_jaxprs
from jaxprune.latency import measure_latency, with_batch

IDLE = 0.01


def device_ms(function, *arguments, **_):
    """A device that takes time for products of widths in steps of 8, and a little
    for each element of their results; every program has an overhead."""

    def total(closed):
        ms = 0.0
        for eqn in closed.jaxpr.eqns:
            ms += sum(map(total, sub_jaxprs(eqn)))
            if eqn.primitive.name not in ("dot_general", "conv_general_dilated"):
                continue
            left, right = (var.aval.shape for var in eqn.invars)
            result = eqn.outvars[0].aval.shape
            if eqn.primitive.name == "conv_general_dilated":
                numbers = eqn.params["dimension_numbers"]
                kernel = [right[d] for d in numbers.rhs_spec[2:]]
                sizes = [*result, *kernel, right[numbers.rhs_spec[1]]]
            else:
                (_, contract), (_, batch) = eqn.params["dimension_numbers"]
                free = [n for d, n in enumerate(right) if d not in (*contract, *batch)]
                sizes = [*left, *free]
            ms += 1e-6 * math.prod(-(-n // 8) * 8 for n in sizes)
            ms += 1e-5 * math.prod(-(-n // 8) * 8 for n in result)
        return ms

    return IDLE + total(jax.make_jaxpr(function)(*arguments))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(cost, "time_ms", device_ms)


def _vgg(batch=4):
    """A graph without arrays: nothing is run."""
    model = models.create("vgg_small")
    x = jax.ShapeDtypeStruct((batch, 8, 8, 1), jnp.float32)
    return jp.trace(model, jax.eval_shape(model.init, jax.random.key(0), x), x)


def _counts(graph, counts):
    return {g.name: np.arange(min(counts, g.size)) for g in graph.groups}


class Separable(nn.Module):
    """Depthwise and grouped convolutions between pointwise ones."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(32, (3, 3), name="a")(x)
        x = nn.Conv(32, (3, 3), feature_group_count=32, name="b")(nn.relu(x))
        x = nn.Conv(48, (1, 1), name="c")(nn.relu(x))
        x = nn.Conv(48, (3, 3), feature_group_count=4, name="d")(nn.relu(x))
        return nn.Dense(5, name="e")(nn.relu(x).mean((1, 2)))


def _separable():
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    model = Separable()
    return jp.trace(model, jax.eval_shape(model.init, jax.random.key(0), x), x)


def _vit():
    model, variables, x = make("vit_cifar")
    return jp.trace(model, variables, x)


def test_the_table_is_right_where_the_device_is_regular():
    graph = _vgg()
    table = measure_latency(graph, timer=device_ms)
    assert table.predict() == pytest.approx(table.base_ms)
    assert table.predict(graph.full_plan()) == pytest.approx(table.base_ms)
    rng = np.random.default_rng(0)
    for _ in range(5):
        keep = {
            g.name: np.arange(rng.integers(1, g.size // 8 + 1) * 8)
            for g in graph.groups
        }
        assert table.predict(keep) == pytest.approx(table.measure(keep), rel=0.03)


def test_odd_widths_cost_what_the_next_multiple_of_8_does():
    graph = _vgg()
    table = measure_latency(graph, timer=device_ms)
    at = {k: table.predict(_counts(graph, k)) for k in range(1, 129)}
    assert at[17] == at[20] == at[24] < at[25] == at[32] < at[33]
    assert list(at.values()) == sorted(at.values())


@pytest.mark.parametrize("made", [_separable, _vit], ids=["separable", "vit"])
def test_grouped_convolutions_and_attention_have_tables(made):
    graph = made()
    table = measure_latency(graph, timer=device_ms)
    assert table.predict() == pytest.approx(table.base_ms)
    low = {g.name: np.arange(max(1, g.size // 2)) for g in graph.groups}
    assert table.predict(low) < table.base_ms
    for group in graph.groups:  # never falls as channels are added
        found = [
            table.predict({**low, group.name: np.arange(k)})
            for k in range(1, group.size + 1)
        ]
        assert found == sorted(found)


def test_noise_of_the_clock_does_not_make_fewer_channels_dearer():
    rng = np.random.default_rng(0)

    def noisy(function, *arguments, **options):
        return device_ms(function, *arguments) * rng.uniform(1, 3)

    graph = _vgg()
    table = measure_latency(graph, timer=noisy)
    for group in graph.groups:
        found = [table.predict({group.name: np.arange(k + 1)}) for k in range(32)]
        assert found == sorted(found)


def _scores(graph):
    return {g.name: np.linspace(1, 0, g.size) for g in graph.groups}


@pytest.mark.parametrize("strategy", ["uniform", "global"])
def test_a_latency_is_met_and_used(fake, strategy):
    graph = _vgg()
    base = measure_latency(graph).base_ms
    plan = jp.select(graph, _scores(graph), latency_ms=0.5 * base, strategy=strategy)
    slim = jp.shrink(graph, plan)
    found = device_ms(
        lambda v, x: slim.model.apply(v, x), slim.variables, graph.inputs[0]
    )
    assert 0.4 * base < found <= 1.05 * 0.5 * base
    # Free channels are taken: every width fills its step of 8.
    assert all(len(kept) % 8 == 0 for kept in plan.values())


def test_a_table_that_misses_is_corrected_by_the_slim_model(fake, monkeypatch):
    """Slim models take half as long again as their layers say."""
    graph = _vgg()
    whole = graph.params()
    measured = []

    def skewed(function, *arguments, **options):
        ms = device_ms(function, *arguments)
        if len(arguments) == 2 and isinstance(arguments[0], dict):
            size = sum(a.size for a in jax.tree.leaves(arguments[0]["params"]))
            if size < whole:
                ms *= 1.5
                measured.append(ms)
        return ms

    monkeypatch.setattr(cost, "time_ms", skewed)
    asked = 0.6 * measure_latency(graph).base_ms
    del measured[:]
    plan = jp.select(graph, _scores(graph), latency_ms=asked)
    first, *later = measured
    assert first > 1.3 * asked
    assert later and later[-1] <= 1.05 * asked
    handle = jp.shrink(graph, plan)
    real = skewed(handle.model.apply, handle.variables, graph.inputs[0])
    assert 0.8 * asked < real <= 1.06 * asked


def test_a_device_that_is_slower_now_does_not_spoil_the_table():
    """All times double after the table was made: relative to the whole, none did."""
    factor = 1.0

    def drifting(function, *arguments, **options):
        return factor * device_ms(function, *arguments)

    graph = _vgg()
    table = measure_latency(graph, timer=drifting)
    before = table.measure(_counts(graph, 16))
    factor = 2.0
    assert table.measure(_counts(graph, 16)) == pytest.approx(before)


def test_a_latency_below_the_least_names_the_least(fake):
    graph = _vgg()
    with pytest.raises(BudgetError, match=r"latency_ms=0.05 ms cannot be met: ") as e:
        jp.select(graph, _scores(graph), latency_ms=0.05, round_to=8)
    assert str(e.value).endswith("or relax round_to=8")
    least = float(str(e.value).split("least is latency_ms=")[1].split(" ms")[0])
    plan = jp.select(graph, _scores(graph), latency_ms=least, round_to=8)
    assert {len(kept) for kept in plan.values()} == {8}
    with pytest.raises(BudgetError, match="above 0, of one batch"):
        jp.select(graph, _scores(graph), latency_ms=-1)


def test_the_batch_of_the_latency_can_be_another(fake):
    small, large = (measure_latency(with_batch(_vgg(), n)).base_ms for n in (8, 64))
    assert large > 6 * small
    assert with_batch(_vgg(), None).inputs[0].shape[0] == 4


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("l1", {"strategy": "global"}),
        ("lasso", {"allocation": "uniform"}),
        pytest.param("lasso", {"refit": "bias"}, marks=pytest.mark.slow),
        pytest.param("importance_redundancy", {}, marks=pytest.mark.slow),
    ],
)
def test_prune_reports_asked_predicted_and_measured(fake, method, options):
    model = models.create("vgg_small", width=0.5)
    x = np.random.default_rng(0).normal(size=(16, 8, 8, 1)).astype(np.float32)
    variables = model.init(jax.random.key(0), x[:1])
    base = measure_latency(jp.trace(model, variables, jnp.zeros((64, 8, 8, 1)))).base_ms
    slim = jp.prune(
        model, variables, [(x, None)], method=method, latency_ms=0.6 * base,
        latency_batch=64, **options,
    )  # fmt: skip
    found = slim.report["latency"]
    assert found["batch"] == 64
    assert found["base_ms"] == found["base_again_ms"] == pytest.approx(base)
    assert found["asked_ms"] == slim.report["asked"]["latency_ms"] == 0.6 * base
    assert found["predicted_ms"] <= found["asked_ms"]
    assert found["measured_ms"] == slim.report["achieved"]["latency_ms"]
    assert found["measured_ms"] == pytest.approx(found["predicted_ms"], rel=0.06)


@pytest.mark.slow
def test_a_real_clock_gives_a_smaller_network():
    """Loose: other programs run beside the tests."""
    model = models.create("vgg_small")
    x = jnp.zeros((32, 8, 8, 1))
    graph = jp.trace(model, model.init(jax.random.key(0), x[:1]), x)
    base = cost.latency_ms(model, graph.variables, x)
    assert base > 0
    bound = budget.constraint(
        graph, budget.one_budget(latency_ms=0.6 * base), graph.groups
    )
    assert 0.2 * base < bound.whole < 5 * base
    assert bound.cost_fn(_counts(graph, 8)) < bound.cost_fn(_counts(graph, 32))
    assert bound.table is not None
    assert 0 < bound.table.measure(_counts(graph, 8)) < 5 * base
