"""Complex weights: ranked by magnitude, never refitted as if they were real."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

X = jax.random.normal(jax.random.key(0), (64, 6))
BATCHES = [(X, jnp.arange(64) % 4)]


class Complex(nn.Module):
    """As in networks of quantum states, and Fourier operators."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(8, param_dtype=jnp.complex64, name="one")(x)
        h = nn.Dense(4, param_dtype=jnp.complex64, name="two")(h * jnp.abs(h))
        return jnp.abs(h)


def _network():
    """Channels 0 to 3 are strong and imaginary, 4 to 7 weak and real."""
    variables = Complex().init(jax.random.key(1), X)
    one = variables["params"]["one"]
    strong, weak = 3j * jnp.abs(one["kernel"][:, :4]), one["kernel"][:, 4:].real / 99
    one["kernel"] = jnp.concatenate([strong, weak.astype(strong.dtype)], 1)
    return variables, jp.trace(Complex(), variables, X)


@pytest.mark.parametrize(
    "criterion",
    ["l1", "l2", "lamp", "fpgm", "taylor", "taylor_examples", "fisher", "hessian"]
    + ["activation_mean", "activation_variance", "entropy", "chip"],
)
def test_imaginary_parts_count(criterion):
    variables, graph = _network()
    found = jp.score(graph, variables, criterion, batches=BATCHES)["one"]
    assert found[:4].min() > found[4:].max()


def test_gates_of_complex_weights_are_derivatives():
    """<w, dL/dw> is the slope of the loss in a gate on all that a channel has."""
    variables, graph = _network()
    x, labels = BATCHES[0]

    def loss(gate, channel):
        one, two = variables["params"]["one"], variables["params"]["two"]
        by = jnp.ones(8).at[channel].set(gate)
        params = {
            "one": {"kernel": one["kernel"] * by, "bias": one["bias"] * by},
            "two": {"kernel": two["kernel"] * by[:, None], "bias": two["bias"]},
        }
        logits = Complex().apply({"params": params}, x)
        return -jnp.take_along_axis(nn.log_softmax(logits), labels[:, None], 1).mean()

    slopes = [jax.grad(loss)(1.0, channel) for channel in range(8)]
    found = jp.score(graph, variables, "taylor", batches=BATCHES)["one"]
    np.testing.assert_allclose(found, np.abs(slopes), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("method", ["l1", "lasso", "cpli", "importance_redundancy"])
def test_a_dead_channel_leaves_without_a_trace(method):
    variables = Complex().init(jax.random.key(1), X)
    one, two = variables["params"]["one"], variables["params"]["two"]
    one["kernel"] = one["kernel"].at[:, 3].set(0)
    two["kernel"] = two["kernel"].at[3].set(0)
    slim = jp.prune(Complex(), variables, BATCHES, method=method, keep=7 / 8)
    assert list(slim.plan["one"]) == [0, 1, 2, 4, 5, 6, 7]
    np.testing.assert_allclose(
        slim.model.apply(slim.variables, X),
        Complex().apply(variables, X),
        rtol=1e-4,
        atol=1e-5,
    )
    assert np.abs(slim.variables["params"]["two"]["kernel"].imag).max() > 0.1
