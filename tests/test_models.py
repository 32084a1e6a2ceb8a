"""The reference architectures against published counts and NumPy forward passes."""

import dataclasses
import itertools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_nets import numpy_conv, numpy_resnet, numpy_vgg

from jaxprune.errors import ConfigError, GraphError
from jaxprune.models import MLP, VGG, ResNet, ViT, create, names
from jaxprune.models.vit import Attention

CHECKPOINTS = Path(__file__).resolve().parents[2] / "shared" / "checkpoints"


def image_size(name):
    if name == "vgg_small":
        return 8
    small = ("cifar", "mlp", "seed", "resnet20", "resnet32", "resnet56", "resnet110")
    return 32 if any(part in name for part in small) else 224


def shapes(model, size):
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# torchvision's documentation of each model; DeiT for vit_tiny and vit_small; the
# option-A networks as y0ast and akamaster count them (0.27, 0.46, 0.85, 1.7 M).
PUBLISHED = [
    ("vgg11", {}, 132_863_336),
    ("vgg13", {}, 133_047_848),
    ("vgg16", {}, 138_357_544),
    ("vgg19", {}, 143_667_240),
    ("vgg11_bn", {}, 132_868_840),
    ("vgg13_bn", {}, 133_053_736),
    ("vgg16_bn", {}, 138_365_992),
    ("vgg19_bn", {}, 143_678_248),
    ("resnet18", {}, 11_689_512),
    ("resnet34", {}, 21_797_672),
    ("resnet50", {}, 25_557_032),
    ("resnet20", {"shortcut": "pad"}, 269_722),
    ("resnet32", {"shortcut": "pad"}, 464_154),
    ("resnet56", {"shortcut": "pad"}, 853_018),
    ("resnet110", {"shortcut": "pad"}, 1_727_962),
    ("vit_b16", {}, 86_567_656),
    ("vit_small", {}, 22_050_664),
    ("vit_tiny", {}, 5_717_416),
    ("vgg16_seed", {}, 33_638_218),
]


@pytest.mark.parametrize("name,options,expected", PUBLISHED)
def test_published_parameter_counts(name, options, expected):
    variables = shapes(create(name, **options), image_size(name))
    assert count(variables["params"]) == expected


def test_cifar_vgg_count_by_formula():
    widths = [3, 64, 64, 128, 128, *[256] * 3, *[512] * 6]
    convs = sum(9 * a * b for a, b in itertools.pairwise(widths))
    head = 512 * 10 + 10
    with_norm = shapes(create("cifar_vgg16_bn"), 32)
    assert count(with_norm["params"]) == convs + 2 * sum(widths[1:]) + head
    assert count(with_norm["batch_stats"]) == 2 * sum(widths[1:])
    biased = shapes(create("cifar_vgg16"), 32)
    assert count(biased["params"]) == convs + sum(widths[1:]) + head


@pytest.mark.parametrize("name", names())
def test_resized_to_its_own_shapes_is_itself(name):
    model = create(name)
    assert model.resized(shapes(model, image_size(name))) == model


BLOCKS_18 = tuple((w,) for w in (3, 5, 7, 11, 13, 17, 19, 23))
RESIZED = [
    ("mlp", 8, {"hidden_widths": (5, 7), "num_classes": 3}),
    ("vgg_small", 8, {"conv_widths": (3, 5, 7, 9, 11, 13)}),
    ("vgg16_seed", 32, {"conv_widths": (*range(3, 16),), "hidden_widths": (17, 19)}),
    (
        "resnet20",
        32,
        {
            "stem_width": 5,
            "stage_widths": (5, 4, 11),
            "inner_widths": tuple((w,) for w in range(1, 10)),
        },
    ),
    ("resnet18", 32, {"inner_widths": BLOCKS_18, "stage_widths": (64, 3, 4, 5)}),
    (
        "resnet50",
        32,
        {
            "stem_width": 3,
            "stage_widths": (4, 5, 6, 7),
            "inner_widths": tuple((i + 1, i + 2) for i in range(16)),
        },
    ),
    (
        "vit_cifar",
        32,
        {
            "embed_width": 12,
            "mlp_widths": (3, 5, 7, 9),
            "heads": (1, 2, 3, 4),
            "qk_widths": (2, 4, 6, 8),
            "v_widths": (3, 5, 7, 1),
        },
    ),
]


@pytest.mark.parametrize("name,size,fields", RESIZED)
def test_resized_follows_every_width(name, size, fields):
    model = create(name)
    slim = dataclasses.replace(model, **fields)
    assert model.resized(shapes(slim, size)) == slim
    assert slim.resized(shapes(model, size)) == model


def test_every_width_of_the_table_above_is_distinct_from_the_default():
    for name, _, fields in RESIZED:
        model = create(name)
        assert all(getattr(model, field) != value for field, value in fields.items())


def random_variables(model, size, seed=0):
    """Random kernels, and norms and biases that are not at their defaults."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if leaf.ndim > 1:
            fan_in = np.prod(leaf.shape[:-1])
            return np.float32(rng.normal(0, np.sqrt(2 / fan_in), leaf.shape))
        return np.float32(rng.uniform(0.5, 1.5, leaf.shape))

    return jax.tree.map(draw, shapes(model, size))


def images(size, seed=1, batch=2):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, size, size, 3)).astype(np.float32)


def assert_close(logits, expected):
    error = np.abs(np.asarray(logits, np.float64) - expected).max()
    assert error <= 1e-5 * np.abs(expected).max(), error


def run(model, variables, x):
    return jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x)


@pytest.mark.parametrize(
    "options",
    [{"batch_norm": True}, {"batch_norm": False}, {"hidden_widths": (40, 40)}],
)
def test_vgg_equals_numpy(options):
    model = create("cifar_vgg11", width=0.1, **{"batch_norm": True, **options})
    variables, x = random_variables(model, 32), images(32)
    expected = numpy_vgg(variables, x, model.pool_after)
    assert_close(run(model, variables, x), expected)


@pytest.mark.parametrize("shortcut", ["projection", "pad"])
def test_cifar_resnet_equals_numpy(shortcut):
    model = create("resnet20", depth=14, width=0.25, shortcut=shortcut)
    variables, x = random_variables(model, 8), images(8)
    logits = run(model, variables, x)
    assert_close(logits, numpy_resnet(variables, x, (2, 2, 2)))
    wrong = numpy_resnet(variables, x, (2, 2, 2), one_sided=True)
    with pytest.raises(AssertionError):
        assert_close(logits, wrong)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_imagenet_resnet_equals_numpy(name):
    blocks = (1, 2, 1, 1)
    model = create(name, width=1 / 16, stage_blocks=blocks, num_classes=5)
    variables, x = random_variables(model, 32), images(32)
    assert_close(run(model, variables, x), numpy_resnet(variables, x, blocks))


def load_npz(path):
    variables = {}
    for name, array in np.load(path).items():
        *modules, leaf = name.split("/")
        kind = "batch_stats" if leaf in ("mean", "var") else "params"
        node = variables.setdefault(kind, {})
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = array
    return variables


@pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason=f"{CHECKPOINTS} does not exist")
def test_trained_networks_load_by_name():
    x = images(32)
    vgg = create("cifar_vgg16_bn", width=0.5)
    variables = load_npz(CHECKPOINTS / "vgg16_half_cifar10.npz")
    assert vgg.resized(variables) == vgg and create("cifar_vgg16_bn") != vgg
    assert count(variables) == 3_689_066 and count(variables["params"]) == 3_684_842
    assert_close(run(vgg, variables, x), numpy_vgg(variables, x, vgg.pool_after))

    resnet = create("resnet20")
    variables = load_npz(CHECKPOINTS / "resnet20_cifar10.npz")
    assert resnet.resized(variables) == resnet
    assert count(variables) == 274_042 and count(variables["params"]) == 272_474
    assert_close(run(resnet, variables, x), numpy_resnet(variables, x, (3, 3, 3)))


def test_attention_equals_that_of_flax():
    x = images(6)[:, 0]
    theirs = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12)
    variables = theirs.init(jax.random.key(0), x, x)
    variables = jax.tree.map(lambda a: a + 0.1, variables)
    expected = theirs.apply(variables, x, x)
    ours = Attention(heads=3, qk_width=4, v_width=4, scale=0.5, dtype=None)
    np.testing.assert_allclose(ours.apply(variables, x), expected, rtol=1e-5, atol=1e-6)
    unscaled = ours.clone(scale=1.0).apply(variables, x)
    assert np.abs(unscaled - expected).max() > 1e-3


def test_attention_keeps_its_temperature_when_features_go():
    model = create("vit_cifar", depth=2, num_classes=4)
    variables = random_variables(model, 16)
    x = images(16)
    masked = jax.tree.map(np.copy, variables)
    attention = masked["params"]["block1"]["attention"]
    for layer in ("query", "key"):
        for leaf in ("kernel", "bias"):
            attention[layer][leaf][..., 20:] = 0.0
    expected = run(model, masked, x)
    for layer in ("query", "key"):
        for leaf in ("kernel", "bias"):
            attention[layer][leaf] = attention[layer][leaf][..., :20]
    slim = model.resized(masked)
    assert slim.qk_widths == (32, 20) and slim.scales == model.scales
    np.testing.assert_allclose(run(slim, masked, x), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - run(model, variables, x)).max() > 1e-3


def test_vit_pools_by_mean():
    model = create("vit_cifar", pool="mean", embed_width=16, depth=1, num_classes=3)
    variables = random_variables(model, 8)
    assert "class_token" not in variables["params"]
    assert variables["params"]["positions"].shape == (1, 4, 16)
    # With equal positions the mean does not depend on the order of the patches.
    variables["params"]["positions"] = jnp.ones((1, 4, 16))
    x = images(8)
    swapped = np.concatenate([x[:, 4:], x[:, :4]], axis=1)
    np.testing.assert_allclose(
        run(model, variables, x), run(model, variables, swapped), rtol=1e-4, atol=1e-5
    )


SMALL = [
    ("mlp", {}),
    ("vgg_small", {"width": 0.25}),
    ("resnet20", {"width": 0.25}),
    ("vit_cifar", {"embed_width": 16, "depth": 1}),
]


@pytest.mark.parametrize("name,options", SMALL)
def test_bfloat16_computes_on_float32_parameters(name, options):
    model = create(name, dtype=jnp.bfloat16, **options)
    variables, x = random_variables(model, 8), images(8)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("f4")}
    logits = run(model, variables, x)
    exact = run(model.clone(dtype=None), variables, x)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("name,options", SMALL)
def test_training_moves_only_the_statistics(name, options):
    model = create(name, **options)
    variables, x = random_variables(model, 8), images(8)
    logits, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    assert logits.shape == (2, 10)
    assert set(updates) == ({"batch_stats"} if "batch_stats" in variables else set())
    for old, new in zip(
        jax.tree.leaves(variables.get("batch_stats")),
        jax.tree.leaves(updates.get("batch_stats")),
        strict=True,
    ):
        assert np.abs(old - new).max() > 0


def test_batch_norm_moves_by_its_momentum():
    model = create("vgg_small", width=0.25)
    variables, x = random_variables(model, 8), images(8)
    _, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    kernel = np.float64(variables["params"]["conv0"]["kernel"])
    mean = numpy_conv(np.float64(x), kernel, 1, 1).mean((0, 1, 2))
    old = np.float64(variables["batch_stats"]["bn0"]["mean"])
    new = updates["batch_stats"]["bn0"]["mean"]
    np.testing.assert_allclose(new, 0.9 * old + 0.1 * mean, rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_only():
    model = create("vgg_small", hidden_widths=(64,), dropout=0.5)
    variables, x = random_variables(model, 8), images(8)

    def train(key):
        rngs = {"dropout": jax.random.key(key)}
        logits, _ = model.apply(
            variables, x, train=True, rngs=rngs, mutable=["batch_stats"]
        )
        return logits

    np.testing.assert_array_equal(train(0), train(0))
    assert np.abs(train(0) - train(1)).max() > 1e-3
    np.testing.assert_array_equal(run(model, variables, x), run(model, variables, x))


def test_factories_scale_widths():
    half = create("cifar_vgg16_bn", width=0.5)
    assert half.conv_widths == (32, 32, 64, 64, *[128] * 3, *[256] * 6)
    assert half.pool_after == (1, 3, 6, 9, 12)
    resnet = create("resnet50", width=0.5)
    assert resnet.stem_width == 32 and resnet.stage_widths == (128, 256, 512, 1024)
    assert create("mlp", width=1e-9).hidden_widths == (1, 1)
    kinds = {"mlp": MLP, "vgg16": VGG, "resnet18": ResNet, "vit_tiny": ViT}
    for name, kind in kinds.items():
        model = create(name, num_classes=7)
        assert type(model) is kind and model.num_classes == 7


ERRORS = [
    (lambda: create("resnet21"), ConfigError, "unknown model 'resnet21'; did you mean"),
    (lambda: create("zzz"), ConfigError, "unknown model 'zzz'; known: cifar_vgg11"),
    (
        lambda: create("resnet20", shortcuts="pad"),
        ConfigError,
        "unknown resnet20 option 'shortcuts'; did you mean 'shortcut'?",
    ),
    (lambda: create("vgg16", depth=12), ConfigError, "one of 11, 13, 16, 19, found 12"),
    (lambda: create("resnet20", depth=21), ConfigError, r"6 n \+ 2, such as 20"),
    (lambda: create("vit_tiny", heads=5), ConfigError, "multiple of the 5 heads"),
    (
        lambda: shapes(create("resnet20", stem_width=8), 8),
        ConfigError,
        "ResNet.stem_width: expected 16",
    ),
    (
        lambda: shapes(create("resnet20", inner_widths=((4,),)), 8),
        ConfigError,
        "ResNet.inner_widths: expected 9 entries",
    ),
    (
        lambda: shapes(create("resnet20", shortcut="pad", stage_widths=(16, 8, 9)), 8),
        ConfigError,
        r"found \(16, 16, 8, 9\); use shortcut=\"projection\"",
    ),
    (
        lambda: shapes(create("vit_tiny", heads=3, qk_widths=(4,)), 32),
        ConfigError,
        "ViT.qk_widths: expected 12 entries",
    ),
    (
        lambda: create("resnet32").resized(shapes(create("resnet20"), 8)),
        GraphError,
        "no leaf 'params/block10/conv2/kernel'",
    ),
    (
        lambda: create("mlp").resized({"hidden0": {"kernel": np.ones((2, 3))}}),
        GraphError,
        "no leaf 'params/hidden0/kernel'; they hold .'hidden0/kernel'",
    ),
]


@pytest.mark.parametrize("act,error,text", ERRORS)
def test_errors_say_what_to_do(act, error, text):
    with pytest.raises(error, match=text):
        act()
