"""The channel graph against what networks really do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import ZOO, make, randomise

import jaxprune as jp
from jaxprune import models, trees
from jaxprune.errors import GraphError

# Normalisations over channels react to any of them. At test width the last layers of
# vgg16_seed, 13 without BatchNorm, no longer see its input.
# The ImageNet ResNets take longest to compile and are covered by the surgeon's tests.
LEFT_OUT = ("vgg16_seed", "vit_cifar", "vit_tiny", "resnet18", "resnet50")
PERTURBED = [n for n in ZOO if n not in LEFT_OUT]


def _set(leaf, slot, channel, value):
    index = [slice(None)] * leaf.ndim
    index[slot.axis] = slot.index[channel]
    return leaf.at[tuple(index)].set(value)


def _silenced_is_deaf(graph, variables, x, group, channel, shift=0):
    """True if nothing but the consumers reads the channel: with their slices at
    zero, noise in all the channel's other slots leaves the outputs as they are."""
    leaves = trees.flatten(variables)
    for slot in group.consumers:
        leaves[slot.path] = _set(leaves[slot.path], slot, channel, 0.0)
    noisy = dict(leaves)
    for slot in group.slots:
        if slot.role != "consumer":
            other = (channel + shift) % group.size
            noisy[slot.path] = _set(noisy[slot.path], slot, other, 3.7)
    run = jax.jit(
        lambda leaves: graph.handle(trees.unflatten_like(variables, leaves), x)
    )
    return np.allclose(run(leaves), run(noisy), atol=1e-5)


@pytest.mark.parametrize("name", PERTURBED)
def test_groups_are_what_perturbation_finds(name):
    model, variables, x = make(name)
    graph = jp.trace(model, variables, x)
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(graph.groups))[:2]
    for group in (graph.groups[k] for k in chosen):
        channel = int(rng.integers(group.size))
        assert _silenced_is_deaf(graph, variables, x, group, channel), group.name
        # The oracle must see a graph that is off by one channel.
        assert not _silenced_is_deaf(graph, variables, x, group, channel, shift=1)


@pytest.mark.parametrize("name", list(ZOO))
def test_every_channel_has_one_place(name):
    model, variables, x = make(name)
    graph = jp.trace(model, variables, x)
    units = np.concatenate([group.units for group in graph.groups])
    assert sorted(units) == list(range(graph.channels.count))
    leaves = trees.flatten(variables)
    for group in graph.groups:
        assert group.size >= 2
        for slot in group.slots:
            assert slot.index.shape[0] == group.size
            assert slot.index.max() < leaves[slot.path].shape[slot.axis]
            assert (np.diff(slot.index, axis=1) > 0).all()


def test_groups_of_a_basic_resnet():
    model, variables, x = make("resnet20")
    graph = jp.trace(model, variables, x)
    sizes = {group.name: group.size for group in graph.groups}
    stages = {"conv": 8, "block3/conv2": 16, "block6/conv2": 32}
    inner = {f"block{k}/conv1": 8 * 2 ** (k // 3) for k in range(9)}
    assert sizes == {**stages, **inner}
    stream = graph.group("conv")
    assert {slot.path for slot in stream.consumers} == {
        *(f"params/block{k}/conv1/kernel" for k in range(4)),
        "params/block3/proj/kernel",
    }
    assert list(sizes)[:2] == ["conv", "block0/conv1"]  # network order


def test_groups_of_attention_are_heads_and_widths():
    model, variables, x = make("vit_cifar")
    graph = jp.trace(model, variables, x)
    sizes = sorted(group.size for group in graph.groups)
    # embed; per block: 4 heads, query/key width 6, value width 6, mlp 96
    assert sizes == sorted([24, *[4, 6, 6, 96] * 2])


def test_flattened_features_give_a_channel_many_indices():
    model, variables, x = make("vgg11_bn")
    graph = jp.trace(model, variables, x)
    head = next(s for s in graph.group("conv7").consumers if "hidden0" in s.path)
    kernel = trees.flatten(variables)[head.path]
    assert head.index.shape == (32, kernel.shape[0] // 32)
    assert (head.index % 32 == np.arange(32)[:, None]).all()


@pytest.mark.parametrize(
    ("name", "shape", "macs"),
    [
        # CHIP and HRank count 313.73 M: one more hidden layer of 512, and BatchNorm.
        ("cifar_vgg16_bn", (32, 32, 3), 313_201_664),
        # torchvision's published GMACs: 15.47, 1.81, 4.09, all with the head.
        ("vgg16", (224, 224, 3), 15_470_264_320),
        ("resnet18", (224, 224, 3), 1_814_073_344),
        ("resnet50", (224, 224, 3), 4_089_184_256),
    ],
)
def test_macs_are_the_published_counts(name, shape, macs):
    model = models.create(name)
    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    graph = jp.trace(model, variables, x)
    assert graph.macs() == macs
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert graph.params() == count


@pytest.mark.parametrize("name", list(ZOO))
def test_costs_of_a_plan_are_those_of_the_slim_model(name):
    model, variables, x = make(name)
    graph = jp.trace(model, variables, x)
    plan = {g.name: np.arange(max(1, g.size // 3)) for g in graph.groups}
    slim = jp.shrink(graph, plan)
    again = jp.trace(slim.model, slim.variables, x)
    for kind in ("macs", "params", "bytes"):
        assert graph.cost(kind, plan) == again.cost(kind)
        assert graph.cost(kind, plan) < graph.cost(kind)


def test_tracing_needs_no_arrays_and_no_particular_batch():
    model, variables, x = make("resnet20")
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), variables)
    real = jp.trace(model, variables, x)
    other = jp.trace(model, abstract, jax.ShapeDtypeStruct((5, *x.shape[1:]), x.dtype))
    assert [g.name for g in real.groups] == [g.name for g in other.groups]
    for a, b in zip(real.groups, other.groups, strict=True):
        assert all((s.index == t.index).all() for s, t in zip(a.slots, b.slots))
    assert real.macs() == other.macs()


class _Odd(nn.Module):
    """An operation without a rule between two layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="a")(x)
        x = jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        x = nn.Dense(8, name="b")(x)
        return nn.Dense(3, name="c")(nn.relu(x))


def test_an_unknown_operation_freezes_what_it_touches_and_is_named():
    model, x = _Odd(), jnp.ones((9, 4))
    variables = model.init(jax.random.key(0), x)
    graph = jp.trace(model, variables, x)
    assert [group.name for group in graph.groups] == ["b"]
    assert any("test_graph.py" in where for where in graph.unknown.values())
    assert "is not known" in graph.explain("params/a/kernel")
    assert next(iter(graph.unknown)) in str(graph)
    with pytest.raises(GraphError, match="has no rule"):
        jp.trace(model, variables, x, strict=True)


def test_explain_says_what_is_tied_and_why_frozen():
    model, variables, x = make("vgg_small")
    graph = jp.trace(model, variables, x)
    first = graph.explain("params/conv0/kernel")
    assert "belongs to group 'conv0'" in first
    assert "params/conv1/kernel axis 2 (consumer)" in first
    assert "output of the model" in graph.explain("params/linear/bias")
    assert "outputs=" not in graph.explain("params/linear/bias")
    with pytest.raises(GraphError, match="no leaf 'params/conv99/kernel'"):
        graph.explain("params/conv99/kernel")


def test_ignored_layers_keep_their_channels():
    model, variables, x = make("vgg_small")
    graph = jp.trace(model, variables, x, ignore=["conv0"])
    assert "conv0" not in {group.name for group in graph.groups}
    with pytest.raises(GraphError, match="matches no leaf"):
        jp.trace(model, variables, x, ignore=["convolution*"])


class _Shuffle(nn.Module):
    """Ops on which peers are silently wrong: flip, roll, pad and shuffle channels."""

    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="a")(x)
        if self.kind == "flip":
            x = jnp.flip(x, -1)
        elif self.kind == "roll":
            x = jnp.roll(x, 3, -1)
        elif self.kind == "pad":
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (2, 2)))
        elif self.kind == "shuffle":
            b, h, w, c = x.shape
            x = jnp.swapaxes(x.reshape(b, h, w, 2, c // 2), 3, 4).reshape(b, h, w, c)
        x = nn.Conv(8, (3, 3), name="b")(nn.relu(x))
        return nn.Dense(3, name="c")(x.mean((1, 2)))


@pytest.mark.parametrize("kind", ["flip", "roll", "pad", "shuffle"])
def test_ops_that_move_channels_are_followed_or_refused(kind):
    model, x = _Shuffle(kind), jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
    variables = randomise(model.init(jax.random.key(0), x))
    graph = jp.trace(model, variables, x)
    rng = np.random.default_rng(0)
    plan = {
        g.name: np.sort(rng.permutation(g.size)[: g.size // 2]) for g in graph.groups
    }
    assert jp.verify(graph, plan, x) < 1e-5
    if kind in ("flip", "pad", "shuffle"):
        assert any(group.name.startswith("a") for group in graph.groups)


class _Asked(nn.Module):
    """Asks a slice for its size, as code does for a kernel's fan-in."""

    features: int

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal()
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        return x @ (kernel / np.sqrt(kernel[..., 0].size))


class _AskedTwice(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(_Asked(12, name="first")(x))
        seen = self.variable("state", "seen", jnp.zeros, (12,))
        _ = 0.9 * seen.value + 0.1 * x.mean(0)  # of no use, but its shapes must agree
        x = nn.silu(nn.remat(_Asked)(16, name="second")(x))
        return _Asked(3, name="last")(x)


@pytest.mark.parametrize("replay", [False, True])
def test_what_nothing_reads_freezes_nothing(replay):
    model, x = _AskedTwice(), jax.random.normal(jax.random.key(0), (2, 5))
    variables = model.init(jax.random.key(1), x)
    graph = jp.trace(model, variables, x, replay=replay)
    assert [(g.name, g.size) for g in graph.groups] == [("first", 12), ("second", 16)]
    plan = {g.name: np.arange(1, g.size, 2) for g in graph.groups}
    slim = jp.shrink(graph, plan, replay=replay)
    assert slim.report["left_whole"] == {}
    assert slim.variables["state"]["seen"].shape == (6,)
    assert jp.verify(graph, plan, x) < 1e-6
