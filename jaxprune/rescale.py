"""Constants that follow a size (1/sqrt(d) of attention), folded into the kernels.

The source recomputes such a constant from the slim arrays, which changes the function:
after a query/key width shrinks from D to D', scores are divided by sqrt(D') instead of
sqrt(D). Where the operand of such a factor is linear in some kernels that nothing else
reads, those kernels (and biases, or the scales of a norm in between) take the factor
sqrt(D'/D), and the slim model equals the masked original exactly; the calls of a layer
that is called several times take it together. What else reads such a kernel is made up
for where it is multiplied with something that can take the inverse: the last norm, for
an embedding that is the table of the logits as well. Where the operand is not linear,
what its result is multiplied with next may take the factor. Where nothing can, the
static check refuses the plan.
"""

# JAX types `aval` as its base class, which has no shape, and `val` as no attribute.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.graph import ChannelGraph, Record, Site
from jaxprune.graph.evaluate import bind
from jaxprune.graph.wiring import OPAQUE, Key, Scalars, Wiring, scalars
from jaxprune.pushes import Leaf, Push
from jaxprune.regions import mark


@dataclass(frozen=True, eq=False)
class Factor:
    """What one variable is multiplied with: `by`, on a region of one axis or all; its
    sum with the leaf's offset is, where the source reads `1 + scale`."""

    leaf: Leaf
    by: float


@dataclass(frozen=True, eq=False)
class Folded:
    """Factors of variables, and the sites whose constants they make up for."""

    factors: tuple[Factor, ...] = ()
    sites: frozenset[Site] = frozenset()

    @property
    def of_leaves(self) -> dict[str, list[Factor]]:
        """The factors of each variable that has any."""
        found: dict[str, list[Factor]] = {}
        for factor in self.factors:
            found.setdefault(factor.leaf.path, []).append(factor)
        return found

    @property
    def by_path(self) -> dict[str, float]:
        """What each variable, or the parts of it that are scaled, is multiplied with."""
        parts: dict[tuple[str, Any], float] = {}
        for factor in self.factors:
            part = factor.leaf.path, mark(factor.leaf.region)
            parts[part] = parts.get(part, 1.0) * factor.by
        return {path: by for (path, _), by in parts.items()}


def fold_constants(
    graph: ChannelGraph, literals: Mapping[Site, Sequence[Any]]
) -> Folded:
    """The factors that undo the size-dependent constants of a slim program.

    Args:
      literals: of the slim program, from `check.align`.
    """
    wiring = graph.wiring
    context = wiring, graph.records, graph.handle.is_parameter
    known = scalars(wiring, literals, bind)
    factors: list[Factor] = []
    found: list[_Number] = []

    def settled(numbers: Sequence[_Number], push: Push | None) -> bool:
        # A push changes no result, whatever the weights: one may follow another.
        if push is not None:
            by = numbers[0].by
            factors.extend(Factor(leaf, by) for leaf in push.leaves)
            if push.against is not None:
                factors.extend(Factor(leaf, 1 / by) for leaf in push.against.leaves)
            found.extend(numbers)
        return push is not None

    left = [
        number
        for number in _numbers(wiring, literals, known)
        if not settled([number], _pushed(*context, [number]))
        and not settled([number], _passed_on(*context, number.result))
    ]
    for numbers in _sharing(*context, left):
        settled(numbers, _pushed(*context, numbers))
    done = {number.edge[0] for number in found}

    def serves(site: Site) -> bool:
        """True if what the literals of the site make is made up for wherever it goes."""
        if site in done or site == OPAQUE:
            return site != OPAQUE
        made = site[:-1], wiring.equations[site].outvars[0]
        return made in known and all(serves(other) for other, _ in wiring.readers[made])

    sites = frozenset().union(*(number.sites for number in found))
    return Folded(tuple(factors), frozenset(filter(serves, sites)))


class _Number(NamedTuple):
    """An array times a constant that differs in the slim program.

    Attributes:
      edge: site and operand number of the array where it meets the constant.
      array, result: what is multiplied, and the product.
      by: the factor that makes up for the difference.
      sites: of the literals that the constant is made of.
    """

    edge: tuple[Site, int]
    array: Key
    result: Key
    by: float
    sites: frozenset[Site]


def _numbers(
    wiring: Wiring, literals: Mapping[Site, Sequence[Any]], known: Scalars
) -> Iterator[_Number]:
    for site, eqn in wiring.equations.items():
        name = eqn.primitive.name
        if name not in ("mul", "div") or site not in literals:
            continue
        keys = wiring.operands(site)
        for place in (1, 0) if name == "mul" else (1,):
            constant = _constant(eqn, keys, place, site, literals, known)
            other = keys[1 - place]
            if constant is None or other is None or other in known:
                continue
            old, new, sites = constant
            if not (old > 0 and new > 0):
                continue
            by = old / new if name == "mul" else new / old
            result = site[:-1], eqn.outvars[0]
            yield _Number((site, 1 - place), other, result, by, sites)


def _sharing(
    wiring: Wiring,
    records: Mapping[Site, Record],
    is_parameter: Callable[[str], bool],
    numbers: Sequence[_Number],
) -> list[list[_Number]]:
    """Numbers of one factor that would scale the same variables, by twos and more: the
    uses of a layer that is called several times."""
    found: list[tuple[set[str], list[_Number]]] = []
    for number in numbers:
        push = Push(wiring, records, is_parameter)
        if not push.into(number.array, None):
            continue
        paths, members = {leaf.path for leaf in push.leaves}, [number]
        apart = []
        for others, known in found:
            if number.by == known[0].by and paths & others:
                paths, members = paths | others, known + members
            else:
                apart.append((others, known))
        found = [*apart, (paths, members)]
    return [members for _, members in found if len(members) > 1]


def rescale(kept: Any, folded: Folded, variables: Any) -> Any:
    """The sliced variables with the factors multiplied in.

    kept: {path: {axis: kept indices}}, from `slicing.keep_indices`.
    """
    leaves, changed = trees.flatten(variables), {}
    for path, factors in folded.of_leaves.items():
        if not isinstance(leaf := leaves[path], jax.ShapeDtypeStruct):
            by, plus = multiplier(factors, kept.get(path, {}), len(leaf.shape))
            changed[path] = scaled(leaf, by, plus)
    return trees.replace(variables, changed) if changed else variables


def multiplier(
    factors: Sequence[Factor], kept: Mapping[int, np.ndarray], rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Two float64 arrays, broadcastable to the sliced variable: what it is multiplied
    with by all of its factors, and what is added then."""
    product, plus = np.ones((1,) * rank), np.zeros((1,) * rank)
    for (_, region, offset), by in ((factor.leaf, factor.by) for factor in factors):
        if region is not None:
            axis, mask = region
            mask = mask[kept[rank + axis]] if rank + axis in kept else mask
            shape = [1] * rank
            shape[axis] = mask.size
            by = np.where(mask, by, 1.0).reshape(shape)
        product, plus = product * by, (plus + offset) * by - offset
    return product, plus


def scaled(leaf: Any, by: np.ndarray, plus: np.ndarray | float = 0.0) -> jax.Array:
    """The product and what is added, rounded once to the array's own precision."""
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    product = jnp.asarray(leaf, wide) * jnp.asarray(by, wide)
    return (product + jnp.asarray(plus, wide)).astype(leaf.dtype)


def _differs(old: Any, new: Any) -> bool:
    """True for two numbers that are not equal."""
    if np.ndim(old) or np.ndim(new):
        return False
    numbers = [np.asarray(value) for value in (old, new)]
    if not all(jnp.issubdtype(number.dtype, jnp.number) for number in numbers):
        return False
    a, b = (complex(number) for number in numbers)  # bfloat16, too
    return a.imag == b.imag == 0 and a != b


def _constant(eqn, keys, place, site, literals, known):
    """(original, slim, literal sites) of a constant operand that differs, or None."""
    atom = eqn.invars[place]
    if keys[place] is not None:
        return known.get(keys[place])
    old, new = atom.val, literals[site][place]
    if not _differs(old, new):
        return None
    return complex(old).real, complex(new).real, frozenset([site])


# Ways of pushing one factor that are tried: one for each choice between the operands of
# a product.
_TRIES = 64


def _pushed(
    wiring: Wiring,
    records: Mapping[Site, Record],
    is_parameter: Callable[[str], bool],
    numbers: Sequence[_Number],
) -> Push | None:
    """A push for all of the numbers, which have one factor, that nothing else reads or
    that a second makes up for, or None: all choices are tried in turn."""
    script: list[int] = []
    for _ in range(_TRIES):
        push = Push(wiring, records, is_parameter, script)
        push.edges.update((*number.edge, mark(None)) for number in numbers)
        if len(numbers) > 1:  # what one of them scales is not scaled for another
            push.off.update(number.result for number in numbers)
        reached = all(push.into(number.array, None) for number in numbers)
        if reached and (push.closed() or push.balanced()):
            return push
        choices = push.choices
        while choices and choices[-1][0] + 1 >= choices[-1][1]:
            choices.pop()
        if not choices:
            return None
        script = [pick for pick, _ in choices]
        script[-1] += 1
    return None


def _passed_on(
    wiring: Wiring,
    records: Mapping[Site, Record],
    is_parameter: Callable[[str], bool],
    key: Key,
) -> Push | None:
    """A push into whatever the array is multiplied with next, or None."""
    push = Push(wiring, records, is_parameter)
    return push if push.onward(key) and push.closed() else None
