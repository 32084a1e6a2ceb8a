"""What the methods measure on a network, against plain runs of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import make, random_batches, randomise

import jaxprune as jp
from jaxprune import slicing, trees
from jaxprune.criteria.gradients import gate_gradients as weight_gate_gradients
from jaxprune.graph.flat import flatten
from jaxprune.methods import relay as relay_module
from jaxprune.methods.activations import capture_places, find_places, stream
from jaxprune.methods.measure import (
    Calibration,
    cross_entropy,
    gate_gradients,
)
from jaxprune.methods.ranking import follow_plan
from jaxprune.methods.refitting import (
    Refitting,
)
from jaxprune.methods.relay import Relay, measure_moments
from jaxprune.methods.sensitivity import curve
from jaxprune.methods.taps import find_taps, output_map, rows_and_targets
from jaxprune.stats import example_positions
from jaxprune.stats.activations import stats_update, stats_zeros
from jaxprune.stats.moments import covariances


def _graph(name, batches):
    model, variables, _ = make(name)
    return model, variables, jp.trace(model, variables, batches[0][0])


def _run_flat(graph, variables, x):
    """{site: (operands, results)} of the contractions, by the flat program."""
    program = flatten(graph.closed, graph.records, len(jax.tree.leaves(variables)))
    contractions = ("dot_general", "conv_general_dilated")

    @jax.jit
    def run(leaves):
        found = {}

        def after(number, operands, results):
            step = program.steps[number]
            if step.eqn.primitive.name in contractions:
                found[step.site] = (operands, results)

        start = dict(zip(program.inputs, [x], strict=True))
        program.run(leaves, start, 0, len(program.steps), after)
        return found

    return run(jax.tree.leaves(variables))


@pytest.mark.parametrize("name", ["resnet20", "vit_cifar"])
def test_a_relay_measures_what_a_run_from_the_start_does(name, monkeypatch):
    """Moments of the last taps with the first groups already changed."""
    model, variables, x = make(name)
    batches = random_batches(x.shape[1:], count=16, size=8)
    graph = jp.trace(model, variables, batches[0][0])
    taps = find_taps(graph)
    data = Calibration(batches)
    first = graph.groups[0]
    changed = slicing.mask_variables(
        graph, {first.name: np.arange(first.size // 2)}, variables
    )
    late = [tap for tap in taps if np.isin(tap.row_needs, graph.groups[-1].units).any()]
    relay = Relay(graph, variables, data, positions=3)
    relay.advance([tap.site for tap in taps], variables)
    relay.advance([tap.site for tap in late], changed)
    found = relay.moments(late, changed, seed=1)
    again = Relay(graph, variables, data, positions=3, memory=0)
    monkeypatch.setattr(relay_module, "ROWS", 0)  # rows and moments in one program
    again.advance([tap.site for tap in late], changed)
    expected = again.moments(late, changed, seed=1)
    assert found.keys() == expected.keys() == {tap.path for tap in late}
    for path in found:
        a, b = covariances(found[path]), covariances(expected[path])
        np.testing.assert_allclose(a.xx, b.xx, atol=1e-5 * np.abs(b.xx).max())
        np.testing.assert_allclose(a.xy, b.xy, atol=1e-5 * np.abs(b.xy).max())


def test_a_relay_observes_what_a_run_from_the_start_does():
    """Activations of every group, the network changing before the one observed."""
    model, variables, x = make("vgg_small")
    batches = random_batches(x.shape[1:], count=20, size=8)
    graph, data = jp.trace(model, variables, batches[0][0]), Calibration(batches)
    places = find_places(graph, graph.groups, find_taps(graph))
    assert places.keys() == {group.name for group in graph.groups}
    relay, changed = Relay(graph, variables, data, positions=1), variables
    for number, group in enumerate(graph.groups):
        sites = [places[later.name].site for later in graph.groups[number:]]
        relay.advance(sites, changed)
        zeros = stats_zeros(group.size)
        for limit in (None, 11):
            found = relay.observe(
                places[group.name], changed, zeros, stats_update, limit=limit
            )
            expected = stream(
                graph, changed, data, {"": places[group.name]}, {"": zeros},
                stats_update, limit=limit,
            )[""]  # fmt: skip
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        half = {group.name: np.arange(group.size // 2)}
        changed = slicing.mask_variables(graph, half, changed)


@pytest.mark.parametrize("name", ["vgg_small", "resnet20", "vit_cifar", "mlp"])
def test_taps_are_matrix_products(name):
    model, variables, x = make(name)
    graph = jp.trace(model, variables, x)
    taps = find_taps(graph)
    leaves = trees.flatten(variables)
    seen = _run_flat(graph, variables, x)
    read = {slot.path for group in graph.groups for slot in group.consumers}
    assert {tap.path for tap in taps} >= read
    for tap in taps:
        operands, results = seen[tap.site]
        eqn, keys = graph.records[tap.site].eqn, jax.random.split(jax.random.key(0), 2)
        assert len(operands[tap.image]) == 2
        chosen = example_positions(keys, output_map(tap, eqn), 5)
        rows, targets = rows_and_targets(
            tap, eqn, operands[tap.image], results[0], chosen
        )
        found = np.asarray(rows[:, :, 0], np.float64) @ tap.matrix(leaves[tap.path])
        np.testing.assert_allclose(
            found, targets[:, :, 0], atol=2e-4 * np.abs(found).max()
        )
        again = tap.unmatrix(tap.matrix(leaves[tap.path]), leaves[tap.path])
        np.testing.assert_array_equal(again, leaves[tap.path])


def test_intercepts_are_biases_and_running_means():
    model, variables, x = make("vgg_small")
    taps = {t.path: t for t in find_taps(jp.trace(model, variables, x))}
    conv = taps["params/conv1/kernel"]
    assert (conv.intercept, conv.sign) == ("batch_stats/bn1/mean", -1)
    head = taps["params/linear/kernel"]
    assert (head.intercept, head.sign) == ("params/linear/bias", 1)


def test_gate_gradients_are_those_of_the_consumers_weights():
    batches = random_batches((8, 8, 1), classes=10)
    model, variables, graph = _graph("vgg_small", batches)
    data = Calibration(batches)
    found = gate_gradients(graph, find_taps(graph), variables, data, cross_entropy)

    def loss(params, x, y):
        out = model.apply({**variables, "params": params}, x[None])
        return cross_entropy(out, y[None])[0]

    each = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))
    x = np.concatenate([b[0] for b in batches])
    y = np.concatenate([b[1] for b in batches])
    grads = trees.flatten({"params": each(variables["params"], x, y)})
    leaves = trees.flatten(variables)
    for group in graph.groups:
        naive = np.asarray(
            weight_gate_gradients(group, leaves, grads, roles=("consumer",))
        )
        expected = [naive.mean(0), np.abs(naive).mean(0), (naive**2).mean(0)]
        scale = np.abs(naive).max()
        np.testing.assert_allclose(found[group.name], expected, atol=1e-4 * scale)


def test_measurements_do_not_depend_on_the_batch_split():
    whole = random_batches((8, 8, 1), size=48)
    odd = random_batches((8, 8, 1), size=20)  # 20, 20 and a padded 8
    results = []
    for batches in (whole, odd):
        _, variables, graph = _graph("vgg_small", batches)
        moments = measure_moments(
            graph,
            find_taps(graph),
            variables,
            variables,
            Calibration(batches),
            positions=None,
            seed=0,
        )
        results.append({k: covariances(m) for k, m in moments.items()})
    for path, first in results[0].items():
        second = results[1][path]
        assert first.count == second.count > 0
        np.testing.assert_allclose(
            first.xx, second.xx, atol=1e-5 * np.abs(first.xx).max()
        )


def test_places_hold_the_activated_output_of_the_layer():
    model, variables, x = make("vgg_small")
    graph = jp.trace(model, variables, x)
    places = find_places(graph, graph.groups, find_taps(graph))
    found = jax.jit(lambda v: capture_places(graph, v, (x,), places))(variables)
    p, s = variables["params"], variables["batch_stats"]
    y = jax.lax.conv_general_dilated(
        x, p["conv0"]["kernel"], (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    y = (y - s["bn0"]["mean"]) / jnp.sqrt(s["bn0"]["var"] + 1e-5)
    y = jax.nn.relu(y * p["bn0"]["scale"] + p["bn0"]["bias"])
    maps = found["conv0"].reshape(y.shape)
    np.testing.assert_allclose(maps, y, atol=1e-4)


def test_sensitivity_curves_fall_to_zero():
    found = curve([2, 4, 8], [1.0, 0.5, 0.125], 10)
    assert found.shape == (11,)
    assert (np.diff(found) <= 0).all()
    np.testing.assert_allclose(
        found[[2, 3, 4, 8, 9, 10]], [1, 0.5**0.5, 0.5, 0.125, 0.0625, 0]
    )
    assert found[0] == pytest.approx(2.0)
    # Noise that rises is flattened.
    assert (np.diff(curve([2, 4], [0.1, 0.2], 6)) <= 0).all()


def test_masks_and_refit_rows_agree():
    _, variables, graph = _graph("vgg_small", random_batches((8, 8, 1)))
    keep = {graph.groups[0].name: np.arange(0, graph.groups[0].size, 2)}
    mask = graph.unit_mask(graph.complete(keep))
    silent = trees.flatten(slicing.mask_variables(graph, keep, variables))
    for tap in find_taps(graph):
        rows = tap.row_keep(mask)
        assert not tap.matrix(silent[tap.path])[~rows].any()


class _Concatenated(nn.Module):
    """One layer that reads two others side by side."""

    @nn.compact
    def __call__(self, x):
        parts = [nn.relu(nn.Dense(12, name=name)(x)) for name in ("left", "right")]
        return nn.Dense(5, name="reader")(jnp.concatenate(parts, -1))


@pytest.mark.parametrize("passes", ["sequential", "single"])
def test_a_reader_of_two_groups_ends_at_its_least_squares_solution(passes):
    """It is refitted once for each group; its bias too starts from the original's."""
    model, batches = _Concatenated(), random_batches((9,), count=96, size=32)
    variables = randomise(model.init(jax.random.key(0), batches[0][0]))
    graph = jp.trace(model, variables, batches[0][0])
    kept = {"left": np.arange(0, 12, 2), "right": np.arange(5)}
    found = follow_plan(
        graph, variables, Calibration(batches), graph.complete(kept),
        groups=graph.groups,
        refitting=Refitting(passes=passes, positions=None, ridge=1e-7),
    )  # fmt: skip
    x = np.concatenate([x for x, _ in batches])
    _, layers = model.apply(variables, x, capture_intermediates=True)
    rows = [
        np.maximum(layers["intermediates"][name]["__call__"][0], 0)[:, index]
        for name, index in kept.items()
    ]
    rows = np.concatenate([*rows, np.ones((len(x), 1))], 1, dtype=np.float64)
    wanted = np.asarray(model.apply(variables, x), np.float64)
    best = rows @ np.linalg.lstsq(rows, wanted, rcond=None)[0]
    np.testing.assert_allclose(
        model.apply(found.variables, x), best, atol=1e-3 * np.abs(best).max()
    )
