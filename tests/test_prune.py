"""prune() and the measurements behind it, on small networks with known answers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import make

import jaxprune as jp
from jaxprune import models, slicing, trees
from jaxprune.criteria.gradients import gate_gradients as weight_gate_gradients
from jaxprune.errors import BudgetError, ConfigError, DataError, ScoreError
from jaxprune.graph.flat import flatten
from jaxprune.methods.activations import capture_places, find_places, stream
from jaxprune.methods.measure import (
    Calibration,
    cross_entropy,
    gate_gradients,
)
from jaxprune.methods.relay import Relay, measure_moments
from jaxprune.methods.seed_ratio import seed_layers, seed_ratio
from jaxprune.methods.sensitivity import curve, divergence
from jaxprune.methods.taps import find_taps, rows_and_targets
from jaxprune.stats.activations import stats_update, stats_zeros
from jaxprune.stats.moments import covariances


def _batches(x_shape, classes=7, count=48, size=16, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, *x_shape)).astype(np.float32)
    y = rng.integers(0, classes, count)
    return [(x[i : i + size], y[i : i + size]) for i in range(0, count, size)]


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
def test_a_relay_measures_what_a_run_from_the_start_does(name):
    """Moments of the last taps with the first groups already changed."""
    model, variables, x = make(name)
    batches = _batches(x.shape[1:], count=16, size=8)
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
    batches = _batches(x.shape[1:], count=20, size=8)
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
        rows, targets = rows_and_targets(
            tap,
            graph.records[tap.site].eqn,
            operands[tap.image],
            results[0],
            jax.random.key(0),
            5,
        )
        found = np.asarray(rows, np.float64) @ tap.matrix(leaves[tap.path])
        np.testing.assert_allclose(found, targets, atol=2e-4 * np.abs(found).max())
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
    batches = _batches((8, 8, 1), classes=10)
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
    whole = _batches((8, 8, 1), size=48)
    odd = _batches((8, 8, 1), size=20)  # 20, 20 and a padded 8
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


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("vgg_small", "cpli", {}),
        ("vgg_small", "cpli", {"passes": "single", "round_to": 4}),
        ("vgg_small", "lasso", {"allocation": "uniform"}),
        ("vgg_small", "taylor", {"strategy": "global", "refit": "lstsq"}),
        ("vgg_small", "chip", {"refit": "none"}),
        ("vgg_small", "importance_redundancy", {}),
        ("vit_cifar", "cpli", {"allocation": "uniform"}),
        ("mlp", "entropy", {}),
        ("mlp", "fisher", {}),
    ],
)
def test_every_method_meets_its_budget_and_the_proof(name, method, options):
    model, variables, x = make(name)
    batches = _batches(x.shape[1:])
    slim = jp.prune(model, variables, batches, method=method, macs=0.5, **options)
    report = slim.report
    assert report["method"] == method
    assert report["asked"]["macs"] == 0.5
    assert 0.4 < report["achieved"]["macs"] <= 0.5
    graph = jp.trace(slim.model, slim.variables, x)
    whole = jp.trace(model, variables, x)
    assert graph.macs() == whole.macs(slim.plan) <= 0.5 * whole.macs()
    assert report["verify_max_abs_error"] < 1e-3
    kept = {g["name"]: g["kept"] for g in report["groups"]}
    assert kept == {n: len(k) for n, k in slim.plan.items()}
    step = options.get("round_to", 1)
    sizes = slim.plan.sizes
    assert all(k % step == 0 or k == sizes[n] for n, k in kept.items())


def test_the_refit_brings_the_outputs_back():
    """Least squares beats a shifted intercept, which beats nothing."""
    model, variables, x = make("vgg_small")
    batches = _batches(x.shape[1:], count=512, size=128)
    graph = jp.trace(model, variables, batches[0][0])
    loss = divergence(graph, variables, Calibration(_batches(x.shape[1:], seed=5)))
    left = {}
    for refit in ("none", "bias", "lstsq"):
        slim = jp.prune(
            model,
            variables,
            batches,
            method="l2",
            macs=0.6,
            refit=refit,
            positions=None,
            verify=False,
        )
        run = jax.jit(lambda v, x, m=slim.model: m.apply(v, x))
        held_out = _batches(x.shape[1:], seed=5)[0][0]
        gap = run(slim.variables, held_out) - model.apply(variables, held_out)
        left[refit] = float(jnp.square(gap).mean())
    assert left["lstsq"] < 0.7 * left["bias"] < 0.7 * left["none"]
    assert loss(variables) < 1e-6


class _Planted(nn.Module):
    """Ten hidden channels; the tests make some copies of others, or dead."""

    @nn.compact
    def __call__(self, x, train=False):
        del train
        x = nn.relu(nn.Conv(10, (3, 3), padding="VALID", name="a")(x))
        x = nn.Conv(6, (3, 3), padding="VALID", name="b")(x)
        return nn.Dense(4, name="c")(nn.relu(x).mean((1, 2)))


def _planted():
    model = _Planted()
    x = np.random.default_rng(3).normal(size=(64, 9, 9, 3)).astype(np.float32)
    variables = jax.tree.map(np.array, model.init(jax.random.key(0), x[:1]))
    kernel, bias = (variables["params"]["a"][k] for k in ("kernel", "bias"))
    bias[:] = 0.1
    kernel[..., 7], bias[7] = kernel[..., 2], bias[2]  # a duplicate
    kernel[..., 8], bias[8] = 2.5 * kernel[..., 4], 2.5 * bias[4]  # scaled
    kernel[..., 9], bias[9] = 0.0, 0.7  # constant
    return model, jax.tree.map(jnp.asarray, variables), x


@pytest.mark.parametrize("refit", ["lstsq", "none"])
def test_planted_twins_go_and_the_output_stays(refit):
    model, variables, x = _planted()
    if refit == "none":  # folding alone: twins, and no constant
        bias = variables["params"]["a"]["bias"].at[9].set(-1.0)
        variables["params"]["a"]["bias"] = bias
    slim = jp.prune(
        model, variables, [(x, None)], method="importance_redundancy", keep=0.7,
        ignore=["b"], similarity_threshold=0.99, refit=refit, ridge=0.0,
    )  # fmt: skip
    kept = set(slim.plan["a"].tolist())
    assert len(kept) == 7 and 9 not in kept
    assert len(kept & {2, 7}) == len(kept & {4, 8}) == 1
    outputs = model.apply(variables, x), slim.model.apply(slim.variables, x)
    np.testing.assert_allclose(*outputs, atol=1e-4)


def test_the_preset_reports_the_ratio_of_its_own_formula():
    model = models.create("vgg16_seed", width=0.0625)
    x = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    graph = jp.trace(model, variables, x)
    layers = seed_layers(graph, graph.full_plan())
    widths = [4, 4, 8, 8, *[16] * 3, *[32] * 6]
    space = [32, 32, 16, 16, *[8] * 3, *[4] * 3, *[2] * 3]
    assert [layer.kind for layer in layers] == ["conv"] * 13 + ["dense"] * 2
    assert [layer.outputs for layer in layers] == [*widths, 256, 256]
    assert [layer.inputs for layer in layers] == [3, *widths, 256]
    assert [layer.height for layer in layers] == [*space, 1, 1]
    assert {layer.kernel for layer in layers[:13]} == {3}

    rng = np.random.default_rng(0)
    plan = graph.complete(
        {g.name: np.sort(rng.permutation(g.size)[: g.size // 2]) for g in graph.groups}
    )
    kept = [len(plan[name]) for name in plan]
    before = after = 1
    channels, wide = 3, 3
    for width, k, side in zip(widths, kept, space, strict=False):
        before += 9 * wide * side * side * width
        after += 9 * channels * side * side * k
        wide, channels = width, k
    before += 32 * 256 + 256 * 256
    after += channels * 4 * kept[13] + kept[13] * kept[14]
    assert seed_ratio(graph, plan) == before / after

    model, variables, x = _planted()
    slim = jp.prune(
        model, variables, [(x, None)], method="importance_redundancy", preset="seed"
    )
    assert slim.report["seed_ratio"] == seed_ratio(
        jp.trace(model, variables, x), slim.plan
    )


class _Tanh(nn.Module):
    """An odd activation: a negated filter gives a negated channel."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(12, name="a")(x))
        x = jnp.tanh(nn.Dense(12, name="b")(x))
        return nn.Dense(4, name="c")(x)


def _negated():
    """In both layers 7 copies 2, 8 is minus 4, 9 minus 2, 10 is dead."""
    x = np.random.default_rng(3).normal(size=(256, 6)).astype(np.float32)
    variables = jax.tree.map(np.array, _Tanh().init(jax.random.key(0), x[:1]))
    for layer in "ab":
        kernel = variables["params"][layer]["kernel"]
        kernel[:, 7], kernel[:, 8], kernel[:, 9] = (
            kernel[:, 2],
            -kernel[:, 4],
            -kernel[:, 2],
        )
        kernel[:, 10] = 0.0
    return _Tanh(), jax.tree.map(jnp.asarray, variables), x


def test_planted_copies_negatives_and_dead_channels_go_by_thresholds_alone():
    model, variables, x = _negated()
    slim = jp.prune(
        model, variables, [(x, None)], method="importance_redundancy",
        similarity_threshold=0.999, refit="none",
    )  # fmt: skip
    for layer in "ab":
        kept = set(slim.plan[layer].tolist())
        assert len(kept) == 8 and 10 not in kept
        assert len(kept & {2, 7, 9}) == len(kept & {4, 8}) == 1
    outputs = model.apply(variables, x), slim.model.apply(slim.variables, x)
    np.testing.assert_allclose(*outputs, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "count", "exact"),
    [
        ({"fold": False}, 8, False),
        ({"pairing": "pairs"}, 9, True),  # the cluster of three keeps two
        ({"importance": "l1"}, 8, True),
        ({"importance": "taylor"}, 8, True),
        ({"spatial": False}, 8, True),
        ({"bins": "range", "entropy_threshold": 0.0}, 9, True),  # the dead one stays
        ({"entropy_threshold": 0.0}, 9, True),
        ({"fold": False, "refit": "lstsq", "ridge": 0.0, "positions": None}, 8, True),
    ],
)
def test_each_repair_is_a_switch_of_its_own(changes, count, exact):
    model, variables, x = _negated()
    y = np.random.default_rng(0).integers(0, 4, len(x))
    options = {"similarity_threshold": 0.999, "refit": "none", **changes}
    slim = jp.prune(
        model, variables, [(x, y)], method="importance_redundancy", **options
    )
    assert {len(kept) for kept in slim.plan.values()} == {count}
    outputs = model.apply(variables, x), slim.model.apply(slim.variables, x)
    gap = float(jnp.abs(outputs[0] - outputs[1]).max())
    assert gap < 1e-4 if exact else gap > 1e-2


def test_the_more_important_twin_survives_by_any_criterion():
    model, variables, x = _negated()
    importance = jp.score(jp.trace(model, variables, x), variables, "l1")["a"]
    slim = jp.prune(
        model, variables, [(x, None)], method="importance_redundancy",
        similarity_threshold=0.999, importance="l1",
    )  # fmt: skip
    best = max((2, 7, 9), key=lambda c: (importance[c], -c))
    assert best in slim.plan["a"]
    with pytest.raises(ScoreError, match="no criterion 'l3'"):
        jp.prune(
            model, variables, [(x, None)], method="importance_redundancy",
            importance="l3",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"bins": "even"}, "bins must be 'shared' or 'range'; found 'even'"),
        ({"pairing": "triples"}, "pairing must be 'clusters' or 'pairs'"),
        ({"preset": "sed"}, "preset must be 'seed' or nothing"),
        ({"preset": "seed", "fold": False}, "fixes fold: leave out the preset"),
        ({"preset": "seed", "macs": 0.5}, "leave out macs"),
    ],
)
def test_wrong_options_of_importance_redundancy_are_named(options, error):
    model, variables, x = _negated()
    with pytest.raises(ConfigError, match=error):
        jp.prune(
            model, variables, [(x, None)], method="importance_redundancy", **options
        )


@pytest.mark.parametrize(
    ("method", "options"),
    [("cpli", {"mu": 0.0, "feature_importance": False}), ("lasso", {})],
)
def test_a_constant_channel_goes_first_and_into_the_bias(method, options):
    model, variables, x = _planted()
    slim = jp.prune(
        model, variables, [(x, None)], method=method, keep=0.9, ignore=["b"],
        ridge=0.0, allocation="uniform", positions=None, **options,
    )  # fmt: skip
    assert slim.plan["a"].tolist() == list(range(9))
    outputs = model.apply(variables, x), slim.model.apply(slim.variables, x)
    np.testing.assert_allclose(*outputs, atol=1e-4)


def test_labels_are_needed_for_the_loss_term_only():
    model, variables, _ = make("mlp")
    unlabelled = [(b[0], None) for b in _batches((10,))]
    slim = jp.prune(model, variables, unlabelled, method="lasso", macs=0.5)
    assert slim.report["achieved"]["macs"] <= 0.5
    with pytest.raises(ScoreError, match="needs labels"):
        jp.prune(model, variables, unlabelled, method="cpli", macs=0.5)
    with pytest.raises(ScoreError, match="'taylor' needs labels"):
        jp.prune(model, variables, unlabelled, method="taylor", macs=0.5)


def test_wrong_calls_say_what_to_do():
    model, variables, _ = make("mlp")
    batches = _batches((10,))
    with pytest.raises(ConfigError, match="did you mean 'cpli'"):
        jp.prune(model, variables, batches, method="clpi", macs=0.5)
    with pytest.raises(ConfigError, match="no option 'moo'; it takes"):
        jp.prune(model, variables, batches, macs=0.5, moo=1)
    with pytest.raises(BudgetError, match="no budget"):
        jp.prune(model, variables, batches)
    with pytest.raises(BudgetError, match="expected one budget"):
        jp.prune(model, variables, batches, macs=0.5, params=0.5)
    with pytest.raises(BudgetError, match="share that REMAINS"):
        jp.prune(model, variables, batches, macs=50)
    with pytest.raises(DataError, match="batches are empty"):
        jp.prune(model, variables, [], macs=0.5)
    with pytest.raises(ScoreError, match="one loss per example"):
        jp.prune(model, variables, batches, macs=0.5, loss_fn=lambda o, y: jnp.mean(o))
    with pytest.raises(BudgetError):
        jp.prune(model, variables, batches, method="l1", macs=1e-6)


def test_fine_tuning_between_layers_composes_plans():
    model, variables, x = make("mlp")
    calls = []

    def finetune(smaller, tuned):
        calls.append(sum(leaf.size for leaf in jax.tree.leaves(tuned)))
        return jax.tree.map(lambda a: a * 1.0, tuned)

    batches = _batches(x.shape[1:])
    slim = jp.prune(
        model, variables, batches, method="l1", macs=0.5, refit="none",
        finetune=finetune,
    )  # fmt: skip
    once = jp.prune(model, variables, batches, method="l1", macs=0.5, refit="none")
    assert len(calls) == len(once.report["groups"]) == 2
    assert calls == sorted(calls, reverse=True)
    assert slim.plan.to_json() == once.plan.to_json()
    np.testing.assert_allclose(
        slim.model.apply(slim.variables, x), once.model.apply(once.variables, x), 1e-4
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
    _, variables, graph = _graph("vgg_small", _batches((8, 8, 1)))
    keep = {graph.groups[0].name: np.arange(0, graph.groups[0].size, 2)}
    mask = graph.unit_mask(graph.complete(keep))
    silent = trees.flatten(slicing.mask_variables(graph, keep, variables))
    for tap in find_taps(graph):
        rows = tap.row_keep(mask)
        assert not tap.matrix(silent[tap.path])[~rows].any()
