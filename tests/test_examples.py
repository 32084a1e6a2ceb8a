"""Batches that are not the first axis of every array: windows, frames, time-major."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.errors import ScoreError
from jaxprune.graph.examples import Layout, layouts
from jaxprune.methods.measure import Calibration, cross_entropy, gate_gradients
from jaxprune.methods.relay import measure_moments
from jaxprune.methods.taps import find_taps

T = 4  # steps, frames or windows: as many as examples, so that shapes do not tell


class Frames(nn.Module):
    """The same convolutions on every frame."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="a")(x.reshape(-1, 6, 6, 3)))
        x = nn.relu(nn.Conv(6, (3, 3), padding="VALID", name="b")(x))
        return nn.Dense(5, name="c")(x.mean((1, 2)).reshape(-1, T, 6).mean(1))


class Windows(nn.Module):
    """Swin's partition, its windows before the examples in the second half."""

    @nn.compact
    def __call__(self, x):
        size = len(x)
        x = nn.Conv(12, (3, 3), name="a")(x)
        x = x.reshape(size, 2, 3, 2, 3, -1).transpose(0, 1, 3, 2, 4, 5)
        x = nn.gelu(nn.Dense(10, name="b")(x.reshape(size * 4, 9, -1)))
        x = x.reshape(size, 4, 9, -1).swapaxes(0, 1).reshape(4 * size, 9, x.shape[-1])
        x = nn.gelu(nn.Conv(8, (3,), name="c")(x))
        x = x.reshape(4, size, 9, -1).mean((0, 2))
        return nn.Dense(5, name="d")(x)


class TimeMajor(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(12, name="a")(jnp.swapaxes(x, 0, 1)))
        x = nn.relu(nn.Dense(10, name="b")(x))
        return nn.Dense(5, name="c")(x.mean(0))


class Queries(nn.Module):
    """Learned queries, the same for all examples, meet the input."""

    @nn.compact
    def __call__(self, x):
        table = self.param("table", nn.initializers.normal(1.0), (3, 8))
        queries = nn.Dense(6, name="b")(nn.relu(nn.Dense(10, name="a")(table)))
        keys = nn.Dense(6, name="c")(nn.relu(nn.Dense(9, name="d")(x)))
        weights = nn.softmax(jnp.einsum("qd,btd->bqt", queries, keys))
        return nn.Dense(5, name="e")((weights @ keys).reshape(len(x), -1))


SHAPES = {Frames: (T, 6, 6, 3), Windows: (6, 6, 3), TimeMajor: (T, 4), Queries: (T, 4)}
NETWORKS = pytest.mark.parametrize("network", SHAPES, ids=lambda n: n.__name__)


def make(network, count=7):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, *SHAPES[network])).astype(np.float32)
    y = rng.integers(0, 5, count)
    model = network()
    return model, model.init(jax.random.key(0), x[:4]), x, y


def batches(x, y, size):
    return [(x[k : k + size], y[k : k + size]) for k in range(0, len(x), size)]


def measured(network, size):
    """(moments, gate gradients) of all 7 examples, in batches of a size."""
    model, variables, x, y = make(network)
    data = Calibration(batches(x, y, size))
    graph = jp.trace(model, variables, data.inputs[0])
    taps = find_taps(graph)
    found = measure_moments(
        graph, taps, variables, variables, data, positions=None, seed=0
    )
    return found, gate_gradients(graph, taps, variables, data, cross_entropy)


@NETWORKS
def test_padding_of_the_last_batch_counts_nowhere(network):
    """4 + 3 examples give what they give one by one."""
    found, gates = measured(network, 4)
    expected, single = measured(network, 1)
    assert found.keys() == expected.keys() and gates.keys() == single.keys() != set()
    for path in found:
        assert float(found[path].count) == float(expected[path].count)
        assert float(found[path].count) % 7 == 0
        for one, other in zip(found[path][1:6], expected[path][1:6], strict=True):
            scale = float(jnp.abs(other).max()) + 1e-6
            np.testing.assert_allclose(one, other, atol=1e-5 * scale)
    for name in gates:
        np.testing.assert_allclose(gates[name], single[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("network", [Frames, Windows, TimeMajor])
@pytest.mark.parametrize("criterion", ["activation_mean", "entropy", "correlation"])
def test_criteria_see_every_frame_and_no_padding(network, criterion):
    model, variables, x, y = make(network)
    graph = jp.trace(model, variables, x[:4])
    found = jp.score(graph, variables, criterion, batches=batches(x, y, 4))
    expected = jp.score(graph, variables, criterion, batches=batches(x, y, 7))
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_the_mean_of_frames_is_the_networks():
    model, variables, x, _ = make(Frames)
    _, state = model.apply(variables, x, capture_intermediates=True)
    maps = np.maximum(state["intermediates"]["a"]["__call__"][0], 0)
    graph = jp.trace(model, variables, x[:4])
    found = jp.score(graph, variables, "activation_mean", batches=[(x, None)])["a"]
    np.testing.assert_allclose(found, maps.reshape(-1, 8).mean(0), rtol=1e-4)


@NETWORKS
@pytest.mark.parametrize("method", ["cpli", "importance_redundancy"])
def test_prune_measures_windows_and_frames(network, method):
    model, variables, x, y = make(network)
    slim = jp.prune(model, variables, batches(x, y, 4), method=method, macs=0.6)
    assert slim.report["achieved"]["macs"] <= 0.6


@pytest.mark.parametrize("network", [Frames, Windows, TimeMajor])
def test_the_refit_of_what_reads_windows_and_frames_helps(network):
    model, variables, x, y = make(network, 64)
    wanted = model.apply(variables, x)
    errors = []
    for how in ("lstsq", "none"):
        slim = jp.prune(
            model, variables, batches(x, y, 16), method="l1", macs=0.6, refit=how
        )
        found = slim.model.apply(slim.variables, x)
        errors.append(float(jnp.square(found - wanted).sum()))
    assert errors[0] < errors[1] / 2


def test_sampled_positions_are_so_many_an_example():
    model, variables, x, y = make(Frames)
    data = Calibration(batches(x, y, 4))
    graph = jp.trace(model, variables, data.inputs[0])
    found = measure_moments(
        graph, find_taps(graph), variables, variables, data, positions=5, seed=0
    )
    counts = {path: float(m.count) for path, m in found.items()}
    assert counts["params/b/kernel"] == 7 * 4  # 4 frames of one position are all
    assert counts["params/a/kernel"] == 7 * 5


def test_outputs_that_do_not_begin_with_the_batch_tell_widths():
    """The default allocation compares outputs, whatever their order."""
    table = np.ones((3, 2), np.float32)

    def apply(model, variables, x, how):
        hidden = nn.relu(x @ variables["a"])
        logits = hidden @ variables["b"]
        return {
            "merged": logits.reshape(-1, 5),
            "time": jnp.swapaxes(logits, 0, 1),
            "shared": (logits.mean(1), jnp.asarray(table) * variables["b"].sum()),
            "mixed": logits.reshape(-1, 5)[::-1],  # not followed
        }[how]

    rng = np.random.default_rng(0)
    variables = {"a": rng.normal(size=(4, 12)), "b": rng.normal(size=(12, 5))}
    variables = jax.tree.map(np.float32, variables)
    x = rng.normal(size=(8, 6, 4)).astype(np.float32)
    for how in ("merged", "time", "shared", "mixed"):
        slim = jp.prune(
            lambda v, x, how=how: apply(None, v, x, how),
            variables, [x[:4], x[4:7]], method="lasso", macs=0.6,
        )  # fmt: skip
        assert slim.report["achieved"]["macs"] <= 0.6


@pytest.mark.parametrize(
    ("change", "layout"),
    [
        (lambda x: x.reshape(-1, 3), Layout(2, 0, 1, 6)),
        (lambda x: x.swapaxes(0, 1).reshape(-1, 3), Layout(2, 0, 6, 1)),
        (lambda x: x.reshape(-1, 2, 3, 3).swapaxes(0, 1), Layout(2, 1)),
        (lambda x: jnp.moveaxis(x, 0, -1), Layout(2, 2)),
        (lambda x: x.swapaxes(0, 1).reshape(2, -1, 3), Layout(2, 1, 3, 1)),
        (lambda x: x.reshape(-1, 3)[::-1], None),
        (lambda x: jnp.concatenate([x, x]), Layout(2, 0, 2, 1)),
        (lambda x: jnp.concatenate([x.reshape(-1, 3)] * 3), Layout(2, 0, 3, 6)),
        (lambda x: jnp.concatenate([x.reshape(-1, 3)] * 2, 1), Layout(2, 0, 1, 6)),
        (
            lambda x: jnp.concatenate([x.swapaxes(0, 1).reshape(-1, 3)] * 2, 1),
            Layout(2, 0, 6, 1),
        ),
        (lambda x: jnp.concatenate([x, x])[: len(x)], Layout(2, 0)),
        (lambda x: x.sum(0), Layout(2, None)),
        (lambda x: jnp.einsum("atc,btc->ab", x, x), None),
    ],
)
def test_layouts(change, layout):
    """Of x (2, 6, 3), the examples first."""

    def model(params, x):
        return change(x * params["scale"])

    x = jnp.arange(36.0).reshape(2, 6, 3)
    graph = jp.trace(model, {"scale": jnp.ones(3)}, x)
    (found,) = layouts(graph).outputs
    assert found == layout
    if layout is None or layout.axis is None:
        return
    whole = layout.first(change(x))
    for example in range(2):  # the first axis holds that example's entries, all of them
        expected = change(x.at[1 - example].set(-1.0))
        mine = np.sort(np.asarray(expected[expected >= 0]))
        np.testing.assert_array_equal(np.sort(whole[example].reshape(-1)), mine)


def test_a_loop_of_unknown_length_is_pruned_without_gradients():
    """Kernels in its body are not refitted; gradients through it there are none."""

    class Fixpoint(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(12)(x)
            w = self.param("w", nn.initializers.normal(0.1), (12, 12))

            def body(carry):
                return jnp.tanh(carry[0] @ w + x), carry[1] + 1

            start = jnp.zeros_like(x), 0
            z, _ = jax.lax.while_loop(lambda carry: carry[1] < 5, body, start)
            return nn.Dense(3)(nn.relu(nn.Dense(10)(z)))

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 6)).astype(np.float32), rng.integers(0, 3, 8)
    model = Fixpoint()
    variables = model.init(jax.random.key(0), x)
    for method in ("l1", "lasso", "importance_redundancy", "activation_mean"):
        slim = jp.prune(model, variables, [(x, y)], method=method, macs=0.5)
        assert slim.report["achieved"]["macs"] <= 0.5
    with pytest.raises(ScoreError, match="does not take them through this model"):
        jp.prune(model, variables, [(x, y)], method="taylor", macs=0.5)


def test_gradients_that_are_no_numbers_are_named():
    """The derivative of a norm at zero is none; lasso takes no gradients."""

    class Distance(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(12)(x)
            h = nn.Dense(8)(nn.relu(h)) * 0
            far = jnp.sqrt((h**2).sum(-1, keepdims=True))
            return nn.Dense(3)(nn.relu(nn.Dense(10)(jnp.concatenate([x, far], -1))))

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 6)).astype(np.float32), rng.integers(0, 3, 8)
    model = Distance()
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ScoreError, match="Dense_1: 8 of 8 channels.*set mu=0"):
        jp.prune(model, variables, [(x, y)], macs=0.5)
    options = {"mu": 0, "feature_importance": False}
    for method, more in {"cpli": options, "lasso": {}}.items():
        slim = jp.prune(model, variables, [(x, y)], method=method, macs=0.5, **more)
        assert slim.report["achieved"]["macs"] <= 0.5


def test_weights_that_hold_nan_are_named():
    model, variables, x, y = make(Frames)
    variables["params"]["b"]["kernel"] = (
        variables["params"]["b"]["kernel"].at[0].set(jnp.nan)
    )
    with pytest.raises(ScoreError, match="params/b/kernel holds NaN in 144 of 432"):
        jp.prune(model, variables, batches(x, y, 4), method="l2", macs=0.5)


def test_a_source_that_refuses_other_batches_has_the_examples_first():
    def model(params, x):
        assert len(x) == 4
        return nn.relu(x @ params["a"]) @ params["b"]

    params = {"a": jnp.ones((3, 6)), "b": jnp.ones((6, 2))}
    graph = jp.trace(model, params, jnp.ones((4, 3)))
    assert layouts(graph).outputs == [Layout(4, 0)]
    assert [tap.layout for tap in find_taps(graph)] == [Layout(4, 0)] * 2
