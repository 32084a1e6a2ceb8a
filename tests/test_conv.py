"""The tiny-map convolution against a NumPy convolution and against lax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxprune.conv import conv_general_dilated, max_pool_2x2, plain_convolutions

NHWC = ("NHWC", "HWIO", "NHWC")
SAME = ((1, 1), (1, 1))


def numpy_conv(x, k, strides, pads):
    """The cross-correlation in float64, one output pixel at a time."""
    (top, bottom), (left, right) = pads
    size = (x.shape[1] + top + bottom, x.shape[2] + left + right)
    padded = np.zeros((x.shape[0], *size, x.shape[3]))
    for i in range(size[0]):
        for j in range(size[1]):
            if 0 <= i - top < x.shape[1] and 0 <= j - left < x.shape[2]:
                padded[:, i, j] = x[:, i - top, j - left]
    height = (size[0] - k.shape[0]) // strides[0] + 1
    width = (size[1] - k.shape[1]) // strides[1] + 1
    y = np.zeros((x.shape[0], height, width, k.shape[3]))
    for i in range(height):
        for j in range(width):
            a, b = i * strides[0], j * strides[1]
            patch = padded[:, a : a + k.shape[0], b : b + k.shape[1]]
            y[:, i, j] = np.einsum("nhwi,hwio->no", patch, k)
    return y


def arrays(shape, kernel, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, *shape, 3)).astype(np.float32)
    k = rng.normal(size=(*kernel, 3, 4)).astype(np.float32)
    return x, k


def primitives(function, *args):
    return {eqn.primitive.name for eqn in jax.make_jaxpr(function)(*args).eqns}


def same_conv(x, k):
    return conv_general_dilated(x, k, (1, 1), SAME, dimension_numbers=NHWC)


CASES = [
    # input, kernel, strides, pads
    ((1, 1), (3, 3), (1, 1), SAME),
    ((2, 2), (3, 3), (1, 1), SAME),
    ((2, 2), (3, 3), (2, 2), SAME),
    ((4, 4), (3, 3), (2, 2), SAME),
    ((3, 4), (3, 3), (2, 3), ((0, 1), (1, 0))),
    ((1, 4), (1, 3), (1, 1), ((0, 0), (1, 1))),
    ((4, 1), (2, 2), (1, 1), ((0, 1), (0, 1))),
    ((5, 5), (4, 4), (1, 1), ((0, 0), (0, 0))),
    ((4, 4), (3, 3), (1, 1), ((-1, 0), (0, -1))),
    ((1, 1), (3, 3), (3, 3), ((3, 2), (2, 3))),
]


@pytest.mark.parametrize("shape,kernel,strides,pads", CASES)
def test_equals_numpy_and_lax_with_gradients(shape, kernel, strides, pads):
    x, k = arrays(shape, kernel)

    def fast(x, k):
        return conv_general_dilated(x, k, strides, pads, dimension_numbers=NHWC)

    def plain(x, k):
        return lax.conv_general_dilated(x, k, strides, pads, dimension_numbers=NHWC)

    if all(low >= 0 and high >= 0 for low, high in pads):
        expected = numpy_conv(x, k, strides, pads)
        np.testing.assert_allclose(fast(x, k), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fast(x, k), plain(x, k), rtol=1e-5, atol=1e-5)
    assert "conv_general_dilated" not in primitives(fast, x, k)

    def loss(function):
        return jax.grad(lambda x, k: jnp.sum(jnp.sin(function(x, k))), (0, 1))

    for ours, theirs in zip(loss(fast)(x, k), loss(plain)(x, k), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_oracle_tells_a_flipped_kernel():
    x, k = arrays((2, 2), (3, 3))
    expected = numpy_conv(x, k, (1, 1), SAME)
    assert np.abs(same_conv(x, k[::-1, ::-1]) - expected).max() > 1.0


sizes = st.integers(1, 5)
pad = st.integers(0, 3)


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(sizes, sizes),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.one_of(
        st.sampled_from(["SAME", "VALID"]), st.tuples(*[st.tuples(pad, pad)] * 2)
    ),
)
def test_any_geometry_equals_lax(shape, kernel, strides, pads):
    if any(k > n for k, n in zip(kernel, shape, strict=True)) and pads == "VALID":
        return
    x, k = arrays(shape, kernel)
    y = conv_general_dilated(x, k, strides, pads, dimension_numbers=NHWC)
    expected = lax.conv_general_dilated(x, k, strides, pads, dimension_numbers=NHWC)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_products_only_on_tiny_maps_and_outside_the_plain_context():
    x, k = arrays((2, 2), (3, 3))
    large, _ = arrays((3, 3), (3, 3))
    pixel = k[:1, :1]
    assert "dot_general" in primitives(same_conv, x, k)
    assert primitives(same_conv, large, k) == {"conv_general_dilated"}
    assert "conv_general_dilated" in primitives(
        lambda x, k: conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=NHWC
        ),
        x,
        pixel,
    )
    with plain_convolutions():
        assert primitives(same_conv, x, k) == {"conv_general_dilated"}
    assert "dot_general" in primitives(same_conv, x, k)


def test_functions_jitted_before_are_traced_anew_in_the_plain_context():
    jitted = jax.jit(same_conv)
    x, k = arrays((2, 2), (3, 3))
    jitted(x, k)
    with plain_convolutions():
        text = str(jax.make_jaxpr(jitted)(x, k))
        assert "conv_general_dilated" in text and "dot_general" not in text
    assert "dot_general" in str(jax.make_jaxpr(jitted)(x, k))


@pytest.mark.parametrize(
    "options",
    [
        {"feature_group_count": 2},
        {"rhs_dilation": (2, 2)},
        {"lhs_dilation": (2, 2)},
        {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
        {"dimension_numbers": None},
        {"batch_group_count": 2},
    ],
)
def test_other_forms_are_those_of_lax(options):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 2, 2, 2)).astype(np.float32)
    inputs = 1 if "feature_group_count" in options else 2
    layout = options.get("dimension_numbers", NHWC)
    k = rng.normal(size=(2, 2, inputs, 2) if layout == NHWC else (2, 2, 2, 2))
    k = k.astype(np.float32)
    options = {"dimension_numbers": layout, **options}
    y = conv_general_dilated(x, k, (1, 1), SAME, **options)
    expected = lax.conv_general_dilated(x, k, (1, 1), SAME, **options)
    np.testing.assert_array_equal(y, expected)


def test_runs_the_parameters_of_a_jaxpr_equation():
    x, k = arrays((2, 2), (3, 3))
    with plain_convolutions():
        (eqn,) = jax.make_jaxpr(same_conv)(x, k).eqns
    y = conv_general_dilated(x, k, **eqn.params)
    np.testing.assert_allclose(y, numpy_conv(x, k, (1, 1), SAME), rtol=1e-5, atol=1e-5)
    assert "dot_general" in primitives(
        lambda x, k: conv_general_dilated(x, k, **eqn.params), x, k
    )


def test_bfloat16_rounds_once():
    x, k = arrays((2, 2), (3, 3))
    x, k = jnp.asarray(x, jnp.bfloat16), jnp.asarray(k, jnp.bfloat16)
    expected = numpy_conv(np.float64(x), np.float64(k), (1, 1), SAME)
    y = same_conv(x, k)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(y), expected, rtol=2**-8, atol=1e-3)
    y = conv_general_dilated(
        x,
        k,
        (1, 1),
        SAME,
        dimension_numbers=NHWC,
        preferred_element_type=jnp.float32,
    )
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_flax_takes_it_in_a_layer():
    x, _ = arrays((2, 2), (3, 3))
    layer = nn.Conv(4, (3, 3), conv_general_dilated=conv_general_dilated)
    variables = layer.init(jax.random.key(0), x)
    expected = nn.Conv(4, (3, 3)).apply(variables, x)
    np.testing.assert_allclose(
        layer.apply(variables, x), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (1, 2), (2, 7)])
def test_max_pool_equals_flax(shape):
    x, _ = arrays(shape, (1, 1))

    def flax_pool(x):
        return nn.max_pool(x, (2, 2), strides=(2, 2))

    np.testing.assert_array_equal(max_pool_2x2(x), flax_pool(x))
    assert "reduce_window_max" not in primitives(max_pool_2x2, x)

    def gradient(pool):
        # Behind a ReLU: two of three of these inputs tie at zero.
        return jax.grad(lambda x: jnp.sum(jnp.sin(pool(nn.relu(x - 0.5)) + 1)))(x)

    np.testing.assert_allclose(gradient(max_pool_2x2), gradient(flax_pool), rtol=1e-6)


def test_max_pool_is_that_of_xla_in_the_plain_context():
    with plain_convolutions():
        assert "reduce_window_max" in primitives(max_pool_2x2, jnp.ones((1, 4, 4, 2)))


def test_a_wrong_number_of_channels_is_the_error_of_lax():
    x, k = arrays((2, 2), (3, 3))
    with pytest.raises(ValueError, match="feature_group_count"):
        same_conv(x[..., :2], k)
