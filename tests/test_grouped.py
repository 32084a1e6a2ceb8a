"""Grouped convolutions as consumers: one tap for each block of inputs and outputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from zoo import random_batches, randomise

import jaxprune as jp
from jaxprune import trees
from jaxprune.criteria.gradients import gate_gradients as weight_gate_gradients
from jaxprune.graph import evaluate, tree_arguments
from jaxprune.methods.measure import Calibration, cross_entropy, gate_gradients
from jaxprune.methods.ranking import follow_plan
from jaxprune.methods.refitting import (
    Refitting,
)
from jaxprune.methods.taps import find_taps, output_map, rows_and_targets
from jaxprune.stats import example_positions

PARTS = 3


class Grouped(nn.Module):
    """A convolution, a grouped one that reads it, and a head."""

    depthwise: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(12, (3, 3), name="wide")(x))
        if self.depthwise:
            x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=12, name="depth")(x))
        x = nn.Conv(15, (3, 3), feature_group_count=PARTS, name="grouped")(x)
        return nn.Dense(5, name="head")(nn.relu(x).mean((1, 2)))


def _grouped(**fields):
    model, batches = Grouped(**fields), random_batches((6, 6, 4), 5, count=40, size=16)
    variables = randomise(model.init(jax.random.key(0), batches[0][0]))
    return model, variables, batches, jp.trace(model, variables, batches[0][0])


def _layer(model, variables, x, name):
    _, found = model.apply(variables, x, capture_intermediates=True)
    return found["intermediates"][name]["__call__"][0]


@pytest.mark.parametrize("depthwise", [False, True])
def test_every_block_is_a_matrix_product(depthwise):
    _, variables, batches, graph = _grouped(depthwise=depthwise)
    taps = [tap for tap in find_taps(graph) if "grouped" in tap.path]
    assert [tap.name for tap in taps] == [
        f"params/grouped/kernel[{part}]" for part in range(PARTS)
    ]
    assert not any("depth/" in tap.path for tap in find_taps(graph))
    seen = {}

    def after(site, eqn, operands, results):
        del eqn
        if site == taps[0].site:
            seen["image"], seen["target"] = operands[0], results[0]
        return results

    evaluate(graph.closed, tree_arguments(variables, (batches[0][0],)), after=after)
    kernel = leaf = variables["params"]["grouped"]["kernel"]
    for tap in taps:
        eqn = graph.records[tap.site].eqn
        keys = jax.random.split(jax.random.key(0), len(seen["image"]))
        chosen = example_positions(keys, output_map(tap, eqn), 5)
        rows, targets = rows_and_targets(
            tap, eqn, seen["image"], seen["target"], chosen
        )
        x, y = (np.asarray(a, np.float64)[:, :, tap.part] for a in (rows, targets))
        found = x @ tap.matrix(kernel)
        np.testing.assert_allclose(found, y, atol=2e-4 * np.abs(found).max())
        leaf = tap.unmatrix(2 * tap.matrix(kernel), leaf)
    np.testing.assert_allclose(leaf, 2 * kernel, rtol=1e-6)
    bias = variables["params"]["grouped"]["bias"]
    moved = bias
    for tap in taps:
        moved = tap.shifted(np.arange(tap.outputs) + 5.0 * tap.part, moved, bias)
    np.testing.assert_allclose(moved, bias + np.arange(bias.size), rtol=1e-5)


def test_the_refit_is_the_least_squares_solution_of_every_block():
    """Against NumPy's, on all positions, with the channels that were kept."""
    model, variables, batches, graph = _grouped()
    places = np.asarray([0, 3])  # of the four that every block reads
    found = follow_plan(
        graph, variables, Calibration(batches), graph.complete({"wide": places}),
        groups=graph.groups[:1], refitting=Refitting(positions=None, ridge=1e-7),
    )  # fmt: skip
    x = np.concatenate([x for x, _ in batches])
    image = nn.relu(_layer(model, variables, x, "wide"))
    target = np.asarray(_layer(model, variables, x, "grouped"), np.float64)
    refitted = np.asarray(_layer(model, found.variables, x, "grouped"), np.float64)
    for part in range(PARTS):
        mine = 4 * part + places
        patches = lax.conv_general_dilated_patches(
            image[..., mine], (3, 3), (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        rows = np.asarray(patches, np.float64).reshape(-1, patches.shape[-1])
        rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)
        columns = slice(5 * part, 5 * part + 5)
        wanted = target[..., columns].reshape(-1, 5)
        best = rows @ np.linalg.lstsq(rows, wanted, rcond=None)[0]
        np.testing.assert_allclose(
            refitted[..., columns].reshape(-1, 5), best, atol=2e-3 * np.abs(best).max()
        )


@pytest.mark.parametrize("method", ["cpli", "importance_redundancy"])
@pytest.mark.parametrize("depthwise", [False, True])
def test_methods_prune_what_a_grouped_layer_reads(method, depthwise):
    model, variables, batches, _ = _grouped(depthwise=depthwise)
    slim = jp.prune(model, variables, batches, method=method, macs=0.6, positions=None)
    bare = (
        jp.prune(
            model, variables, batches, method=method, macs=0.6, refit="none", fold=False
        )
        if method == "importance_redundancy"
        else jp.prune(model, variables, batches, method=method, macs=0.6, refit="none")
    )
    x = batches[0][0]
    wanted = model.apply(variables, x)
    errors = [
        float(jnp.square(found.model.apply(found.variables, x) - wanted).mean())
        for found in (slim, bare)
    ]
    assert slim.report["achieved"]["macs"] <= 0.6
    assert errors[0] < 0.5 * errors[1]


def test_gates_of_a_grouped_reader_are_those_of_its_weights():
    model, variables, batches, graph = _grouped()
    data = Calibration(batches)
    found = gate_gradients(graph, find_taps(graph), variables, data, cross_entropy)

    def loss(params, x, y):
        return cross_entropy(model.apply({"params": params}, x[None]), y[None])[0]

    each = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))
    x, y = (np.concatenate(part) for part in zip(*batches, strict=True))
    grads = trees.flatten({"params": each(variables["params"], x, y)})
    for group in graph.groups:
        naive = np.asarray(
            weight_gate_gradients(
                group, trees.flatten(variables), grads, roles=("consumer",)
            )
        )
        np.testing.assert_allclose(
            found[group.name][1], np.abs(naive).mean(0), atol=1e-4 * np.abs(naive).max()
        )
