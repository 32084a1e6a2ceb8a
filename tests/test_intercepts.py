"""Which leaf may take the shift of a layer's outputs when channels before it go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.methods.taps import find_taps

X = np.random.default_rng(0).normal(size=(256, 6)).astype(np.float32)


def _hidden(params, x):
    return jax.nn.relu(x @ params["w0"] + params["b0"])


def separate(params, x):
    h = _hidden(params, x)
    return jnp.tanh(h @ params["w1"] + params["u"]) + jnp.tanh(h @ params["w2"])


def one_layer_twice(params, x):
    h = _hidden(params, x)
    layer = lambda y: jnp.tanh(y @ params["w1"] + params["u"])
    return layer(h) + layer(jnp.sqrt(h))


def one_kernel_two_biases(params, x):
    h = _hidden(params, x)
    return jnp.tanh(h @ params["w1"] + params["u"]) + jnp.tanh(
        jnp.sqrt(h) @ params["w1"] + params["v"]
    )


def one_bias_two_kernels(params, x):
    h = _hidden(params, x)
    return jnp.tanh(h @ params["w1"] + params["u"]) + jnp.tanh(
        h @ params["w2"] + params["u"]
    )


def _params():
    rng = np.random.default_rng(1)
    shapes = {"w0": (6, 8), "b0": (8,), "w1": (8, 5), "w2": (8, 5), "u": (5,)}
    params = {k: rng.normal(size=s) for k, s in {**shapes, "v": (5,)}.items()}
    params["w0"][:, 3], params["b0"][3] = 0.0, 2.0  # a constant channel
    return {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (separate, {("w1", "u"), ("w2", None)}),
        (one_layer_twice, {("w1", "u")}),
        (one_kernel_two_biases, {("w1", None)}),
        (one_bias_two_kernels, {("w1", None), ("w2", None)}),
    ],
)
def test_an_intercept_belongs_to_one_kernel_at_all_its_uses(model, expected):
    taps = find_taps(jp.trace(model, _params(), X))
    found = {(tap.path, tap.intercept) for tap in taps if tap.path != "w0"}
    assert found == expected


def test_a_shared_bias_is_left_and_the_kernels_are_fitted_without_one():
    """Against NumPy's least squares of the targets before the bias."""
    params = _params()
    batches = [(X[i : i + 64], None) for i in range(0, 256, 64)]
    slim = jp.prune(
        one_bias_two_kernels, params, batches, method="activation_variance",
        keep=7 / 8, positions=None, ridge=0.0,
    )  # fmt: skip
    kept = next(iter(slim.plan.values()))
    assert 3 not in kept
    np.testing.assert_array_equal(slim.variables["u"], params["u"])
    h = np.asarray(_hidden(params, X), np.float64)
    for name in ("w1", "w2"):
        target = h @ np.asarray(params[name], np.float64)
        solution = np.linalg.lstsq(h[:, kept], target, rcond=None)[0]
        np.testing.assert_allclose(slim.variables[name], solution, atol=1e-3)
