"""What a refit makes up for where its output enters a sum."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import make, random_batches, randomise

import jaxprune as jp
from jaxprune import models
from jaxprune.methods.measure import Calibration
from jaxprune.methods.refitting import group_taps
from jaxprune.methods.relay import Relay
from jaxprune.methods.shortcuts import find_shortcuts
from jaxprune.methods.taps import find_taps
from jaxprune.models.resnet import resnet_cifar


class Residual(nn.Module):
    """A stem, residual branches whose last layers are normalised, and maybe a head."""

    blocks: int = 1
    head: bool = True
    scale: float = 1.0

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), name="stem")(x)
        for k in range(self.blocks):
            inner = nn.relu(nn.Conv(8, (3, 3), name=f"inner{k}")(x))
            inner = nn.Conv(6, (3, 3), use_bias=False, name=f"outer{k}")(inner)
            inner = nn.BatchNorm(use_running_average=True, name=f"norm{k}")(inner)
            x = x + self.scale * inner
        return nn.Dense(3, name="head")(x.mean((1, 2))) if self.head else x


def _residual(**fields):
    model, batches = Residual(**fields), random_batches((6, 6, 2), count=20, size=8)
    variables = randomise(model.init(jax.random.key(0), batches[0][0]))
    return model, variables, batches, jp.trace(model, variables, batches[0][0])


def _turn(graph, taps):
    """The last group that every tap reads, in the order of the groups."""
    return {
        tap.site: number
        for number, group in enumerate(graph.groups)
        for tap in group_taps(taps, group)
    }


def _branches(model, variables, x):
    """The stem's output and the last layer's, (B, H, W, C) each."""
    _, found = model.apply(variables, x, capture_intermediates=True)
    layers = found["intermediates"]
    return layers["stem"]["__call__"][0], layers["outer0"]["__call__"][0]


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_target_is_what_the_sum_is_short_of(scale):
    model, variables, batches, graph = _residual(scale=scale)
    taps = find_taps(graph)
    shortcuts = find_shortcuts(graph, taps, _turn(graph, taps))
    (outer,) = [tap for tap in taps if "outer" in tap.path]
    assert list(shortcuts) == [outer.site]
    # The network pruned so far has another stem.
    moved = jax.tree.map(lambda leaf: leaf, variables)
    kernel = variables["params"]["stem"]["kernel"]
    moved["params"]["stem"]["kernel"] = kernel.at[..., 2].mul(-0.5)
    norm, stats = variables["params"]["norm0"], variables["batch_stats"]["norm0"]
    gain = scale * norm["scale"] / jnp.sqrt(stats["var"] + 1e-5)
    x = np.concatenate([x for x, _ in batches])
    stem, target = _branches(model, variables, x)
    wanted = target + (stem - _branches(model, moved, x)[0]) / gain
    relay = Relay(
        graph, variables, Calibration(batches), positions=None, shortcuts=shortcuts
    )
    found = relay.moments([outer], moved, seed=0)[outer.path]
    np.testing.assert_allclose(
        found.mean_y, wanted.mean((0, 1, 2)), rtol=1e-4, atol=1e-5
    )
    plain = Relay(graph, variables, Calibration(batches), positions=None)
    without = plain.moments([outer], moved, seed=0)[outer.path]
    np.testing.assert_allclose(
        without.mean_y, target.mean((0, 1, 2)), rtol=1e-4, atol=1e-5
    )


class Context(nn.Module):
    """One vector of the whole map is added at every position of it."""

    @nn.compact
    def __call__(self, x):
        inner = nn.relu(nn.Dense(8, name="inner0")(x.mean((1, 2), keepdims=True)))
        x = nn.Conv(6, (3, 3), name="stem")(x)
        x = x + nn.Dense(6, use_bias=False, name="outer0")(inner)
        return nn.Dense(7, name="head")(nn.relu(x).mean((1, 2)))


def test_what_is_added_at_every_position_makes_up_for_the_mean():
    model, batches = Context(), random_batches((6, 6, 2), count=20, size=8)
    variables = randomise(model.init(jax.random.key(0), batches[0][0]))
    graph = jp.trace(model, variables, batches[0][0])
    taps = find_taps(graph)
    (outer,) = [tap for tap in taps if "outer" in tap.path]
    moved = jax.tree.map(lambda leaf: leaf, variables)
    moved["params"]["stem"]["kernel"] = -variables["params"]["stem"]["kernel"]
    x = np.concatenate([x for x, _ in batches])
    stem, target = _branches(model, variables, x)
    wanted = target + (stem - _branches(model, moved, x)[0]).mean((1, 2), keepdims=True)
    relay = Relay(
        graph, variables, Calibration(batches), positions=None,
        shortcuts=find_shortcuts(graph, taps, {outer.site: 0}),
    )  # fmt: skip
    found = relay.moments([outer], moved, seed=0)[outer.path]
    np.testing.assert_allclose(
        found.mean_y, wanted.mean((0, 1, 2)), rtol=1e-4, atol=1e-5
    )
    slim = jp.prune(model, variables, batches, method="cpli", keep=0.5)
    assert slim.model.apply(slim.variables, x).shape == (20, 7)


def test_outputs_that_do_not_reach_the_sum_keep_their_target():
    model, variables, batches, _ = _residual()
    scale = variables["params"]["norm0"]["scale"]
    variables["params"]["norm0"]["scale"] = scale.at[1].set(0.0)
    graph = jp.trace(model, variables, batches[0][0])
    taps = find_taps(graph)
    (outer,) = [tap for tap in taps if "outer" in tap.path]
    moved = jax.tree.map(lambda leaf: 1.2 * leaf, variables)
    relay = Relay(
        graph, variables, Calibration(batches), positions=None,
        shortcuts=find_shortcuts(graph, taps, _turn(graph, taps)),
    )  # fmt: skip
    mean = relay.moments([outer], moved, seed=0)[outer.path].mean_y
    x = np.concatenate([x for x, _ in batches])
    target = _branches(model, variables, x)[1].mean((0, 1, 2))
    assert np.isfinite(mean).all()
    np.testing.assert_allclose(mean[1], target[1], rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(mean - target))[0] > 0.01


@pytest.mark.parametrize(
    ("name", "sums", "compensating"),
    [("resnet20", 9, "conv2"), ("resnet50", 16, "conv3"), ("vit_cifar", 4, "")],
)
def test_one_layer_of_every_sum_compensates(name, sums, compensating):
    """The last of each residual branch, never the projection beside it."""
    model, variables, x = make(name)
    graph = jp.trace(model, variables, x)
    taps = find_taps(graph)
    found = find_shortcuts(graph, taps, _turn(graph, taps))
    assert len({shortcut.site for shortcut in found.values()}) == sums == len(found)
    paths = [tap.path for tap in taps if tap.site in found]
    assert all(compensating in path for path in paths), paths


class _Doubled(nn.Module):
    """A layer's result added to itself: no other branch can make up for anything."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="outer")(nn.relu(nn.Dense(8, name="inner")(x)))
        return nn.Dense(3, name="head")(x + x)


def test_a_result_added_to_itself_is_no_shortcut():
    model, x = _Doubled(), jnp.ones((4, 5))
    variables = randomise(model.init(jax.random.key(0), x))
    graph = jp.trace(model, variables, x)
    taps = find_taps(graph)
    assert len(taps) == 3
    assert find_shortcuts(graph, taps, _turn(graph, taps)) == {}


def _errors(option, *, head, **options):
    """Squared error that two residual blocks are left with: (option on, option off)."""
    model, variables, batches, _ = _residual(blocks=2, head=head)
    x = np.concatenate([x for x, _ in batches])
    wanted = model.apply(variables, x)
    for value in (True, False):
        slim = jp.prune(
            model, variables, batches, positions=None, **{option: value}, **options
        )
        found = slim.model.apply(slim.variables, x)
        yield float(jnp.square(found - wanted).mean())


def test_compensation_leaves_a_smaller_error_in_the_sum():
    """What the first branch has lost, the second makes up for in part."""
    made_up, lost = _errors(
        "compensate", head=False, method="lasso", keep=0.5, allocation="uniform"
    )
    assert made_up < lost


def test_the_second_refit_leaves_a_smaller_error():
    twice, once = _errors("refit_again", head=True, method="l1", keep=0.6)
    assert twice < 0.9 * once


def test_what_was_refitted_too_early_is_refitted_again():
    """The readers of a residual stream; never those of a chain of layers."""
    calls = {}
    networks = {
        "resnet8": resnet_cifar(depth=8),
        "vgg_small": models.create("vgg_small"),
    }
    for name, model in networks.items():
        x = jnp.zeros((1, 32, 32, 3) if name == "resnet8" else (1, 8, 8, 1))
        variables = randomise(model.init(jax.random.key(0), x))
        batches = random_batches(x.shape[1:], count=16, size=8)
        stages = []
        jp.prune(
            model, variables, batches, method="l1", keep=0.5, verify=False,
            on_progress=lambda stage, done, total, s=stages: s.append(stage),
        )  # fmt: skip
        calls[name] = stages.count("refit")
    assert calls == {"resnet8": 7, "vgg_small": 0}
