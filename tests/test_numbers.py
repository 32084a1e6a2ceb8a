"""Numbers that a source computes from a width: made up for, or the group stays whole.

The reference is the original itself with zeros for the removed channels' weights, which
knows nothing of what the slim program computes.
"""

import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import trees

TOKENS = jax.random.normal(jax.random.key(1), (2, 6, 5))
WORDS = jax.random.randint(jax.random.key(2), (2, 6), 0, 16)
FOLDED, WHOLE = {}, {}


def case(found, x=TOKENS):
    """Registers the body of a compact module; its first group loses channels."""

    def register(body):
        call = nn.compact(lambda self, x: body(x))
        call.__name__ = "__call__"
        found[body.__name__] = type("Net", (nn.Module,), {"__call__": call})(), x
        return body

    return register


def dense(x, name, features=12):
    return nn.Dense(features, name=name)(x)


def attend(scores, values):
    return nn.Dense(3, name="o")(nn.softmax(scores) @ values)


@case(FOLDED)
def convolved(x):
    """Queries and keys made by convolutions (the attention of diffusion networks)."""
    q, k = (nn.Conv(12, (3,), name=n)(x) for n in "qk")
    return attend(q @ k.swapaxes(1, 2) * q.shape[-1] ** -0.5, dense(x, "v", 5))


@case(FOLDED)
def keys_that_are_values(x):
    """Only the queries can take the factor."""
    q, k = dense(x, "q"), dense(x, "k")
    return attend(q @ k.swapaxes(1, 2) / jnp.sqrt(q.shape[-1]), k)


@case(FOLDED)
def divided_after_relu(x):
    h = nn.relu(dense(x, "q"))
    return dense(h / h.shape[-1], "o", 3)


@case(FOLDED)
def of_complex_numbers(x):
    q, k = (nn.Dense(12, param_dtype=jnp.complex64, name=n)(x) for n in "qk")
    scores = q @ k.conj().swapaxes(1, 2) / jnp.sqrt(q.shape[-1])
    return attend(jnp.abs(scores), dense(x, "v", 5))


@case(WHOLE)
def one_number_for_two_uses(x):
    """Of which one cannot take it."""
    q, k = dense(x, "q"), dense(x, "k")
    scale = jnp.sqrt(q.shape[-1])
    return attend(q @ k.swapaxes(1, 2) / scale, jnp.sin(nn.relu(k) + k / scale))


@case(FOLDED)
def beside_dead_code(x):
    q, k = dense(x, "q"), dense(x, "k")
    _ = jnp.zeros(q.shape) + q.std()
    return attend(q @ k.swapaxes(1, 2) / jnp.sqrt(q.shape[-1]), dense(x, "v", 5))


@case(FOLDED)
def masked_before_it_is_scaled(x):
    q = jnp.where(jnp.arange(6)[:, None] < 4, dense(x, "q"), 0.0)
    q = jnp.where(jnp.arange(6)[:, None] > 0, q, jnp.zeros_like(q))
    return attend(q * q.shape[-1] ** -0.5 @ dense(x, "k").swapaxes(1, 2), x)


@case(FOLDED)
def a_layer_used_twice(x):
    """Each use divides by its own root; the kernel takes the factor for both."""
    q, k = nn.Dense(12, name="q"), nn.Dense(12, name="k")
    for _ in range(2):
        scores = q(x) @ k(x).swapaxes(1, 2) / np.sqrt(q(x).shape[-1])
        x = x + nn.softmax(scores) @ x
    return dense(x, "o", 3)


@case(FOLDED)
def half_of_it_on_either_side(x):
    """Of one fused projection, by one number that JAX computes."""
    q, k, v = jnp.split(nn.Dense(36, name="qkv")(x), 3, -1)
    scale = jnp.sqrt(jnp.sqrt(q.shape[-1]))
    return attend((q / scale) @ (k / scale).swapaxes(1, 2), v)


@case(FOLDED)
def scaled_twice(x):
    q = dense(x, "q")
    q = q * q.shape[-1] ** -0.25
    q = q * q.shape[-1] ** -0.25
    return attend(q @ dense(x, "k").swapaxes(1, 2), x)


@case(FOLDED)
def filled_in_with_zeros(x):
    h = dense(x, "q").at[:, jnp.array([0, 2, 9])].get(mode="fill", fill_value=0.0)
    return dense(jnp.sin(h / np.sqrt(h.shape[-1])), "o", 3)


@case(FOLDED)
def scaled_before_two_products(x):
    h = nn.gelu(dense(x, "q"))
    h = h * h.shape[-1] ** -0.5
    return dense(h, "o", 3) * dense(h, "p", 3)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        att = nn.MultiHeadDotProductAttention(1, qkv_features=12, name="q")
        return x + att(x, x), None


@case(FOLDED)
def shared_by_the_rounds_of_a_scan(x):
    scan = nn.scan(
        Layer, variable_broadcast="params", split_rngs={"params": False}, length=2
    )
    return dense(scan(name="layer")(x, None)[0], "o", 3)


@case(FOLDED)
def a_branch_on_a_width(x):
    h = jnp.sin(dense(x, "q"))
    return dense(h * (2.0 if h.shape[-1] > 8 else 0.5), "o", 3)


@case(FOLDED)
def a_norm_of_length_sqrt_d(x):
    """RMS normalisation written as a direction times sqrt(d), then a scale."""
    h = dense(x, "q")
    h = h / jnp.linalg.norm(h, axis=-1, keepdims=True) * h.shape[-1] ** 0.5
    return dense(nn.relu(h * nn.Embed(2, 12, name="scale")(jnp.array(0))), "o", 3)


@case(FOLDED)
def a_norm_of_length_sqrt_d_with_one_plus_its_scale(x):
    """The sum cannot take the factor; the layers behind the product can."""
    h = dense(x, "q")
    h = h / jnp.linalg.norm(h, axis=-1, keepdims=True) * h.shape[-1] ** 0.5
    h = h * (1 + nn.Embed(2, 12, name="scale")(jnp.array(0)))
    return dense(h, "o", 3) + dense(h * jnp.tanh(x.sum()), "p", 3)


@case(WHOLE)
def a_square_lacks_the_factor_twice(x):
    h = jnp.tanh(dense(x, "q"))
    y = h * h.shape[-1] ** 0.5
    return dense(y * y, "o", 3)


@case(WHOLE)
def a_product_of_products_lacks_it_twice(x):
    h = jnp.tanh(dense(x, "q"))
    y = h * h.shape[-1] ** 0.5
    return dense(y * jnp.sin(x.sum()) * y, "o", 3)


@case(WHOLE)
def scores_of_directions(x):
    """Nothing follows but a softmax."""
    h = dense(x, "q")
    h = h / jnp.linalg.norm(h, axis=-1, keepdims=True)
    return attend(h @ h.swapaxes(1, 2) * jnp.sqrt(h.shape[-1]), dense(x, "v", 5))


@case(WHOLE)
def states_after_tanh(x):
    h = jnp.tanh(dense(x, "q"))
    return attend(h @ h.swapaxes(1, 2) / h.shape[-1] ** 0.5, h)


@case(WHOLE, WORDS)
def a_tied_table(x):
    table = nn.Embed(16, 12, name="q")
    x = table(x)
    return table.attend(x * jnp.sqrt(x.shape[-1]))


@case(WHOLE)
def inside_a_loop(x):
    def step(_, h):
        return h + jnp.sin(h) / h.shape[-1]

    return dense(jax.lax.fori_loop(0, 3, step, dense(x, "q")), "o", 3)


@case(FOLDED)
def scaled_before_its_own_gate(x):
    """Each use lacks the factor: the gate's kernel takes it, and the next one's."""
    h = nn.gelu(dense(x, "q"))
    h = h * h.shape[-1] ** -0.5
    return dense(h * dense(h, "g"), "o", 3)


@case(WHOLE)
def scaled_before_scores_of_its_own(x):
    h = nn.gelu(dense(x, "q"))
    h = h * h.shape[-1] ** -0.5
    return jnp.einsum("btd,bsd->bts", h, dense(h, "w")) @ x


@case(WHOLE)
def once_behind_the_other_in_a_layer_used_twice(x):
    """The kernel would have to take it twice for one use, and the uses go together."""
    layer, memory = nn.Dense(12, name="q"), nn.Dense(12, name="m")

    def encoded(x):
        q = layer(x) * layer(x).shape[-1] ** -0.25
        q = q * q.shape[-1] ** -0.25
        scores = q @ jnp.tanh(memory(x)).swapaxes(1, 2)
        return nn.softmax(scores * q.shape[-1] ** -0.25) @ x

    return dense(encoded(x) + encoded(x[::-1]), "o", 3)


@case(WHOLE)
def filled_in_beside_it(x):
    h = dense(x, "q").at[:, jnp.array([0, 2, 9])].get(mode="fill", fill_value=1.0)
    return dense(jnp.sin(h / np.sqrt(h.shape[-1])), "o", 3)


@case(WHOLE)
def behind_statistics_of_the_batch(x):
    """Running statistics that took the factor would lose it in training."""
    q, k = (
        nn.BatchNorm(True, use_scale=False, use_bias=False, name=f"{n}_bn")(dense(x, n))
        for n in "qk"
    )
    return attend(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), x)


@case(WHOLE)
def rounds_of_a_loop(x):
    h = dense(x, "q")
    state = jax.lax.while_loop(
        lambda c: c[0] < c[1],
        lambda c: (c[0] + 1, c[1], jnp.sin(c[2]) * 1.1),
        (0, h.shape[-1], h),
    )
    return dense(state[2], "o", 3)


@case(WHOLE)
def an_argument_of_a_jitted_function(x):
    h = jnp.abs(dense(x, "q"))
    return dense(jax.jit(lambda h, n: h * n)(h, h.shape[-1]), "o", 3)


@case(WHOLE)
def inside_a_branch(x):
    q, k = dense(x, "q"), dense(x, "k")
    scores = jax.lax.cond(
        x.sum() > -1e9,
        lambda q, k: q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]),
        lambda q, k: q @ k.swapaxes(1, 2),
        q,
        k,
    )
    return attend(scores, dense(x, "v", 5))


def _made(model, x):
    variables = model.init(jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: 1.5 * leaf + 0.1, variables)
    graph = jp.trace(model, variables, x)
    group = next(g for g in graph.groups if any("/q" in s.path for s in g.slots))
    return variables, graph, group, {group.name: np.arange(group.size // 3)}


def _silenced(variables, group, kept):
    leaves = {path: np.array(leaf) for path, leaf in trees.flatten(variables).items()}
    gone = np.setdiff1d(np.arange(group.size), kept)
    for slot in group.slots:
        rows = slot.index[gone].ravel()
        np.moveaxis(leaves[slot.path], slot.axis, 0)[rows] = 0
    return trees.replace(variables, leaves)


@pytest.mark.parametrize("name", list(FOLDED))
def test_weights_make_up_for_the_number(name):
    model, x = FOLDED[name]
    variables, graph, group, plan = _made(model, x)
    slim = jp.shrink(graph, plan)
    assert slim.report["left_whole"] == {} and slim.report["rescaled"]
    expected = model.apply(_silenced(variables, group, plan[group.name]), x)
    found = slim.model.apply(slim.variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert jp.verify(graph, plan, x) < 1e-4


@pytest.mark.parametrize("name", list(WHOLE))
def test_what_nothing_makes_up_for_stays_whole(name):
    model, x = WHOLE[name]
    variables, graph, group, plan = _made(model, x)
    slim = jp.shrink(graph, plan)
    assert "number that the source computes" in slim.report["left_whole"][group.name]
    np.testing.assert_allclose(
        slim.model.apply(slim.variables, x), model.apply(variables, x), rtol=1e-5
    )
    # A replay keeps the number.
    replayed = jp.shrink(graph, plan, replay=True)
    expected = model.apply(_silenced(variables, group, plan[group.name]), x)
    np.testing.assert_allclose(
        replayed.model(replayed.variables, x), expected, rtol=1e-4, atol=1e-5
    )


def _two_outputs(params, x):
    h = nn.relu(x @ params["a"]) @ params["b"]
    return {"ids": jnp.full((4,), 16383), "made": jax.lax.complex(h, 2 * h)}


@pytest.mark.parametrize("wrong", [lambda o: o.real + 0j, lambda o: 0.99 * o])
def test_every_output_is_proven_at_its_own_scale(monkeypatch, wrong):
    """Large indices beside it and imaginary parts hide nothing."""
    keys = jax.random.split(jax.random.key(0))
    params = {
        "a": jax.random.normal(keys[0], (5, 9)),
        "b": jax.random.normal(keys[1], (9, 3)),
    }
    graph = jp.trace(_two_outputs, params, TOKENS)
    assert jp.verify(graph, {"a": [0, 3, 4]}, TOKENS) < 1e-4
    module = importlib.import_module("jaxprune.verify")
    own = module.masked_outputs

    def broken(*args, **options):
        outputs = own(*args, **options)
        return [wrong(o) if jnp.iscomplexobj(o) else o for o in outputs]

    monkeypatch.setattr(module, "masked_outputs", broken)
    with pytest.raises(jp.PruneError, match="differs from the masked original"):
        jp.verify(graph, {"a": [0, 3, 4]}, TOKENS)
