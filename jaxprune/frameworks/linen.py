"""Flax Linen modules: how they are called, and how they are made smaller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from jaxprune.frameworks.flags import call_flags
from jaxprune.frameworks.linen_fields import plain_fields
from jaxprune.frameworks.linen_paths import path_of, paths_within
from jaxprune.frameworks.linen_resize import (
    Settings,
    group_settings,
    record_groups,
    shapes_of,
)
from jaxprune.frameworks.linen_slim import Resized
from jaxprune.frameworks.stated import merged, numbers_of


@dataclass(frozen=True, eq=False)
class LinenHandle:
    """A Linen module as the stages see it.

    Attributes:
      model: the module.
      apply: None, or a function (model, variables, *inputs) -> outputs that
        replaces the default inference call.
    """

    model: nn.Module
    apply: Callable[..., Any] | None = None

    @property
    def random_state(self) -> tuple[()]:
        """None: keys are inputs, or stated by the source."""
        return ()

    def __call__(self, variables: Any, *inputs: Any) -> Any:
        """Outputs of the inference call."""
        if self.apply is not None:
            return self.apply(self.model, variables, *inputs)
        flags = inference_flags(self.model, len(inputs))
        return self.model.apply(variables, *inputs, **flags)

    @staticmethod
    def is_parameter(path: str) -> bool:
        return path.startswith("params/")

    @staticmethod
    def mirror_name(path: str) -> str:
        """The leaf's name in trees of its collection, such as an optimizer's."""
        return path.partition("/")[2]

    def trace(self, notes: dict[str, int], variables: Any, *inputs: Any) -> Any:
        """As the call, noting what shapes do not tell: the groups of each GroupNorm."""
        found: dict[str, int] = {}
        slim = isinstance(self.model, Resized)
        with plain_fields(), record_groups(found, slim):
            results = self(variables, *inputs)
        notes.update(self._within(found, variables))
        return results

    def numbers(
        self, variables: Any, *inputs: Any
    ) -> dict[str, tuple[type, dict[str, int]]]:
        """The whole numbers that the user's modules state, by path; traced abstractly.

        A module with a method `resized` says itself how its numbers follow.
        """
        found: dict[str, tuple[type, dict[str, int]]] = {}
        if not hasattr(self.model, "resized"):
            with record_numbers(found):
                jax.eval_shape(lambda v, i: self(v, *i), variables, inputs)
        return self._within(found, variables)

    def _within(self, found: dict[str, Any], variables: Any) -> dict[str, Any]:
        """By path from the model, where `apply` runs it as a part of another module."""
        return found if self.apply is None else paths_within(found, variables)

    @property
    def stated(self) -> Settings:
        """The settings of a slim module, of all rounds so far."""
        return self.model.settings if isinstance(self.model, Resized) else ()

    def settings(
        self, notes: Mapping[str, int], masks: Mapping[tuple[str, int], Any]
    ) -> Settings:
        """What the smaller model needs beside its arrays; JSON-ready."""
        return group_settings(notes, masks)

    def rebuild(self, variables: Any, settings: Settings = ()) -> LinenHandle:
        """The handle of the smaller model that fits the sliced variables."""
        return LinenHandle(rebuild(self.model, variables, settings), self.apply)


def inference_flags(model: nn.Module, inputs: int = 1) -> dict[str, Any]:
    """The flags of `flags.INFERENCE` that the module's call takes beside so many inputs,
    and with which it was not made."""
    inner = model.jaxprune_module if isinstance(model, Resized) else model
    return call_flags(type(inner), inputs, inner)


def rebuild(model: nn.Module, variables: Any, settings: Settings = ()) -> nn.Module:
    """The module of the same architecture with the widths of `variables`.

    A module that has a method `resized(variables)` says itself how its widths
    follow; any other is wrapped so that its layers read them off the arrays.
    """
    if isinstance(model, Resized):  # what is not set anew stays as it was
        settings = merged(model.settings, settings)
        model = model.jaxprune_module
    resized = getattr(model, "resized", None)
    if resized is not None:
        return resized(variables)
    # A copy: Flax takes one object at two places of a module for one set of arrays.
    model = model.clone()
    return Resized(model, shapes_of(variables), tuple(map(tuple, settings)))


def record_numbers(found: dict[str, tuple[type, dict[str, int]]]) -> Any:
    """A context in which every module of the user's that runs notes its numbers."""

    def note(next_fun, args, kwargs, context):
        result = next_fun(*args, **kwargs)
        module = context.module
        own = isinstance(module, Resized) or type(module).__module__.startswith("flax.")
        # Setup makes attributes; a resized module's follow after it.
        if not own and module.scope is not None and context.method_name != "setup":
            found[path_of(module)] = type(module), numbers_of(module)
        return result

    return nn.intercept_methods(note)
