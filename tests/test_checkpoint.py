"""Checkpoints: saved == loaded, in a new process too; nothing is half written."""

import json
import pathlib
import subprocess
import sys
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune import checkpoint, models, trees
from jaxprune.errors import CheckpointError
from jaxprune.records import Plan, Slim

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "checkpoints"


@pytest.fixture(scope="module")
def model():
    return models.create("vgg_small", num_classes=10, width=0.25)


@pytest.fixture(scope="module")
def variables(model):
    tree = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    # Values that no initialiser gives, so that nothing passes by chance.
    return jax.tree.map(lambda a: a + jnp.linspace(0, 1, a.size).reshape(a.shape), tree)


def same(a, b) -> None:
    a, b = trees.flatten(a), trees.flatten(b)
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def slim_of(model, variables) -> Slim:
    """The model without channel 3 of its first convolution."""
    keep = np.delete(np.arange(8), 3)
    leaves = trees.flatten(variables)
    for name in leaves:
        if name.startswith(("params/conv0/", "params/bn0/", "batch_stats/bn0/")):
            leaves[name] = leaves[name][..., keep]
    leaves["params/conv1/kernel"] = leaves["params/conv1/kernel"][:, :, keep]
    sliced = trees.unflatten_like(variables, leaves)
    plan = Plan({"conv0": keep}, {"conv0": 8})
    return Slim(model.resized(sliced), sliced, plan, {"method": "by hand"})


def test_variables_come_back_with_values_dtypes_and_structure(tmp_path, variables):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables["params"])
    tree = {**variables, "params": half}
    checkpoint.save_variables(tmp_path / "a" / "base", tree)
    same(checkpoint.load_variables(tmp_path / "a" / "base"), tree)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["base"]


NEW_PROCESS = """
import sys
import jax, numpy as np
from jaxprune import checkpoint, models
model = models.create("vgg_small", num_classes=10, width=0.25)
slim = checkpoint.load(sys.argv[1], model)
assert slim.model.conv_widths[0] == 7, slim.model
assert slim.plan["conv0"].tolist() == [0, 1, 2, 4, 5, 6, 7]
assert slim.report == {"method": "by hand"}
x = np.load(sys.argv[2])
np.save(sys.argv[3], slim.model.apply(slim.variables, x, train=False))
"""


def test_a_slim_model_opens_in_a_new_process_without_the_weights(
    tmp_path, model, variables
):
    slim = slim_of(model, variables)
    checkpoint.save(tmp_path / "slim", slim)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    arguments = [str(tmp_path / name) for name in ("slim", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", NEW_PROCESS, *arguments], check=True)
    expected = slim.model.apply(slim.variables, x, train=False)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-5)
    whole = model.apply(variables, x, train=False)
    assert np.abs(whole - expected).max() > 1e-3


class Foreign(nn.Module):
    """A module of somebody else, with groups that the shapes do not tell."""

    @nn.compact
    def __call__(self, x):
        x = nn.GroupNorm(num_groups=4, name="norm")(nn.Dense(8, name="hidden")(x))
        return nn.Dense(3, name="out")(x)


def test_a_wrapped_module_keeps_its_settings(tmp_path):
    from jaxprune.frameworks.linen import rebuild

    variables = Foreign().init(jax.random.key(0), jnp.zeros((1, 5)))
    leaves = trees.flatten(variables)
    for name in leaves:
        if "/out/kernel" in name:
            leaves[name] = leaves[name][:4]
        elif "/out/" not in name:
            leaves[name] = leaves[name][..., :4]
    sliced = trees.unflatten_like(variables, leaves)
    settings = (("norm", "num_groups", 2),)
    module = rebuild(Foreign(), sliced, settings)
    plan = Plan({"hidden": np.arange(4)}, {"hidden": 8})
    checkpoint.save(
        tmp_path / "slim", Slim(module, sliced, plan, {"settings": settings})
    )
    loaded = checkpoint.load(tmp_path / "slim", Foreign())
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    expected = module.apply(sliced, x)
    np.testing.assert_allclose(loaded.model.apply(loaded.variables, x), expected)
    other = rebuild(Foreign(), sliced, (("norm", "num_groups", 4),))
    assert np.abs(other.apply(sliced, x) - expected).max() > 1e-3


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, variables, monkeypatch):
    checkpoint.save_variables(tmp_path / "base", variables)

    def full(path, tree):
        (path.parent / "part").write_text("half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_arrays", full)
    changed = jax.tree.map(lambda a: a + 1, variables)
    with pytest.raises(CheckpointError, match="No space left on device.*unchanged"):
        checkpoint.save_variables(tmp_path / "base", changed)
    same(checkpoint.load_variables(tmp_path / "base"), variables)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_process_that_died_between_the_renames_loses_nothing(tmp_path, variables):
    checkpoint.save_variables(tmp_path / "base", variables)
    (tmp_path / "base").rename(tmp_path / ".base.aside")
    same(checkpoint.load_variables(tmp_path / "base"), variables)


def test_a_path_that_cannot_be_written_is_an_error(tmp_path, variables):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write .*file/base"):
        checkpoint.save_variables(tmp_path / "file" / "base", variables)


def test_missing_and_foreign_files_are_named(tmp_path, model, variables):
    with pytest.raises(CheckpointError, match="there is no checkpoint at .*/none"):
        checkpoint.load_variables(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="cannot read the checkpoint .*/empty"):
        checkpoint.load_variables(tmp_path / "empty")
    checkpoint.save_variables(tmp_path / "base", variables)
    with pytest.raises(CheckpointError, match="does not hold a pruned model"):
        checkpoint.load(tmp_path / "base", model)
    checkpoint.save(tmp_path / "slim", slim_of(model, variables))
    record = json.loads((tmp_path / "slim" / "slim.json").read_text())
    (tmp_path / "slim" / "slim.json").write_text(json.dumps({**record, "format": 9}))
    with pytest.raises(CheckpointError, match="has format 9, this jaxprune reads 1"):
        checkpoint.load(tmp_path / "slim", model)


def test_init_from_lists_every_mismatch_once(tmp_path, model, variables):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    leaves = trees.flatten(variables)
    short = {n.partition("/")[2]: np.asarray(v) for n, v in leaves.items()}
    np.savez(tmp_path / "good.npz", **short)
    same(checkpoint.init_from(tmp_path / "good.npz", shapes), variables)
    checkpoint.save_variables(tmp_path / "dir", variables)
    same(checkpoint.init_from(tmp_path / "dir", shapes), variables)

    short["conv1/kernel"] = short["conv1/kernel"][..., :5]
    short["head/kernel"] = short.pop("linear/kernel")
    np.savez(tmp_path / "bad.npz", **short)
    with pytest.raises(CheckpointError, match="3 leaves differ") as caught:
        checkpoint.init_from(tmp_path / "bad.npz", shapes)
    text = str(caught.value)
    for line in (
        "params/conv1/kernel: expected shape (3, 3, 8, 8), found (3, 3, 8, 5)",
        "params/linear/kernel: expected shape (32, 10), found none",
        "params/head/kernel: the model has no such leaf, found shape (32, 10)",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("file", "name", "width"),
    [
        ("vgg16_half_cifar10", "cifar_vgg16_bn", 0.5),
        ("resnet20_cifar10", "resnet20", 1.0),
    ],
)
def test_trained_networks_fit_the_reference_architectures(file, name, width):
    path = SHARED / f"{file}.npz"
    if not path.exists():
        pytest.skip(f"needs the trained network {path.name}")
    model = models.create(name, num_classes=10, width=width)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = checkpoint.init_from(path, shapes)
    with np.load(path) as arrays:
        total = sum(arrays[key].size for key in arrays.files)
    assert sum(a.size for a in jax.tree.leaves(variables)) == total


class Object(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.GroupNorm(8, num_groups=4, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.hidden(x))))


def test_a_pruned_object_comes_back_with_its_own_weights(tmp_path):
    x = np.random.default_rng(0).normal(size=(32, 5)).astype(np.float32)
    slim = jp.prune(Object(nnx.Rngs(0)), [(x, None)], method="lasso", keep=0.5)
    assert slim.model.out.in_features < 8
    jp.save(tmp_path / "slim", slim)
    loaded = jp.load(tmp_path / "slim", Object(nnx.Rngs(1)))
    np.testing.assert_array_equal(loaded.model(x), slim.model(x))
    assert loaded.plan.to_json() == slim.plan.to_json()


def _stated(params, x):
    """A function whose source states its width."""
    return jnp.tanh(x @ params.weight).reshape(-1, 8) @ params.out


class Params(NamedTuple):
    weight: jax.Array
    out: jax.Array


def test_a_replayed_model_opens_with_the_graph_of_the_original(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 5)).astype(np.float32)
    params = Params(jnp.asarray(rng.normal(size=(5, 8))), jnp.ones((8, 3)))
    slim = jp.shrink(jp.trace(_stated, params, x), {"weight": [1, 2, 6]}, replay=True)
    assert slim.plan["weight"].size == 3
    jp.save(tmp_path / "slim", slim)
    with pytest.raises(CheckpointError) as caught:
        jp.load(tmp_path / "slim", _stated)
    for part in (str(tmp_path / "slim"), "replay=True", "found function", "jp.trace"):
        assert part in str(caught.value)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    loaded = jp.load(tmp_path / "slim", jp.trace(_stated, shapes, x))
    assert isinstance(loaded.variables, Params)
    np.testing.assert_array_equal(
        loaded.model(loaded.variables, x), slim.model(slim.variables, x)
    )


def test_other_trees_than_dicts_need_the_graph(tmp_path):
    rng = np.random.default_rng(0)
    params = [
        (jnp.asarray(rng.normal(size=(5, 8)), jnp.float32), jnp.ones(8)),
        (jnp.asarray(rng.normal(size=(8, 3)), jnp.float32), jnp.ones(3)),
    ]

    def apply(params, x):
        (a, b), (c, d) = params
        return jnp.tanh(x @ a + b) @ c + d

    x = jnp.ones((2, 5))
    graph = jp.trace(apply, params, x)
    slim = jp.shrink(graph, {graph.groups[0].name: [1, 2, 5]})
    jp.save(tmp_path / "slim", slim)
    with pytest.raises(CheckpointError, match="no tree of dicts alone"):
        jp.load(tmp_path / "slim", apply)
    loaded = jp.load(tmp_path / "slim", graph)
    assert jax.tree.structure(loaded.variables) == jax.tree.structure(params)
    with pytest.raises(
        CheckpointError, match=r"jp\.prune or jp\.shrink returned, found"
    ):
        jp.save(tmp_path / "other", {"params": params})


def test_a_graph_opens_an_emitted_model_too(tmp_path, model, variables):
    slim = slim_of(model, variables)
    checkpoint.save(tmp_path / "slim", slim)
    graph = jp.trace(model, variables, jnp.zeros((1, 8, 8, 1)))
    assert checkpoint.load(tmp_path / "slim", graph).model == slim.model


class Attends(nn.Module):
    """States its number of heads; what it does with them shapes do not tell."""

    heads: int = 4

    @nn.compact
    def __call__(self, x):
        return attend(self.heads, x, *(nn.Dense(16, name=name) for name in "qkv"))


class AttendingObject(nnx.Module):
    def __init__(self, rngs):
        self.heads = 4
        self.q, self.k, self.v = (nnx.Linear(6, 16, rngs=rngs) for _ in range(3))
        self.norm = nnx.GroupNorm(16, num_groups=4, rngs=rngs)
        self.out = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.norm(attend(self.heads, x, self.q, self.k, self.v)))


def attend(heads, x, q, k, v):
    q, k, v = (layer(x).reshape(*x.shape[:2], heads, -1) for layer in (q, k, v))
    weights = nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    h = jnp.einsum("bhts,bshd->bthd", weights, v)
    return h.reshape(*x.shape[:2], -1)


class AttendingModule(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="first")(Attends(name="attends")(x))
        return nn.Dense(3, name="out")(nn.relu(x))


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_the_record_of_a_second_round_holds_the_numbers_of_the_first(
    tmp_path, framework
):
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    if framework == "linen":
        model = AttendingModule()
        traced = jp.trace(model, model.init(jax.random.key(1), x), x)
    else:
        model = AttendingObject(nnx.Rngs(0))
        traced = jp.trace(model, x)
    heads = next(g.name for g in traced.groups if g.size == 4 and g.name[-2:] != ".1")
    first = jp.shrink(traced, {heads: [0, 2]})
    numbers = {row[1]: row[2] for row in first.report["settings"]}
    assert numbers["heads"] == 2
    if framework == "nnx":
        first_model = nnx.clone(first.model)  # as training steps make
        again = jp.trace(first_model, x)
    else:
        again = jp.trace(first.model, first.variables, x)
    other = next(g for g in again.groups if not g.name.startswith(heads))
    second = jp.shrink(again, {other.name: np.arange(other.size // 2)})
    assert second.report["settings"]
    jp.save(tmp_path / "slim", second)
    loaded = jp.load(tmp_path / "slim", model)
    if framework == "nnx":
        found, want = loaded.model(x), second.model(x)
    else:
        found, want = (s.model.apply(s.variables, x) for s in (loaded, second))
    np.testing.assert_allclose(found, want, atol=1e-6)
