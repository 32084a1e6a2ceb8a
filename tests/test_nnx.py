"""NNX objects: every layer that holds arrays follows, and slim objects live on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from zoo import random_plan

import jaxprune as jp
from jaxprune import slicing, trees
from jaxprune.errors import GraphError


class _Between(nnx.Module):
    """A layer between two others, so that both of its sides can shrink."""

    def __init__(self, layer, width=8, inputs=5, rngs=None):
        self.before = nnx.Linear(inputs, width, rngs=rngs)
        self.layer = layer
        self.after = nnx.LinearGeneral(layer.out, 3, axis=layer.axis, rngs=rngs)

    def __call__(self, x):
        return self.after(self.layer(nnx.tanh(self.before(x))))


class _Layer(nnx.Module):
    """One layer and the width that comes out of it."""

    def __init__(self, layer, out, axis=-1, call=None):
        self.layer, self.out, self.axis = layer, out, axis
        self.call = call

    def __call__(self, x):
        return self.layer(x) if self.call is None else self.call(self.layer, x)


class _Words(nnx.Module):
    """An embedding that is also the output layer."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.hidden = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.embed.attend(nnx.relu(self.hidden(self.embed(x))))


class _Net(nnx.Module):
    """Statistics, dropout, a grouped convolution, a layer used twice."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 12, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.grouped = nnx.Conv(12, 12, (3, 3), feature_group_count=3, rngs=rngs)
        self.group_norm = nnx.GroupNorm(12, num_groups=3, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.shared = nnx.Linear(12, 12, rngs=rngs)
        self.tied = self.shared
        self.head = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = nnx.relu(self.group_norm(self.grouped(x))).mean((1, 2))
        x = nnx.relu(self.shared(self.drop(x)))
        return self.head(self.tied(x))


class _Stack(nnx.Module):
    """Blocks stacked by nnx.vmap and run by nnx.scan."""

    def __init__(self, depth, rngs):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Sequential(
                nnx.Linear(8, 12, rngs=rngs), nnx.gelu, nnx.Linear(12, 8, rngs=rngs)
            )

        self.blocks = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return x + block(x)

        return run(x, self.blocks)


class _Experts(nnx.Module):
    """The same input through stacked layers in parallel."""

    def __init__(self, count, rngs):
        @nnx.split_rngs(splits=count)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(8, 6, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        run = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
        return run(self.layers, x).sum(0)


def _cross(layer, x):
    return layer(x, jnp.flip(x, -2))


SEQUENCE, IMAGE = (2, 6, 5), (2, 6, 6, 5)
# The layer, the features that come out, the shape of the input, how it is called.
LAYERS = {
    "linear": (lambda r: nnx.Linear(8, 9, rngs=r), 9, SEQUENCE),
    "linear_general": (
        lambda r: nnx.LinearGeneral(8, (3, 4), rngs=r),
        (3, 4),
        SEQUENCE,
    ),
    "linear_general_batch": (
        lambda r: nnx.LinearGeneral(8, 4, batch_axis={0: 2}, rngs=r),
        4,
        SEQUENCE,
    ),
    "einsum": (
        lambda r: nnx.Einsum("bti,io->bto", (8, 7), (7,), rngs=r),
        7,
        SEQUENCE,
    ),
    "conv1d": (lambda r: nnx.Conv(8, 9, (3,), rngs=r), 9, SEQUENCE),
    "conv2d": (lambda r: nnx.Conv(8, 9, (3, 3), padding="CIRCULAR", rngs=r), 9, IMAGE),
    "conv_grouped": (
        lambda r: nnx.Conv(8, 12, (3, 3), feature_group_count=4, rngs=r),
        12,
        IMAGE,
    ),
    "conv_depthwise": (
        lambda r: nnx.Conv(8, 16, (3, 3), feature_group_count=8, rngs=r),
        16,
        IMAGE,
    ),
    "conv_masked": (
        lambda r: nnx.Conv(8, 9, (3,), mask=jnp.ones((3, 8, 9)), rngs=r),
        9,
        SEQUENCE,
    ),
    "conv_transpose": (
        lambda r: nnx.ConvTranspose(8, 9, (3, 3), strides=2, rngs=r),
        9,
        IMAGE,
    ),
    "conv_transpose_t": (
        lambda r: nnx.ConvTranspose(8, 9, (3, 3), transpose_kernel=True, rngs=r),
        9,
        IMAGE,
    ),
    "batch_norm": (lambda r: nnx.BatchNorm(8, rngs=r), 8, SEQUENCE),
    "layer_norm": (lambda r: nnx.LayerNorm(8, rngs=r), 8, SEQUENCE),
    "rms_norm": (lambda r: nnx.RMSNorm(8, rngs=r), 8, SEQUENCE),
    "group_norm": (lambda r: nnx.GroupNorm(8, num_groups=4, rngs=r), 8, IMAGE),
    "instance_norm": (lambda r: nnx.InstanceNorm(8, rngs=r), 8, IMAGE),
    "dropout": (lambda r: nnx.Dropout(0.5, rngs=r), 8, SEQUENCE),
    "attention": (
        lambda r: nnx.MultiHeadAttention(
            4, 8, qkv_features=24, decode=False, normalize_qk=True, rngs=r
        ),
        8,
        SEQUENCE,
    ),
    "attention_cross": (
        lambda r: nnx.MultiHeadAttention(
            4, 8, qkv_features=24, out_features=10, decode=False, rngs=r
        ),
        10,
        SEQUENCE,
        _cross,
    ),
    "attention_gqa": (
        lambda r: nnx.MultiHeadAttention(
            4, 8, qkv_features=24, num_kv_heads=2, decode=False, rngs=r
        ),
        8,
        SEQUENCE,
    ),
    "lstm": (lambda r: nnx.RNN(nnx.LSTMCell(8, 7, rngs=r)), 7, SEQUENCE),
    "lstm_optimized": (
        lambda r: nnx.RNN(nnx.OptimizedLSTMCell(8, 7, rngs=r)),
        7,
        SEQUENCE,
    ),
    "gru": (lambda r: nnx.RNN(nnx.GRUCell(8, 7, rngs=r)), 7, SEQUENCE),
    "simple_cell": (lambda r: nnx.RNN(nnx.SimpleCell(8, 7, rngs=r)), 7, SEQUENCE),
    "bidirectional": (
        lambda r: nnx.Bidirectional(
            nnx.RNN(nnx.GRUCell(8, 6, rngs=r)), nnx.RNN(nnx.LSTMCell(8, 7, rngs=r))
        ),
        13,
        SEQUENCE,
    ),
    "lora": (
        lambda r: nnx.LoRA(8, 4, 9, base_module=nnx.Linear(8, 9, rngs=r), rngs=r),
        9,
        SEQUENCE,
    ),
    "lora_linear": (lambda r: nnx.LoRALinear(8, 9, lora_rank=4, rngs=r), 9, SEQUENCE),
    "weight_norm": (
        lambda r: nnx.WeightNorm(nnx.Linear(8, 9, rngs=r), rngs=r),
        9,
        SEQUENCE,
    ),
    "spectral_norm": (
        lambda r: nnx.SpectralNorm(nnx.Conv(8, 9, (3,), rngs=r), rngs=r),
        9,
        SEQUENCE,
    ),
    "prelu": (lambda r: nnx.PReLU(), 8, SEQUENCE),
    "scanned": (lambda r: _Stack(3, r), 8, SEQUENCE),
    "vmapped": (lambda r: _Experts(3, r), 6, SEQUENCE),
}


def _make(name):
    rngs = nnx.Rngs(0, carry=1)
    make, out, shape, *call = LAYERS[name]
    axis = (-2, -1) if isinstance(out, tuple) else -1
    model = _Between(_Layer(make(rngs), out, axis, *call), rngs=rngs)
    return _moved(model), jax.random.normal(jax.random.key(1), shape)


def _half(graph, seed=0):
    """A plan that removes half of every group."""
    rng = np.random.default_rng(seed)
    return {
        group.name: np.sort(rng.permutation(group.size)[: max(1, group.size // 2)])
        for group in graph.groups
    }


def _moved(model, seed=0):
    """The object with all its arrays off their initial values."""
    rng = np.random.default_rng(seed)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        floating = isinstance(leaf, nnx.Variable) and jnp.issubdtype(
            leaf.get_value().dtype, jnp.floating
        )
        if floating and path[-1] not in ("kernel",):
            value = leaf.get_value()
            leaf.set_value(value + 0.3 * np.abs(rng.normal(size=value.shape)))
    return model


@pytest.mark.parametrize("name", list(LAYERS))
def test_every_layer_follows_its_arrays(name):
    model, x = _make(name)
    graph = jp.trace(model, x)
    assert len(graph.groups) >= 1
    plan = _half(graph)
    slim = jp.shrink(graph, plan)
    assert slim.report["left_whole"] == {}
    assert jp.verify(graph, plan, x) < 1e-5


class _Remat(nnx.Module):
    """A layer whose call is remembered by its input alone."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return nnx.remat(lambda layer, x: layer(x))(self.layer, x)


@pytest.mark.parametrize("wrap", [lambda layer: layer, _Remat])
@pytest.mark.parametrize(
    "sizes", [{"num_groups": 4}, {"num_groups": None, "group_size": 2}]
)
def test_groups_of_a_norm_without_arrays_follow(wrap, sizes, tmp_path):
    rngs = nnx.Rngs(0)
    norm = nnx.GroupNorm(8, **sizes, use_bias=False, use_scale=False, rngs=rngs)
    model = _moved(_Between(_Layer(wrap(norm), 8), rngs=rngs))
    x = jax.random.normal(jax.random.key(1), IMAGE)
    graph = jp.trace(model, x)
    assert {g.name: g.size for g in graph.groups} == {"before": 4, "before.1": 2}
    for plan in (
        {"before": [1, 3]},
        {"before.1": [0]},
        {"before": [2], "before.1": [1]},
    ):
        slim = jp.shrink(graph, plan)
        assert slim.report["left_whole"] == {}
        assert jp.verify(graph, plan, x) < 1e-5
        left = {g.name: g.size for g in jp.trace(slim.model, x).groups}
        assert left.get("before", 1) == len(plan.get("before", range(4)))
    jp.save(tmp_path / "slim", slim)
    loaded = jp.load(tmp_path / "slim", model)
    np.testing.assert_array_equal(loaded.model(x), slim.model(x))


def _net():
    model = _moved(_Net(nnx.Rngs(0)))
    return model, jax.random.normal(jax.random.key(2), (4, 5, 5, 3))


def _leaves(model):
    """Array leaves of an object by name, without random number state."""
    state = nnx.state(model, nnx.Not(nnx.RngState))
    return trees.flatten(nnx.to_pure_dict(state))


def test_the_users_object_is_never_changed():
    model, x = _net()
    before = {k: np.array(v) for k, v in _leaves(model).items()}
    graphdef = nnx.graphdef(model)
    graph = jp.trace(model, x)
    jp.verify(graph, random_plan(graph), x)
    assert nnx.graphdef(model) == graphdef  # in train mode as before, no size changed
    assert not model.drop.deterministic
    for name, leaf in _leaves(model).items():
        np.testing.assert_array_equal(leaf, before[name])


def test_a_trace_is_of_the_object_as_it_was():
    model, x = _net()
    graph = jp.trace(model, x)
    old = np.array(model.head.kernel[...])
    model.head.kernel.set_value(jnp.zeros((12, 4)))
    model.conv.out_features = 99
    slim = jp.shrink(graph, graph.full_plan())
    np.testing.assert_array_equal(slim.model.head.kernel[...], old)
    assert slim.model.conv.out_features == 12


def test_keeping_all_is_the_identity():
    model, x = _net()
    graph = jp.trace(model, x)
    slim = jp.shrink(graph, graph.full_plan())
    assert nnx.graphdef(slim.model) == nnx.graphdef(model)
    for name, leaf in _leaves(slim.model).items():
        np.testing.assert_array_equal(leaf, _leaves(model)[name])
    assert slim.model.tied is slim.model.shared
    assert slim.model is not model


def test_masking_the_consumers_is_the_same_where_no_norm_crosses_channels():
    rngs = nnx.Rngs(0)
    model = _moved(
        nnx.Sequential(
            nnx.Conv(3, 12, (3, 3), rngs=rngs),
            nnx.BatchNorm(12, rngs=rngs),
            nnx.relu,
            nnx.Conv(12, 9, (3, 3), rngs=rngs),
            nnx.Dropout(0.5, rngs=rngs),
            nnx.Linear(9, 2, rngs=rngs),
        )
    )
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 3))
    graph = jp.trace(model, x)
    plan = random_plan(graph, 2)
    slim = jp.shrink(graph, plan)
    masked = slicing.mask_variables(graph, plan, graph.variables)
    expected = graph.handle(masked, x)
    slim.model.eval()
    np.testing.assert_allclose(slim.model(x), expected, atol=1e-5)
    # A wrong plan for the mask must not agree.
    other = {name: (kept + 1) % graph.group(name).size for name, kept in plan.items()}
    wrong = graph.handle(slicing.mask_variables(graph, other, graph.variables), x)
    assert float(jnp.abs(slim.model(x) - wrong).max()) > 1e-2


def test_parameters_are_those_of_nnx_param():
    model, x = _net()
    graph = jp.trace(model, x)
    assert graph.params() == sum(
        a.size for a in jax.tree.leaves(nnx.state(model, nnx.Param))
    )
    assert not graph.handle.is_parameter("norm/mean")
    plan = random_plan(graph)
    left = nnx.state(jp.shrink(graph, plan).model, nnx.Param)
    assert graph.params(plan) == sum(a.size for a in jax.tree.leaves(left))


def _step(model, optimizer, x, y):
    def loss(model):
        logits = model(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def test_a_slim_object_trains_with_its_sliced_optimizer():
    model, x = _net()
    y = jnp.arange(4)
    step = nnx.jit(_step)
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.Param)
    graph = jp.trace(model, x)
    plan = {g.name: np.arange(max(1, g.size - 1)) for g in graph.groups}
    step(model, optimizer, x, y)
    graph = jp.trace(model, x)
    slim = jp.shrink(graph, plan).model
    small = nnx.Optimizer(slim, optax.adam(3e-2), wrt=nnx.Param)
    state = jp.shrink_like(graph, plan, nnx.state(optimizer))
    nnx.update(small, state)
    np.testing.assert_array_equal(
        small.opt_state[0].mu["head"]["kernel"][...],
        slicing.take(
            optimizer.opt_state[0].mu["head"]["kernel"][...],
            slicing.keep_indices(graph, plan)["head/kernel"],
        ),
    )
    statistics = np.array(slim.norm.mean[...])
    key = int(slim.drop.rngs.count[...])
    losses = [float(step(slim, small, x, y)) for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert np.abs(slim.norm.mean[...] - statistics).max() > 0
    assert int(slim.drop.rngs.count[...]) == key + 30
    again = nnx.merge(*nnx.split(slim))
    again.eval(), slim.eval()
    np.testing.assert_array_equal(again(x), slim(x))


def test_attention_decodes_at_its_new_sizes():
    rngs = nnx.Rngs(0)
    layer = nnx.MultiHeadAttention(4, 8, qkv_features=24, decode=False, rngs=rngs)
    model = _Between(_Layer(layer, 8), rngs=rngs)
    x = jax.random.normal(jax.random.key(0), (2, 6, 5))
    graph = jp.trace(model, x)
    widths = {
        group.name: np.arange(group.size - 1)
        for group in graph.groups
        if group.name.startswith("layer")
    }
    slim = jp.shrink(graph, widths).model.layer.layer
    assert (slim.num_heads, slim.head_dim, slim.qkv_features) == (3, 5, 15)
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    causal = slim(x, is_causal=True)
    slim.init_cache(x.shape)
    steps = [slim(x[:, t : t + 1], decode=True) for t in range(6)]
    np.testing.assert_allclose(jnp.concatenate(steps, 1), causal, atol=1e-5)


class _Modes(nnx.Module):
    """An inference call that no default would guess."""

    def __init__(self, rngs):
        self.a = nnx.Linear(4, 8, rngs=rngs)
        self.b = nnx.Linear(8, 2, rngs=rngs)
        self.training = True

    def encode(self, x):
        assert not self.training
        return self.b(nnx.relu(self.a(x)))

    def __call__(self, x, *, mask, train=True):
        assert not train
        return self.encode(x) * mask


def test_the_inference_call_can_be_given():
    model, x = _Modes(nnx.Rngs(0)), jnp.ones((2, 4))
    graph = jp.trace(model, x, apply=lambda model, x: model.encode(x))
    plan = {"a": np.arange(3)}
    assert jp.verify(graph, plan, x) < 1e-6
    slim = jp.shrink(graph, plan)
    assert slim.model.training and slim.model.a.out_features == 3
    with pytest.raises(GraphError, match="missing 1 required keyword.*'mask'"):
        jp.trace(model, x)


def test_abstract_objects_trace():
    real, x = _net()
    abstract = nnx.eval_shape(lambda: _Net(nnx.Rngs(0)))
    graph = jp.trace(abstract, jax.ShapeDtypeStruct((9, 5, 5, 3), jnp.float32))
    full = jp.trace(real, x)
    assert {g.name: g.size for g in graph.groups} == {
        g.name: g.size for g in full.groups
    }
    assert graph.macs() == full.macs()
    slim = jp.shrink(graph, {"grouped": [0, 2]})
    assert slim.model.grouped.feature_group_count == 3
    assert slim.model.head.in_features == 6


def test_sharding_metadata_stays_on_the_variables():
    rngs = nnx.Rngs(0)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    with jax.set_mesh(jax.make_mesh((1,), ("model",))):
        model = nnx.Sequential(
            nnx.Linear(4, 8, kernel_init=init, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
        )
    graph = jp.trace(model, jnp.ones((2, 4)))
    slim = jp.shrink(graph, {graph.groups[0].name: [1, 5]}).model
    kernel, before = slim.layers[0].kernel, model.layers[0].kernel
    assert kernel.shape == (4, 2)
    assert kernel.get_metadata() == before.get_metadata()
    assert "model" in str(kernel.get_metadata())


class _Heads(nnx.Module):
    """Attention written by hand: its sizes are attributes that only it knows."""

    def __init__(self, rngs):
        self.heads, self.width = 4, 3
        self.qkv = nnx.Linear(6, 36, rngs=rngs)
        self.out = nnx.Linear(12, 2, rngs=rngs)

    def __call__(self, x):
        b, t, _ = x.shape
        q, k, v = jnp.split(self.qkv(x).reshape(b, t, self.heads, -1), 3, axis=-1)
        weights = nnx.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        found = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return self.out(found.reshape(b, t, self.heads * self.width))


class _Following(_Heads):
    def follow_arrays(self):
        self.width = 3
        self.heads = self.out.kernel.shape[0] // self.width


def test_modules_say_how_their_own_sizes_follow():
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    for kind, left in ((_Heads, 4), (_Following, 2)):
        graph = jp.trace(kind(nnx.Rngs(0)), x)
        heads = next(g for g in graph.groups if g.size == 4)
        slim = jp.shrink(graph, {heads.name: [0, 3]})
        assert len(slim.plan[heads.name]) == left
        assert jp.verify(graph, slim.plan, x) < 1e-5
        assert (left == 4) == (heads.name in slim.report["left_whole"])


def test_wrong_input_is_explained():
    model, x = _net()
    graph = jp.trace(model, x)
    with pytest.raises(GraphError, match="pass module instances, not classes"):
        jp.trace(_Net, x)
    with pytest.raises(GraphError, match="does not run on these"):
        jp.trace(model, jnp.ones((2, 5, 5, 4)))
    other = dict(graph.variables)
    del other["head"]
    with pytest.raises(GraphError, match="head/bias is missing"):
        jp.shrink(graph, graph.full_plan(), other)
    with pytest.raises(GraphError, match="needs 'head/bias'"):
        graph.handle(other, x)
