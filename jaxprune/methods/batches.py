"""Calibration batches as users pass them: read, checked, cut to one size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.errors import DataError

NO_BATCHES = (
    "no calibration batches: pass an iterable of (x, y), as in "
    "jaxprune.prune(model, variables, batches); an NNX model holds its variables"
)


class Batch(NamedTuple):
    """One batch.

    Attributes:
      inputs: trees of arrays (B, ...), one for each input of the model.
      labels: a tree of arrays (B, ...), or None.
      size: B.
    """

    inputs: tuple[Any, ...]
    labels: Any
    size: int


def iterable_of(batches: Any) -> Iterable[Any]:
    """The batches as something that can be run over often.

    What hands out one and the same iterator is read into memory.

    Raises:
      DataError: no iterable, or one batch where several are expected.
    """
    if batches is None:
        raise DataError(NO_BATCHES)
    pair = isinstance(batches, tuple) and len(batches) == 2
    alone = pair and not all(map(_is_sequence, batches))
    try:
        if alone or _is_array(batches) or isinstance(batches, str | bytes | Mapping):
            raise TypeError
        return list(batches) if iter(batches) is iter(batches) else batches
    except TypeError as error:
        raise DataError(
            "expected calibration batches, an iterable of (x, y), found "
            f"{shown(batches)}; one batch alone is passed as [(x, y)], or as [x] "
            "without labels"
        ) from error


def read_all(batches: Iterable[Any], first: Batch | None = None) -> Iterator[Batch]:
    """Yields the batches.

    Args:
      first: whose shapes and types all of them must have, but for their size; by
        default the first that is yielded.

    Raises:
      DataError: a batch is of another form than (x, y) or x, or than the first.
    """
    for number, batch in enumerate(batches):
        found = _read(batch, f"calibration batch {number}")
        first = first or found
        for name, tree, like in (
            ("x", found.inputs, first.inputs),
            ("y", found.labels, first.labels),
        ):
            if _form(tree) != _form(like):
                raise DataError(
                    f"{name} of calibration batch {number}: expected {shown(like)} as "
                    f"in the first batch but for the number of examples, found "
                    f"{shown(tree)}; one batch alone is passed as [(x, y)]"
                )
        yield found


def check_numbers(batch: Batch, number: int) -> None:
    """Nothing, if the inputs hold no NaN; infinities may be a mask.

    Raises:
      DataError: they do, with the first example.
    """
    for leaf in jax.tree.leaves(batch.inputs):
        if not jnp.issubdtype(leaf.dtype, np.inexact):
            continue
        module = np if isinstance(leaf, np.ndarray) else jnp
        wrong = module.isnan(leaf).any(tuple(range(1, leaf.ndim)))
        if wrong.any():
            raise DataError(
                f"x of calibration batch {number} holds NaN, first in example "
                f"{int(wrong.argmax())} of {batch.size}: {shown(leaf)}; repair the data "
                "or leave the example out"
            )


def cut(batch: Batch, size: int) -> Iterator[tuple[tuple[Any, ...], Any, np.ndarray]]:
    """Yields (inputs, labels, weight (size,)): parts of one size, the last filled up.

    What fills up has weight 0. It is an example again, not zeros: a model that
    normalises by its input's norm makes NaN of zeros, and 0 * NaN is NaN.
    """
    for start in range(0, batch.size, size):
        have = min(size, batch.size - start)
        weight = np.zeros(size, np.float32)
        weight[:have] = 1

        def part(array: Any, start: int = start, have: int = have) -> Any:
            if have == size:
                return array[start : start + size]
            index = np.full(size, start)
            index[:have] += np.arange(have)
            return np.asarray(array)[index]

        yield *jax.tree.map(part, (batch.inputs, batch.labels)), weight


def label_range(labels: Any) -> list[int]:
    """The least and the largest of an array of integers; nothing for other labels."""
    if not (_is_array(labels) and _kind(labels) in "iu" and labels.size):
        return []
    values = np.asarray(labels)
    return [int(values.min()), int(values.max())]


def _read(batch: Any, name: str) -> Batch:
    if _is_sequence(batch) and len(batch) == 2:
        x, y = batch
    elif _is_array(batch):
        x, y = batch, None
    else:
        raise DataError(
            f"{name}: expected (x, y), or an array x alone, found {shown(batch)}; "
            "wrap several inputs as ((x1, x2), y)"
        )
    inputs = tuple(x) if isinstance(x, tuple | list) else (x,)
    # Lists of numbers are labels as good as arrays.
    y = jax.tree.map(
        lambda a: np.asarray(a) if _is_numbers(a) else a, y, is_leaf=_is_numbers
    )
    sizes = set()
    for what, tree in (("x", inputs), ("y", y)):
        leaves = jax.tree.leaves(tree)
        for leaf in leaves:
            if not _is_array(leaf) or leaf.ndim < 1 or _kind(leaf) in "OSUMm":
                raise DataError(
                    f"{what} of {name}: expected arrays of numbers with one row for "
                    f"each example, found {shown(leaf)}; convert with "
                    "np.asarray(..., np.float32)"
                )
            sizes.add(leaf.shape[0])
        if not leaves and tree is not None:
            raise DataError(f"{what} of {name} holds no array, found {tree!r}")
    if len(sizes) > 1:
        raise DataError(
            f"{name}: x and y must have one row for each example, found x "
            f"{shown(inputs)} and y {shown(y)}; what all examples share (the edges of a "
            "graph) goes into apply=, as a part of the call, and examples on another axis "
            "(time first) are moved there"
        )
    return Batch(inputs, y, sizes.pop())


def _is_sequence(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | jax.Array)


def _is_numbers(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and bool(value)
        and all(isinstance(v, int | float | np.number) for v in value)
    )


def _kind(array: Any) -> str:
    """NumPy's letter of the type; that of keys is none."""
    return getattr(array.dtype, "kind", "V")


def _dtype(array: Any) -> str:
    """The type that the array has in JAX."""
    if _kind(array) == "V":
        return str(array.dtype)
    return str(jax.dtypes.canonicalize_dtype(array.dtype))


def _form(tree: Any) -> Any:
    """Equal for trees of equal shapes and types but for the number of examples."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape[1:], _dtype(leaf)) for leaf in leaves]


def shown(tree: Any) -> str:
    """The tree in short, arrays by type and shape."""
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        dtype = tree.dtype if _kind(tree) in "OSUMm" else _dtype(tree)
        return f"{dtype}{list(tree.shape)}"
    if isinstance(tree, Mapping):
        return f"{{{', '.join(f'{k!r}: {shown(v)}' for k, v in tree.items())}}}"
    if _is_sequence(tree) and 0 < len(tree) < 5:
        inner = ", ".join(map(shown, tree))
        return inner if len(tree) == 1 else f"({inner})"
    if isinstance(tree, str | int | float):
        return repr(tree)[:40]
    return "None" if tree is None else type(tree).__name__
