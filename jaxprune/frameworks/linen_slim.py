"""The slim Linen module: the user's own, run so that its layers follow their arrays.

It shares the scope of the user's module, so that variable paths stay the same, and
initialises, trains, jits and serialises as any module, at the top or within another.
"""

from __future__ import annotations

import contextlib
import functools
import types
from typing import Any

import flax.linen as nn

from jaxprune.frameworks.linen_paths import parts_of
from jaxprune.frameworks.linen_resize import Settings, Shapes, following
from jaxprune.frameworks.stated import state

# What Flax itself hands to `clone`.
_CLONED = {"parent", "name", "_deep_clone", "_reset_names"}


class Resized(nn.Module):
    """The module `jaxprune_module` with its layers' widths read off the arrays.

    Attributes:
      jaxprune_module: the user's; a name that none of their layers has, for it is
        reserved in the scope that both share.
      shapes: name and shape of every array, for `init`.
      settings: (path of a module, attribute, value) that shapes do not tell:
        GroupNorm's num_groups, numbers that the user's modules state.
    """

    jaxprune_module: nn.Module
    shapes: Shapes
    settings: Settings = ()

    def setup(self) -> None:
        nn.share_scope(self, self.jaxprune_module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.jaxprune_call("__call__", *args, **kwargs)

    def jaxprune_call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the user's module."""

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return getattr(module, name)(*args, **kwargs)

        return self.jaxprune_run(*args, jaxprune_function=call, **kwargs)

    # Compact, for Flax makes the scopes of `nn.compact_name_scope` methods as parts of
    # the caller.
    @nn.compact
    def jaxprune_run(self, *args: Any, jaxprune_function: Any, **kwargs: Any) -> Any:
        """Calls a function of the user's module."""
        with self.jaxprune_following():
            return jaxprune_function(self.jaxprune_module, *args, **kwargs)

    @nn.nowrap
    def jaxprune_following(self) -> contextlib.AbstractContextManager[None]:
        """`following`, wherever in a larger module this one stands."""
        return following(self.shapes, self.settings, parts_of(self))

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any):
        """As of any module; `method` may be a function of the user's module, too."""
        return super().apply(variables, *args, method=self._own(method), **kwargs)

    @nn.nowrap
    def init_with_output(
        self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any
    ):
        """As of any module; `init` calls it."""
        return super().init_with_output(rngs, *args, method=self._own(method), **kwargs)

    @nn.nowrap
    def _own(self, method: Any) -> Any:
        owner = getattr(method, "__self__", None)
        if method is None or isinstance(method, str) or isinstance(owner, Resized):
            return method
        method = getattr(method, "__func__", method)  # the original's, not bound to it
        return functools.partial(Resized.jaxprune_run, jaxprune_function=method)

    @nn.nowrap
    def clone(self, **updates: Any) -> Resized:
        """A copy; fields of the user's module that are updated are updated there."""
        theirs = {
            name: updates.pop(name)
            for name in set(updates) - _CLONED - set(type(self).__dataclass_fields__)
        }
        if theirs:
            updates["jaxprune_module"] = self.jaxprune_module.clone(**theirs)
        return super().clone(**updates)

    def __getattr__(self, name: str) -> Any:
        """Other methods of the user's module, and its fields, at the numbers set here."""
        inner = vars(self).get("jaxprune_module")
        kind = type(inner)
        if name.startswith("_") or inner is None:
            return super().__getattr__(name)
        held = getattr(kind, name, None)
        read = isinstance(held, property | functools.cached_property)
        if read or name in getattr(kind, "__dataclass_fields__", ()):
            return self._stated(inner, name)
        if not callable(held):
            return super().__getattr__(name)

        if getattr(held, "nowrap", False) and self.scope is None:
            # Flax does not run it as part of this module, nor what it makes.
            return getattr(self._restated(inner), name)

        def method(self: Resized, *args: Any, **kwargs: Any) -> Any:
            return self.jaxprune_call(name, *args, **kwargs)

        return types.MethodType(method, self)

    @nn.nowrap
    def _restated(self, inner: nn.Module) -> nn.Module:
        """A copy of the user's module with the numbers set here."""
        copied = inner.clone()
        for path, stated, number in self.settings:
            if path == "":
                state(copied, stated, number, object.__setattr__)
        return copied

    @nn.nowrap
    def _stated(self, inner: nn.Module, name: str) -> Any:
        """A field or property of the user's module at the numbers set here."""
        value = getattr(self._restated(inner), name)
        if isinstance(value, nn.Module):
            raise AttributeError(  # noqa: TRY004 - as of any that is not to be had
                f"{name} is a module of the original, whose layers follow their arrays "
                "only while the slim model runs; call the slim model, or a method of it "
                "with apply(..., method=)"
            )
        return value
