"""Full-size networks whose norms run over the channels that are left."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import half_plan, make, random_batches, random_variables

import jaxprune as jp
from jaxprune.graph import evaluate, tree_arguments
from jaxprune.graph.reductions import Reductions
from jaxprune.methods.cpli import Objective, chooser, cpli, loss_terms
from jaxprune.methods.measure import Calibration, cross_entropy
from jaxprune.methods.refitting import Refitting
from jaxprune.methods.relay import Relay
from jaxprune.methods.sensitivity import Probe, divergence
from jaxprune.methods.taps import find_taps
from jaxprune.slicing import mask_variables

TOKENS = jax.random.normal(jax.random.key(1), (2, 6, 5))


def _standardised(h):
    spread = h.std(-1, keepdims=True, ddof=1)
    return (h - h.mean(-1, keepdims=True)) / (spread + 0.1)


FUNCTIONS = {
    "standardised": _standardised,
    "largest": lambda h: h / (1 + jnp.abs(h).max(-1, keepdims=True)),
    "softmax": lambda h: jax.nn.softmax(h - 9),
    "product": lambda h: h * jnp.einsum("btc,btc->bt", h, h)[..., None],
    "own division": lambda h: h - h.sum(-1, keepdims=True) / h.shape[-1],
}


class GroupNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (8, 12):
            x = nn.Conv(width, (3, 3))(x)
            x = nn.relu(nn.GroupNorm(4)(x))
        return nn.Dense(5)(x.mean((1, 2)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.Dense(12)(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(h)), None


class Scanned(nn.Module):
    """Its norms lie inside of a loop."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        scanned = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = scanned()(x, None)
        return nn.Dense(5)(nn.RMSNorm()(x).mean(1))


def _case(name):
    if name in FUNCTIONS:
        keys = jax.random.split(jax.random.key(0))
        params = {
            "a": jax.random.normal(keys[0], (5, 9)),
            "b": jax.random.normal(keys[1], (9, 3)),
        }

        def apply(params, x):
            return (FUNCTIONS[name](x @ params["a"]) @ params["b"]).mean(1)

        return apply, params, TOKENS
    if name == "vit":
        return make("vit_cifar")
    model, x = {
        "group norm": (
            GroupNormed(),
            jax.random.normal(jax.random.key(2), (2, 8, 8, 3)),
        ),
        "scan": (Scanned(), TOKENS),
    }[name]
    return model, random_variables(model, x), x


def _vit():
    """A small ViT, its variables, a batch of images, graph and calibration data."""
    model, variables, x = make("vit_cifar")
    batches = random_batches(x.shape[1:], classes=10, count=8, size=8)
    x = batches[0][0]
    return model, variables, x, jp.trace(model, variables, x), Calibration(batches)


@pytest.mark.parametrize("name", [*FUNCTIONS, "group norm", "scan", "vit"])
def test_a_full_size_network_gives_what_the_slim_one_does(name):
    model, variables, x = _case(name)
    graph = jp.trace(model, variables, x)
    plan = half_plan(graph)
    reductions = Reductions(graph)
    assert reductions and reductions.first(plan) is not None
    masked = mask_variables(graph, plan, variables)
    slim = jp.shrink(graph, plan, variables)
    handle = graph.handle.rebuild(slim.variables, slim.report["settings"])
    expected = jax.tree.leaves(handle(slim.variables, x))
    found = jax.jit(
        lambda v, left: evaluate(
            graph.closed,
            tree_arguments(v, (x,)),
            before=reductions.before(left),
            loops=True,
        )
    )(masked, reductions.left(plan))
    plain = jax.tree.leaves(graph.handle(masked, x))
    np.testing.assert_allclose(found[0], expected[0], atol=2e-5)
    assert np.abs(plain[0] - expected[0]).max() > 1e-3


def test_consumers_are_measured_and_refitted_behind_the_norm_that_is_left():
    """What the refit meets in the slim network: a norm over half of the stream."""
    _, variables, x, graph, data = _vit()
    stream = max(graph.groups, key=lambda group: len(group.slots))
    plan = graph.complete({stream.name: np.arange(0, stream.size, 2)})
    tap = next(t for t in find_taps(graph) if t.path.endswith("hidden/kernel"))
    masked = mask_variables(graph, plan, variables)
    relay = Relay(graph, variables, data, positions=None)
    found = relay.moments([tap], masked, plan, seed=0, second=False)[tap.name]
    slim = jp.shrink(graph, plan, variables)
    seen = []

    def keep(next_fun, args, kwargs, context):
        if context.module.name == "hidden":
            seen.append(np.asarray(args[0]))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(keep):
        slim.model.apply(slim.variables, x)
    kept = np.asarray(found.mean_x)[plan[stream.name]]
    np.testing.assert_allclose(kept, seen[0].mean((0, 1)), atol=1e-5)


def test_a_norm_alone_may_run_over_what_is_left():
    """The stream is the original's, however late it is read; only its norms are not."""
    model, variables, x, graph, data = _vit()
    stream = max(graph.groups, key=lambda group: len(group.slots))
    plan = graph.complete({stream.name: np.arange(0, stream.size, 2)})
    taps = find_taps(graph)
    last = [t for t in taps if t.path.endswith("hidden/kernel")][-1]
    relay = Relay(
        graph, variables, data, positions=None, given={tap.site for tap in taps}
    )
    measure = relay.measurement([last], second=False)
    found = np.asarray(measure(variables, plan, seed=0)[last.name].mean_x)
    read = []

    def keep(next_fun, args, kwargs, context):
        if context.module.name == "norm2":
            norm = context.module.variables["params"]
            read.append((np.asarray(args[0]), norm))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(keep):
        model.apply(variables, x)
    values, norm = read[-1]
    kept = plan[stream.name]
    left = values[..., kept]
    spread = np.sqrt(left.var(-1, keepdims=True) + model.norm_epsilon)
    normed = (left - left.mean(-1, keepdims=True)) / spread
    expected = normed * norm["scale"][kept] + norm["bias"][kept]
    np.testing.assert_allclose(found[kept], expected.mean((0, 1)), atol=1e-5)
    plain = np.asarray(measure(variables, seed=0)[last.name].mean_x)
    assert np.abs(plain[kept] - found[kept]).max() > 1e-3


def test_a_probe_foresees_what_pruning_before_a_norm_loses():
    """One consumer: it is refitted alike, to what the slim network's norm hands it."""

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5)(nn.LayerNorm()(nn.Dense(16)(x)))

    batches = random_batches((24,), classes=5, count=128, size=32)
    model = Normed()
    variables = random_variables(model, batches[0][0])
    graph, data = jp.trace(model, variables, batches[0][0]), Calibration(batches)
    (group,), taps = graph.groups, find_taps(graph)
    counts, refitting = {group.name: 10}, Refitting(ridge=0.0)
    objective = Objective()
    loss_term = loss_terms(graph, variables, data, cross_entropy, objective)
    options = {"refitting": refitting, "groups": [group]}
    pruned = cpli(
        graph, variables, data, counts,
        fallback={}, loss=loss_term, objective=objective, **options,
    )  # fmt: skip
    choose = chooser(graph, counts, {}, loss_term, objective, ridge=0.0)
    probe = Probe(
        graph, variables, data, taps, choose, loss_fn=cross_entropy, **options
    )
    loss = divergence(graph, variables, data, cross_entropy)
    expected = loss(pruned.variables, pruned.plan)
    assert probe.loss(counts) == pytest.approx(expected, rel=0.01)


def test_the_loss_of_a_plan_is_that_of_the_slim_network():
    model, variables, x, graph, data = _vit()
    plan = graph.complete(half_plan(graph))
    loss = divergence(graph, variables, data, cross_entropy)
    masked = mask_variables(graph, plan, variables)
    slim = jp.shrink(graph, plan, variables)
    original, pruned = (
        jax.nn.log_softmax(m.apply(v, x))
        for m, v in ((model, variables), (slim.model, slim.variables))
    )
    expected = (jnp.exp(original) * (original - pruned)).sum(-1).mean()
    np.testing.assert_allclose(loss(masked, plan), expected, rtol=0.02)
    assert abs(loss(masked) - expected) > 0.05 * expected
