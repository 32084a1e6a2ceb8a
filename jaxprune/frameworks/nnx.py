"""Flax NNX objects: how they are called, and how smaller ones are made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprune import trees
from jaxprune.errors import GraphError
from jaxprune.frameworks.flags import call_flags
from jaxprune.frameworks.nnx_bridge import resize_linen
from jaxprune.frameworks.nnx_resize import (
    Settings,
    group_settings,
    name_groups,
    resize,
)
from jaxprune.frameworks.stated import SETTINGS, merged, numbers_of

Path = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class NnxHandle:
    """An NNX object as the stages see it; the object itself is never changed.

    Attributes:
      model: the object.
      apply: None, or a function (model, *inputs) -> outputs that replaces the
        inference call `model(*inputs)`; it is given a copy in eval mode.
      graphdef, evaluation: the object's static part, as it is and in eval mode.
      arrays: {name: (path, leaf)} of the leaves that hold arrays.
      others: the other leaves, such as the state of random number generators.
    """

    model: nnx.Module
    apply: Callable[..., Any] | None
    graphdef: Any
    evaluation: Any
    arrays: Mapping[str, tuple[Path, Any]]
    others: tuple[tuple[Path, Any], ...]

    @classmethod
    def of(
        cls, model: nnx.Module, apply: Callable[..., Any] | None = None
    ) -> NnxHandle:
        """The handle of the object as it is now; later changes do not reach it.

        Raises:
          GraphError: two leaves have the same name.
        """
        graphdef, state = nnx.split(model)
        arrays: dict[str, tuple[Path, Any]] = {}
        others = []
        for path, leaf in nnx.to_flat_state(state):
            name = "/".join(map(_part, path))
            if name in arrays:
                raise GraphError(
                    f"{type(model).__name__} has two leaves named {name!r}; rename one"
                )
            if _is_array(leaf):
                arrays[name] = (tuple(path), leaf)
            else:
                others.append((tuple(path), _concrete(leaf)))
        found = cls(model, apply, graphdef, graphdef, arrays, tuple(others))
        copy = found._merge(
            graphdef, {name: _value(x) for name, (_, x) in arrays.items()}
        )
        _to_eval(copy)
        evaluation = nnx.split(copy)[0]
        return cls(model, apply, graphdef, evaluation, arrays, tuple(others))

    @property
    def variables(self) -> dict[str, Any]:
        """The object's arrays as a nested dict with names for keys."""
        tree: dict[str, Any] = {}
        for path, leaf in self.arrays.values():
            *parents, last = map(_part, path)
            node = tree
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = _value(leaf)
        return tree

    @property
    def random_state(self) -> tuple[Any, ...]:
        """The keys and counts of the object's random number streams."""
        return tuple(_value(leaf) for _, leaf in self.others)

    def __call__(self, variables: Any, *inputs: Any) -> Any:
        """Outputs of the inference call of a copy that holds the variables."""
        return self._call(self._copy(variables), *inputs)

    def is_parameter(self, path: str) -> bool:
        """True for nnx.Param and its subclasses; not for statistics and buffers."""
        return path in self.arrays and isinstance(self.arrays[path][1], nnx.Param)

    @staticmethod
    def mirror_name(path: str) -> str:
        """The leaf's name in an optimizer's trees: its own."""
        return path

    def trace(self, notes: dict[str, int], variables: Any, *inputs: Any) -> Any:
        """As the call, noting the groups of each GroupNorm that holds no array."""
        model = self._copy(variables)
        notes.update(name_groups(model))
        return self._call(model, *inputs)

    def _copy(self, variables: Any) -> nnx.Module:
        return self._merge(self.evaluation, trees.flatten(variables))

    def _call(self, model: Any, *inputs: Any) -> Any:
        if self.apply is not None:
            return self.apply(model, *inputs)
        return model(*inputs, **call_flags(type(model), len(inputs)))

    def numbers(
        self, variables: Any, *inputs: Any
    ) -> dict[str, tuple[type, dict[str, int]]]:
        """The whole numbers that the user's modules state, by path."""
        del variables, inputs
        return {
            "/".join(map(str, path)): (type(module), numbers_of(module))
            for path, module in nnx.iter_modules(self.model)
            if not type(module).__module__.startswith("flax.")
        }

    @property
    def stated(self) -> Settings:
        """The settings of a slim object, of all rounds so far."""
        return getattr(self.model, SETTINGS, ())

    def settings(
        self, notes: Any, masks: Mapping[tuple[str, int], np.ndarray]
    ) -> Settings:
        """What the smaller object needs beside its arrays; JSON-ready."""
        del notes
        return group_settings(self.model, masks)

    def rebuild(self, variables: Any, settings: Settings = ()) -> NnxHandle:
        """The handle of a new object that holds the sliced variables."""
        model = self._merge(self.graphdef, trees.flatten(variables))
        resize(model, settings)
        resize_linen(model)
        if settings:
            setattr(model, SETTINGS, merged(self.stated, settings))
        return NnxHandle.of(model, self.apply)

    def _merge(self, graphdef: Any, leaves: Mapping[str, Any]) -> nnx.Module:
        """A new object; its Variables are copies that keep their metadata.

        Raises:
          GraphError: a leaf of the object is missing.
        """
        missing = [name for name in self.arrays if name not in leaves]
        if missing:
            raise GraphError(
                f"{type(self.model).__name__} needs {missing[0]!r}; found "
                f"{list(leaves)[:5]} ...; pass the variables that were traced"
            )
        flat = [
            (path, _with(leaf, leaves[name]))
            for name, (path, leaf) in self.arrays.items()
        ]
        flat += [(path, _with(leaf, _value(leaf))) for path, leaf in self.others]
        return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _part(part: Any) -> str:
    """One step of a path as text; wrappers such as WeightNorm use tuples as keys."""
    return "/".join(map(str, part)) if isinstance(part, tuple) else str(part)


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _with(leaf: Any, value: Any) -> Any:
    if isinstance(leaf, nnx.Variable):
        return leaf.replace(value)
    if isinstance(value, jax.ShapeDtypeStruct):
        # NNX takes bare arrays for data, but their shapes for static attributes.
        return np.broadcast_to(np.zeros((), value.dtype), value.shape)
    return value


def _is_array(leaf: Any) -> bool:
    value = _value(leaf)
    return (
        not isinstance(leaf, nnx.RngState)
        and hasattr(value, "shape")
        and hasattr(value, "dtype")
        and not jnp.issubdtype(value.dtype, jax.dtypes.extended)
    )


def _concrete(leaf: Any) -> Any:
    """The leaf, or zeros where it is abstract: nothing of it decides a shape."""
    value = _value(leaf)
    if not isinstance(value, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        keys = np.zeros(value.shape, np.uint32)
        return _with(leaf, jax.vmap(jax.random.key)(keys.ravel()).reshape(value.shape))
    return _with(leaf, np.zeros(value.shape, value.dtype))


def _to_eval(model: nnx.Module) -> None:
    model.eval()
    for _, module in nnx.iter_modules(model):
        for name in ("training", "is_training"):
            if isinstance(vars(module).get(name), bool):
                setattr(module, name, False)
