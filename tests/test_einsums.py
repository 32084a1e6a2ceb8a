"""Einsums of three arrays, whose order of contraction depends on the sizes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import opt_einsum

import jaxprune as jp
from jaxprune.einsums import pinned, recorded

CHAIN = "bi,ij,jk->bk"


def _products(*operands):
    jaxpr = jax.make_jaxpr(lambda *x: jnp.einsum(CHAIN, *x))(*operands)
    return [eqn.invars[0].aval.shape for eqn in jaxpr.eqns]


def _sized(b, i, j, k):
    return [jax.ShapeDtypeStruct(s, np.float32) for s in ((b, i), (i, j), (j, k))]


def test_orders_of_one_program_are_taken_by_another():
    small, large = _sized(2, 16, 40, 3), _sized(50, 16, 40, 3)
    assert _products(*small) != _products(*large)
    orders = {}
    with recorded(orders):
        _products(*small)
    assert list(orders) == [CHAIN]
    with pinned(orders):  # a call more than was recorded picks its own
        first, second = _products(*large), _products(*large)
    assert first != second == _products(*large)
    assert opt_einsum.contract_path.__module__.startswith("opt_einsum")


class Bilinear(nn.Module):
    """A low-rank product and a bilinear form, as in tensor factorisations."""

    @nn.compact
    def __call__(self, x):
        wide = nn.Dense(8, name="wide")(x)
        u = self.param("u", nn.initializers.lecun_normal(), (8, 16))
        v = self.param("v", nn.initializers.lecun_normal(), (16, 12))
        x = nn.gelu(jnp.einsum("bi,ir,ro->bo", wide, u, v))
        form = self.param("form", nn.initializers.lecun_normal(), (12, 6, 5))
        return jnp.einsum("bi,bj,ijk->bk", x, nn.Dense(6, name="side")(x), form)


def test_a_slim_model_may_contract_in_another_order():
    model, x = Bilinear(), jax.random.normal(jax.random.key(0), (4, 7))
    variables = model.init(jax.random.key(1), x)
    graph = jp.trace(model, variables, x)
    plan = {g.name: np.arange(1, 1 + g.size // 2) for g in graph.groups}
    slim = jp.shrink(graph, plan)
    assert slim.report["left_whole"] == {}
    params = jax.tree.map(np.array, variables["params"])
    # The removed channels of every array at zero: the original gives the same.
    for group in graph.groups:
        gone = np.setdiff1d(np.arange(group.size), plan[group.name])
        for slot in group.slots:
            leaf = params
            for part in slot.path.split("/")[1:]:
                leaf = leaf[part]
            np.moveaxis(leaf, slot.axis, 0)[slot.index[gone].ravel()] = 0
    np.testing.assert_allclose(
        slim.model.apply(slim.variables, x),
        model.apply({"params": params}, x),
        atol=1e-5,
    )
    assert jp.verify(graph, slim.plan, x) < 1e-5
