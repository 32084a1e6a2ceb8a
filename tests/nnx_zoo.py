"""NNX objects that the tests share: a layer between two others, moved weights."""

import jax.numpy as jnp
import numpy as np
from flax import nnx


class Between(nnx.Module):
    """A layer between two others, so that both of its sides can shrink."""

    def __init__(self, layer, width=8, inputs=5, rngs=None):
        self.before = nnx.Linear(inputs, width, rngs=rngs)
        self.layer = layer
        self.after = nnx.LinearGeneral(layer.out, 3, axis=layer.axis, rngs=rngs)

    def __call__(self, x):
        return self.after(self.layer(nnx.tanh(self.before(x))))


class Layer(nnx.Module):
    """One layer and the width that comes out of it."""

    def __init__(self, layer, out, axis=-1, call=None):
        self.layer, self.out, self.axis = layer, out, axis
        self.call = call

    def __call__(self, x):
        return self.layer(x) if self.call is None else self.call(self.layer, x)


def moved(model, seed=0):
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
