"""Other people's Linen modules at smaller widths, without changing their source.

The only place that reaches into Flax. Layers of flax.linen state their widths as
attributes (`features`, `num_heads`), set by the source that calls them; when such a
layer is about to run, an interceptor sets those attributes to what the sliced arrays
have; parameters and variables that a module makes itself get their sliced shapes,
whatever shape its source states. `linen_slim.Resized` wraps the user's module and runs
it under the interceptor.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.frameworks.linen_bridge import bridge_sizes
from jaxprune.frameworks.linen_carries import carries_follow
from jaxprune.frameworks.linen_paths import WRAPPED, parts_of, path_of
from jaxprune.frameworks.linen_stacks import unstacked
from jaxprune.frameworks.linen_widths import widths
from jaxprune.frameworks.stated import state

Shape = tuple[int, ...]
# Rows of (path of a layer, attribute, value).
Settings = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Shapes:
    """Name and shape of every array; one value to Flax, which takes tuples apart."""

    rows: tuple[tuple[str, Shape], ...]


# The sizes of the slim module that runs, for those that are part of it.
_AROUND: contextvars.ContextVar[tuple[dict[str, Shape], dict[tuple[str, str], Any]]] = (
    contextvars.ContextVar("around", default=({}, {}))
)


@contextlib.contextmanager
def following(
    shapes: Shapes, settings: Settings, at: tuple[str, ...] = ()
) -> Iterator[None]:
    """While it lasts, layers that run take their widths from their arrays.

    at: path of the slim module, where it is a part of another. If that one is slim
      too, of a later round, its sizes hold.
    """
    around, set_around = _AROUND.get() if at else ({}, {})
    table = {_moved(path, 1, at): shape for path, shape in shapes.rows} | around
    numbers = {(_moved(path, 0, at), name): value for path, name, value in settings}
    numbers |= set_around
    stated: dict[str, list[tuple[str, Any]]] = {}
    for (path, name), value in numbers.items():
        stated.setdefault(path, []).append((name, value))

    def restate(module: nn.Module) -> None:
        for name, value in stated.get(path_of(module), ()):
            state(module, name, value, object.__setattr__)

    def follow(next_fun, args, kwargs, context):
        if context.method_name in ("__call__", "setup"):
            resize(context.module, context.method_name, args, kwargs, table)
        # Numbers are the user's modules', and a slim one shows those of what it wraps.
        if context.method_name != "setup" and WRAPPED not in vars(context.module):
            restate(context.module)
        adopt(context.module, table)
        return next_fun(*args, **kwargs)

    def follow_carry(cell: nn.Module) -> None:
        _set(cell, _sizes(cell, None, table))
        restate(cell)

    token = _AROUND.set((table, numbers))
    try:
        with nn.intercept_methods(follow), carries_follow(follow_carry):
            yield
    finally:
        _AROUND.reset(token)


def _moved(path: str, place: int, at: tuple[str, ...]) -> str:
    """The path with the parts of another put in at a place."""
    if not at:
        return path
    parts = path.split("/") if path else []
    return "/".join((*parts[:place], *at, *parts[place:]))


def resize(
    module: nn.Module,
    method: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    table: Mapping[str, Shape],
) -> None:
    """Sets the width attributes of one layer, if it is of a known type.

    method: "setup" or "__call__"; only layers that make their arrays in setup follow
      there, because others may need to see their input.
    """
    if module.scope is None:
        return
    if method == "__call__":
        _set(module, bridge_sizes(module, table))
    if isinstance(module, nn.RNN) and method == "__call__":
        module = module.cell  # it makes its first carry before it is called
        assert module.scope is not None
    if method == "setup" and not isinstance(module, nn.Embed):
        return
    x = args[0] if args else next(iter(kwargs.values()), None)
    _set(module, _sizes(module, x, table))


def _sizes(module: nn.Module, x: Any, table: Mapping[str, Shape]) -> dict[str, Any]:
    if module.scope is None:
        return {}
    return widths(module, lambda *names: _shape(module, names, table), x)


def _set(module: nn.Module, values: Mapping[str, Any]) -> None:
    # Flax freezes modules once they are set up; apply works on a clone of the user's,
    # so this touches no object of theirs.
    for name, value in values.items():
        object.__setattr__(module, name, value)


def adopt(module: nn.Module, table: Mapping[str, Shape]) -> None:
    """Makes the module's own `param` and `variable` follow the sliced arrays.

    An array that exists is taken as it is, though its source states another shape (or
    is a whole pretrained array); a new one is cut to the shape it has in the table.
    """
    if module.scope is None or "param" in vars(module):
        return
    own_param, own_variable = module.param, module.variable

    def cut(collection: str, name: str, init: Callable[..., Any]) -> Any:
        def cut_init(*args: Any, **kwargs: Any) -> Any:
            shape = _shape(module, (name,), table, collection)
            made = init(*args, **kwargs)
            if shape is None:
                return made
            assert module.scope is not None
            below = "/".join((collection, *parts_of(module), ""))
            others = [held for path, held in table.items() if path.startswith(below)]
            return jax.tree.map(_cut(shape, others), made)

        return cut_init

    def param(name: str, init_fn: Callable[..., Any], *args: Any, **kwargs: Any):
        held = _stated(module, name, args)
        if held is None:
            return own_param(name, cut("params", name, init_fn), *args, **kwargs)
        if overrides_param(module):
            return own_param(name, lambda *_, **__: held, *args, **kwargs)
        return nn.unbox(held) if kwargs.get("unbox", True) else held

    def variable(
        col: str, name: str, init_fn: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        init = init_fn if init_fn is None else cut(col, name, init_fn)
        return own_variable(col, name, init, *args, **kwargs)

    _set(module, {"param": param, "variable": variable})


def trust(module: nn.Module) -> None:
    """Spares the module's `param` the initialiser of an array of the stated shape.

    Flax traces it to compare shapes, which takes a third of the time of a trace. A class
    with a `param` of its own (weight standardisation in BiT) is left alone.
    """
    if module.scope is None or overrides_param(module) or "param" in vars(module):
        return
    own_param = module.param

    def param(
        name: str,
        init_fn: Callable[..., Any],
        *args: Any,
        unbox: bool = True,
        **kwargs: Any,
    ):
        held = _stated(module, name, args)
        if held is None:
            return own_param(name, init_fn, *args, unbox=unbox, **kwargs)
        return nn.unbox(held) if unbox else held

    _set(module, {"param": param})


def overrides_param(module: nn.Module) -> bool:
    """Whether its class does more than Flax when it is asked for an array."""
    return type(module).param is not nn.Module.param


def _stated(module: nn.Module, name: str, args: tuple[Any, ...]) -> Any:
    """The array there is, if it has the shape that the initialiser is asked for (its
    first argument, as all of Flax and JAX take it); None otherwise.
    """
    assert module.scope is not None
    if not args or not _is_shape(args[0]):
        return None
    held = module.scope.get_variable("params", name, None)
    leaves = jax.tree_util.tree_leaves(held)
    shapes = [getattr(leaf, "shape", None) for leaf in leaves]
    return held if shapes == [tuple(args[0])] else None


def _is_shape(given: Any) -> bool:
    """Whether it lists sizes; an initialiser may take a tuple of arrays first."""
    sizes = given if isinstance(given, tuple | list) else (None,)
    return all(isinstance(size, int | np.integer) for size in sizes)


def _cut(shape: Shape, others: Sequence[Shape]) -> Callable[[Any], Any]:
    def cut(array: Any) -> Any:
        own = unstacked(shape, jnp.shape(array), others)
        return array[tuple(map(slice, own))] if own else array

    return cut


def _shape(
    module: nn.Module,
    names: tuple[str, ...],
    table: Mapping[str, Shape],
    kind: str = "params",
) -> Shape | None:
    """Shape of an array below the module: the array's own, else the table's."""
    assert module.scope is not None
    tree: Any = module.scope.get_variable(kind, names[0], None)
    if tree is None:
        collection = module.scope.root._variables.get(kind, {})
        for part in (*parts_of(module), *names[:-1]):
            collection = collection.get(part, {}) if hasattr(collection, "get") else {}
        tree = collection.get(names[-1]) if hasattr(collection, "get") else None
    else:
        for name in names[1:]:
            tree = tree[name]
    leaves = jax.tree_util.tree_leaves(tree)
    if leaves and hasattr(leaves[0], "shape"):
        return tuple(leaves[0].shape)
    return table.get("/".join((kind, *parts_of(module), *names)))


def record_groups(notes: dict[str, int], resized: bool) -> Any:
    """A context in which every GroupNorm that runs notes its number of groups.

    resized: the model is a `Resized`, whose own interceptor does what `trust` does.
    """

    def note(next_fun, args, kwargs, context):
        module = context.module
        if not resized:
            trust(module)
        result = next_fun(*args, **kwargs)
        # By now a resized one has the groups it has left.
        if isinstance(module, nn.GroupNorm) and context.method_name == "__call__":
            assert module.scope is not None
            count = module.num_groups
            if count is None:
                count = args[0].shape[-1] // module.group_size
            notes[path_of(module)] = count
        return result

    return nn.intercept_methods(note)


def group_settings(
    notes: Mapping[str, int], masks: Mapping[tuple[str, int], np.ndarray]
) -> Settings:
    """How many groups each GroupNorm has left, from the channel masks of its arrays;
    (path, -1) is that of a layer without."""
    found = []
    for path, count in notes.items():
        place = next(
            (
                p
                for p in masks
                if p[0].removesuffix("/value")
                in (f"params/{path}/scale", f"params/{path}/bias", path)
            ),
            None,
        )
        if place is not None:
            rows = masks[place].reshape(count, -1).any(1)
            found += [(path, "num_groups", int(rows.sum())), (path, "group_size", None)]
    return tuple(found)


def shapes_of(variables: Any) -> Shapes:
    """Name and shape of every array, as `Resized` takes them; boxes are looked into."""
    found, _ = jax.tree_util.tree_flatten_with_path(
        variables, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    )
    rows = (
        (trees.path_name(path), tuple(array.shape))
        for path, leaf in found
        for array in jax.tree.leaves(leaf)[:1]
    )
    return Shapes(tuple(rows))
