"""Fields that hold no module are stored as Flax stores them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax.core import FrozenDict

from jaxprune.frameworks.linen_fields import is_plain, plain_fields

REGISTER = nn.Module._register_submodules


class Holds(nn.Module):
    """Modules in every kind of field, and every kind of other value."""

    widths: tuple = (3, (4, "same"))
    listed: list = ()  # type: ignore[assignment]
    table: dict | None = None
    given: nn.Module | None = None
    kind: type = nn.Dense
    make: object = functools.partial(nn.Dense, 2)
    frozen: FrozenDict | None = None

    def setup(self):
        self.layers = [nn.Dense(3), nn.Dense(4)]
        self.nested = {"a": (nn.Dense(2), 7)}
        self.count = 5

    def __call__(self, x):
        for layer in (*self.layers, *self.listed, self.nested["a"][0], self.given):
            x = layer(x)
        return self.table["last"](self.frozen["of"](x)) * self.count


def held():
    module = Holds(
        listed=[nn.Dense(6)],
        table={"last": nn.Dense(2)},
        given=nn.Dense(3),
        frozen=FrozenDict({"of": nn.Dense(3)}),
    )
    x = jnp.ones((1, 3))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)

    def fields(module):
        module(x)
        names = (*Holds.__dataclass_fields__, "layers", "nested", "count")
        found = {name: getattr(module, name) for name in names if name != "parent"}
        return found, module._compact_name_scope_modules

    found = []
    jax.eval_shape(
        lambda v: found.append(module.apply(v, method=fields)) or v, variables
    )
    return jax.tree.map(jnp.shape, variables), str(found), found[0][1]


def test_modules_are_as_without_it():
    shapes, fields, empty = held()
    with plain_fields():
        assert nn.Module._register_submodules is not REGISTER
        now = held()
    assert now[0] == shapes and len(jax.tree.leaves(shapes)) > 8
    assert now[1] == fields
    assert type(now[2]) is type(empty) is FrozenDict


def test_flax_is_as_before_when_the_last_one_leaves():
    with pytest.raises(ZeroDivisionError), plain_fields():
        with plain_fields():
            pass
        assert nn.Module._register_submodules is not REGISTER
        raise ZeroDivisionError
    assert nn.Module._register_submodules is REGISTER


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ((3, (None, "same")), True),
        (jnp.float32, True),
        (nn.relu, False),  # jitted: an object, of which nothing is known
        (nn.initializers.zeros, True),
        ([3], False),  # Flax makes it a tuple
        ((3, nn.Dense(2)), False),
        (FrozenDict({"a": nn.Dense(2)}), False),
        (nn.Dense(2), False),
    ],
)
def test_plain_values(value, plain):
    assert is_plain(value) is plain
