"""Constants that follow a size are made up for in the kernels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from patterns import PATTERNS
from test_patterns import make

import jaxprune as jp
from jaxprune import surgery, trees
from jaxprune.pushes import Push

# Patterns, and a leaf that takes the factor when the query/key width shrinks.
WIDTHS = {
    "attention": "att/query/kernel",
    "attention_with_normed_queries": "att/query_ln/scale",
    "multi_query": "q/kernel",
    "gqa_by_repeat": "k/kernel",
    "gqa_by_reshape": "q/kernel",
    "fused_qkv_by_split": "qkv/kernel",
    "fused_qkv_by_reshape": "qkv/kernel",
    "fused_qkv_within_heads": "qkv/kernel",
}


@pytest.mark.parametrize("name", list(WIDTHS))
def test_a_narrower_query_gives_the_masked_scores(name):
    """The oracle is the original model itself, with the removed features of its
    queries and keys at zero: nothing of it is recomputed."""
    model, variables, x, _ = make(name)
    graph = jp.trace(model, variables, x)
    found = 0
    for group in graph.groups:
        plan = {group.name: np.arange(0, group.size, 2)}
        slim = jp.shrink(graph, plan)
        if not slim.report["rescaled"]:
            continue
        found += 1
        expected = f"params/{WIDTHS[name]}"
        assert expected in slim.report["rescaled"]
        leaves = {p: np.array(v) for p, v in trees.flatten(variables).items()}
        gone = np.setdiff1d(np.arange(group.size), slim.plan[group.name])
        for slot in group.slots:
            leaf = np.moveaxis(leaves[slot.path], slot.axis, 0)
            leaf[slot.index[gone].ravel()] = 0
        masked = trees.unflatten_like(variables, leaves)
        if "ln" not in expected:  # a norm runs over what is left
            np.testing.assert_allclose(
                jax.jit(slim.model.apply)(slim.variables, x),
                jax.jit(model.apply)(masked, x),
                atol=1e-5,
            )
        assert jp.verify(graph, plan, x) < 1e-5
    assert found == 1


def test_a_surgeon_who_does_not_rescale_is_found(monkeypatch):
    model, variables, x, _ = make("attention")
    graph = jp.trace(model, variables, x)
    (group,) = [
        g
        for g in graph.groups
        if jp.shrink(graph, {g.name: np.arange(g.size // 2)}).report["rescaled"]
    ]
    plan = {group.name: np.arange(group.size // 2)}
    assert jp.verify(graph, plan, x) < 1e-6
    monkeypatch.setattr(surgery, "rescale", lambda kept, folded, variables: variables)
    with pytest.raises(jp.PruneError, match="differs from the masked original"):
        jp.verify(graph, plan, x, tolerance=1e-6)


class _Scanned(nn.Module):
    """A stack of attention blocks that share one trace: kernels have a layer axis."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            _Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return nn.Dense(3, name="head")(stack(name="stack")(x, None)[0].mean(1))


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        att = nn.MultiHeadDotProductAttention(2, qkv_features=8, name="att")
        return x + att(x, x), None


class _SharedQuery(nn.Module):
    """The query is read elsewhere too: nothing can take the factor but the keys."""

    both: bool

    @nn.compact
    def __call__(self, x):
        q, k = nn.Dense(6, name="q")(x), nn.Dense(6, name="k")(x)
        scores = nn.softmax(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
        y = jnp.concatenate([scores @ x, q, k] if self.both else [scores @ x, q], -1)
        return nn.Dense(3, name="head")(y.mean(1))


def test_factors_reach_stacked_kernels():
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    variables = _Scanned().init(jax.random.key(0), x)
    graph = jp.trace(_Scanned(), variables, x)
    plan = {
        g.name: np.arange(2)
        for g in graph.groups
        if any("query" in s.path and s.axis == 3 for s in g.slots)
    }
    slim = jp.shrink(graph, plan)
    factor = slim.report["rescaled"]["params/stack/att/query/kernel"]
    assert factor == pytest.approx(np.sqrt(2 / 4))
    kernel = variables["params"]["stack"]["att"]["query"]["kernel"]
    np.testing.assert_allclose(
        slim.variables["params"]["stack"]["att"]["query"]["kernel"],
        kernel[..., plan[next(iter(plan))]] * np.sqrt(0.5),
        rtol=1e-6,
    )
    assert jp.verify(graph, plan, x) < 1e-5


class _Attention(nnx.Module):
    def __init__(self, rngs):
        self.q, self.k, self.v = (nnx.Linear(5, n, rngs=rngs) for n in (12, 12, 5))

    def __call__(self, x):
        q, k = self.q(x), self.k(x)
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        return x + nnx.softmax(scores) @ self.v(x)


class _ScannedNnx(nnx.Module):
    """Rematerialised rounds give every Variable back, though nobody reads them."""

    def __init__(self, remat, rngs):
        self.remat = remat
        self.layers = nnx.vmap(_Attention, in_axes=0, out_axes=0)(rngs)

    def __call__(self, x):
        step = nnx.remat(_round) if self.remat else _round
        loop = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return loop(x, self.layers)


def _round(x, layer):
    return layer(x)


@pytest.mark.parametrize("remat", [False, True])
def test_factors_reach_stacked_kernels_of_nnx(remat):
    x = jax.random.normal(jax.random.key(1), (2, 4, 5))
    stacked = nnx.split_rngs(splits=3)(_ScannedNnx)(remat, rngs=nnx.Rngs(0))
    graph = jp.trace(stacked, x)
    slim = jp.shrink(graph, {g.name: np.arange(3) for g in graph.groups})
    assert slim.report["left_whole"] == {}
    assert slim.report["rescaled"]["layers/k/kernel"] == pytest.approx(0.5)
    assert jp.verify(graph, slim.plan, x) < 1e-5


@pytest.mark.parametrize("both", [False, True])
def test_what_others_read_is_never_scaled(both):
    model, x = _SharedQuery(both), jax.random.normal(jax.random.key(1), (2, 5, 4))
    variables = model.init(jax.random.key(0), x)
    graph = jp.trace(model, variables, x)
    plan = {g.name: np.arange(3) for g in graph.groups}
    rescaled = jp.shrink(graph, plan).report["rescaled"]
    assert set(rescaled) == (set() if both else {"params/k/kernel", "params/k/bias"})
    assert jp.verify(graph, plan, x) < 1e-5


def test_norms_keep_the_constants_of_what_is_left():
    model, variables, x, _ = make("mixer")
    graph = jp.trace(model, variables, x)
    plan = {g.name: np.arange(g.size // 2) for g in graph.groups}
    assert jp.shrink(graph, plan).report["rescaled"] == {}
    assert set(WIDTHS) <= set(PATTERNS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_kernels_of_few_bits_take_the_factor(dtype):
    def attend(p, x):
        q, k = x @ p["q"], x @ p["k"]
        return (
            nn.softmax(q @ k.swapaxes(1, 2) / jnp.sqrt(q.shape[-1]).astype(dtype)) @ x
        )

    x = jax.random.normal(jax.random.key(1), (2, 4, 5)).astype(dtype)
    params = {
        n: jax.random.normal(jax.random.key(2), (5, 12)).astype(dtype) for n in "qk"
    }
    graph = jp.trace(attend, params, x)
    slim = jp.shrink(graph, {graph.groups[0].name: np.arange(3)})
    assert slim.report["left_whole"] == {}
    assert slim.report["rescaled"] == {"k": pytest.approx(0.5, rel=0.01)}
    assert slim.variables["k"].dtype == dtype
    assert jp.verify(graph, slim.plan, x) < 0.03


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("scaled", [True, False])
def test_quantised_kernels_take_no_factor(dtype, scaled):
    """Their scales do; without one, the group stays whole."""
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.integers(-7, 8, (5, 12)), dtype) for name in "qkv"}
    params |= {"o": jnp.ones((12, 3))}
    params |= {f"{n}_scale": jnp.full(12, 0.1) for n in "qkv"} if scaled else {}

    def attend(p, x):
        q, k, v = (x @ p[n].astype(x.dtype) * p.get(f"{n}_scale", 0.1) for n in "qkv")
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        return nn.softmax(scores) @ v @ p["o"]

    x = jax.random.normal(jax.random.key(1), (2, 4, 5))
    graph = jp.trace(attend, params, x)
    plan = {g.name: np.arange(g.size // 2) for g in graph.groups}
    slim = jp.shrink(graph, plan)
    assert set(slim.report["rescaled"]) == ({"k_scale"} if scaled else set())
    assert len(slim.report["left_whole"]) == (0 if scaled else 1)
    assert jp.verify(graph, slim.plan, x) < 1e-5


# What is multiplied with the table of the logits, made of the normed stream.
LAST = {
    "scale": lambda p, y: y * p["s"],
    "1 + scale": lambda p, y: y * (1 + p["s"].reshape(1, 1, -1)),
    "1 - scale": lambda p, y: y * (1 - p["s"]),
    "scale - 1": lambda p, y: (p["s"].astype(jnp.float32) - 1.0) * y,
    "scale and bias": lambda p, y: y * p["s"] + p["b"],
    "no variable": lambda p, y: y,
    "two readings": lambda p, y: y * (1 + p["s"]) * p["s"].sum(keepdims=True),
}


def _tied(last):
    """A language model whose embedding, times the root of its width, is its head too."""

    def normed(x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)

    def apply(p, tokens):
        x = p["table"][tokens] * jnp.sqrt(p["table"].shape[1])
        x = x + nn.relu(normed(x) @ p["up"]) @ p["down"]
        return LAST[last](p, normed(x)) @ p["table"].T

    rng = np.random.default_rng(0)
    shapes = {"table": (11, 8), "up": (8, 6), "down": (6, 8)}
    shapes |= {"s": (8,)} if last != "no variable" else {}
    shapes |= {"b": (8,)} if last == "scale and bias" else {}
    params = {n: jnp.asarray(rng.normal(size=s), "float32") for n, s in shapes.items()}
    return apply, params, jnp.asarray(rng.integers(0, 11, (2, 4)))


@pytest.mark.parametrize("last", list(LAST))
def test_a_tied_embedding_takes_the_root_of_its_width(last):
    apply, params, tokens = _tied(last)
    graph = jp.trace(apply, params, tokens)
    plan = {g.name: np.arange(0, g.size, 2) for g in graph.groups}
    slim = jp.shrink(graph, plan)
    assert jp.verify(graph, slim.plan, tokens) < 1e-5
    if last in ("no variable", "two readings"):
        assert list(slim.report["left_whole"]) == ["table"]
        return
    assert slim.report["left_whole"] == {}
    root, signs = np.sqrt(2), {"1 + scale": 1, "1 - scale": -1, "scale - 1": -1}
    bias = {"b": pytest.approx(1 / root)} if last == "scale and bias" else {}
    taken = {"table": pytest.approx(root), "s": pytest.approx(1 / root)}
    assert slim.report["rescaled"] == taken | bias
    offset, kept = signs.get(last, 0), np.asarray(params["s"])[::2]
    expected = (kept + offset) / root - offset
    np.testing.assert_allclose(slim.variables["s"], expected, rtol=1e-5)


def test_copies_take_the_offset_and_moments_do_not():
    apply, params, tokens = _tied("1 + scale")
    graph = jp.trace(apply, params, tokens)
    plan = {g.name: np.arange(0, g.size, 2) for g in graph.groups}
    slim, state = jp.shrink(graph, plan), {"ema": params, "mu": params, "nu": params}
    small, kept = jp.shrink_like(graph, plan, state), np.asarray(params["s"])[::2]
    np.testing.assert_array_equal(small["ema"]["s"], slim.variables["s"])
    np.testing.assert_allclose(small["mu"]["s"], kept * np.sqrt(2), rtol=1e-5)
    np.testing.assert_allclose(small["nu"]["s"], kept * 2, rtol=1e-5)


def test_regions_of_one_variable_take_a_factor_one_by_one():
    graph = jp.trace(lambda p, x: x @ p["qkv"], {"qkv": jnp.ones((3, 6))}, jnp.ones(3))
    (key,) = graph.wiring.leaf
    push = Push(graph.wiring, graph.records, lambda path: True)
    first, second = np.arange(6) < 2, np.arange(6) > 3
    assert push.into(key, (-1, first)) and push.into(key, (-1, second))
    assert push.into(key, (-1, second.copy())) and len(push.leaves) == 2
    assert not push.into(key, (-1, second.copy()), offset=1.0)
    assert not push.into(key, (-1, first | second))


ACTIVATIONS = {
    "relu": nn.relu,
    "leaky_relu": lambda x: nn.leaky_relu(x, 0.2),
    "abs": jnp.abs,
    "maxout": lambda x: jnp.maximum(x, -x),
    "max_pool": lambda x: nn.max_pool(x, (2,), (2,)),
    "largest": lambda x: x.max(1),
}


class Scaled(nn.Module):
    """Divides by the root of a width, behind an activation."""

    activation: str

    @nn.compact
    def __call__(self, x):
        x = ACTIVATIONS[self.activation](nn.Dense(12, name="wide")(x))
        return nn.Dense(3)(jnp.sin(x / np.sqrt(x.shape[-1])))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_positive_factors_pass_what_scales_with_its_input(activation):
    model, x = Scaled(activation), jax.random.normal(jax.random.key(0), (5, 4, 6))
    variables = model.init(jax.random.key(1), x)
    graph = jp.trace(model, variables, x)
    slim = jp.shrink(graph, {"wide": [1, 4, 5]})
    assert slim.report["left_whole"] == {}
    assert slim.report["rescaled"] == pytest.approx(
        {"params/wide/kernel": 0.5, "params/wide/bias": 0.5}
    )
    assert jp.verify(graph, slim.plan, x) < 1e-6


@pytest.mark.parametrize("activation", [nn.gelu, lambda x: nn.leaky_relu(x - 1.0)])
def test_no_factor_passes_what_bends_elsewhere(activation, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "bent", activation)
    model, x = Scaled("bent"), jnp.ones((2, 4, 6))
    graph = jp.trace(model, model.init(jax.random.key(1), x), x)
    slim = jp.shrink(graph, {"wide": [1, 4, 5]})
    assert "no weights can make up for it" in slim.report["left_whole"]["wide"]
