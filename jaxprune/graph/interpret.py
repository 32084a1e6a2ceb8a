"""Walks a jaxpr on index vectors: every equation becomes a Record of its call site."""

# JAX types `aval` as its base class, which has no shape.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxprune.graph.atoms import Atoms, Axis
from jaxprune.graph.integers import computed_integers, constant_integers

Site = tuple[int, ...]

CASTS = frozenset(("convert_element_type", "copy", "copy_p"))
VIEWS = CASTS | {"reshape", "broadcast_in_dim", "squeeze", "expand_dims", "transpose"}


# What may stand on an axis without channels, for the reasons that users read.
TABLES = (
    "a position, a varying constant or a draw from a fixed key, which "
    "trace(replay=True) lets shrink; a key among the inputs draws noise"
)


@dataclass(frozen=True, eq=False)
class Value:
    """What the walk knows of one array.

    Attributes:
      axes: node ids per axis, or None where the axis is not tracked.
      pure: True if it depends on the variables alone, not on the inputs.
      leaf: name of the variables leaf it is (dtype casts aside), or None.
      source: as `leaf`, but it may have been reshaped or broadcast since.
      integers: what the array is, where it follows from constants of the program.
    """

    axes: tuple[Axis, ...]
    pure: bool = False
    leaf: str | None = None
    source: str | None = None
    integers: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Record:
    """One equation at one call site (sub-jaxprs may be shared between sites).

    Attributes:
      site: equation numbers from the outermost jaxpr inwards.
      eqn: the equation.
      inputs, outputs: what the walk knew of its operands and results.
      repeat: how often it runs (lengths of the scans around it, multiplied).
    """

    site: Site
    eqn: jex.JaxprEqn
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    repeat: int = 1

    @property
    def name(self) -> str:
        return self.eqn.primitive.name


Rule = Callable[["Walk", jex.JaxprEqn, Sequence[Value]], Sequence[tuple[Axis, ...]]]


@dataclass(eq=False)
class Walk:
    """The state of one walk; rules call its methods.

    Attributes:
      tables: positions and varying constants may lose channels: for a replay, which
        slices what the source computes at full size (a rotary embedding's angles).
      streams: constants that are the state of random number generators, so that what
        is drawn from them is noise and no table.
    """

    atoms: Atoms
    rules: dict[str, Rule]
    tables: bool = False
    streams: Sequence[Any] = ()
    records: dict[Site, Record] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    site: Site = ()
    repeat: int = 1
    _stack: list[jex.JaxprEqn] = field(default_factory=list)
    # Of each table that is cut: its nodes, those that a cut takes, and where it was.
    _cut: dict[bytes, tuple[np.ndarray, list[np.ndarray], str]] = field(
        default_factory=dict
    )

    @property
    def where(self) -> str:
        """The user's source line of the equation at hand, innermost known."""
        lines = (source_line(eqn) for eqn in reversed(self._stack))
        return next((line for line in lines if line), "an unknown line")

    def closed(self, closed: jex.ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
        """Values of the outputs; ties and records are added on the way."""
        jaxpr, environment = closed.jaxpr, {}
        for var, held in zip(jaxpr.constvars, closed.consts, strict=True):
            environment[var] = self.constant(held, var.aval.shape)

        def read(atom: Any) -> Value:
            if isinstance(atom, jex.Literal):
                return self.constant(atom.val, atom.aval.shape)
            return environment[atom]

        for var, value in zip(jaxpr.invars, inputs, strict=True):
            environment[var] = value
        outer, idle = self.site, self.atoms.idle
        read_at_all = live(jaxpr)
        for number, eqn in enumerate(jaxpr.eqns):
            self.site = (*outer, number)
            self.atoms.idle = idle or not read_at_all[number]
            self._stack.append(eqn)
            values = [read(atom) for atom in eqn.invars]
            results = self.apply(eqn, values)
            self.records[self.site] = Record(
                self.site, eqn, tuple(values), tuple(results), self.repeat
            )
            for var, value in zip(eqn.outvars, results, strict=True):
                environment[var] = value
            self._stack.pop()
        self.site, self.atoms.idle = outer, idle
        return [read(atom) for atom in jaxpr.outvars]

    def apply(self, eqn: jex.JaxprEqn, values: Sequence[Value]) -> list[Value]:
        name = eqn.primitive.name
        pure = all(value.pure for value in values)
        rule = self.rules.get(name)
        if rule is None:
            if not self.atoms.idle:
                self.unknown.setdefault(name, self.where)
            why = f"{name} at {self.where} is not known"
            for value in values:
                self.pin(value.axes, why)
            axes = [(None,) * len(var.aval.shape) for var in eqn.outvars]
        else:
            axes = list(rule(self, eqn, values))
        if axes and isinstance(axes[0], Value):  # call-like rules return values
            return axes  # type: ignore[return-value]
        leaf = values[0].leaf if name in CASTS and values else None
        source = values[0].source if name in VIEWS and values else None
        integers = computed_integers(eqn, [value.integers for value in values])
        results = []
        for var, found in zip(eqn.outvars, axes, strict=True):
            shape = var.aval.shape
            assert len(found) == len(shape), (name, found, shape)
            for axis, size in zip(found, shape, strict=True):
                assert axis is None or axis.size == size, (name, axis.size, shape)
            results.append(Value(tuple(found), pure, leaf, source, integers))
        return results

    def pin(self, axes: Sequence[Axis], why: str) -> None:
        for axis in axes:
            self.atoms.freeze(axis, why)

    def taken(self, axis: np.ndarray, part: np.ndarray) -> None:
        """Notes that a cut takes these nodes of a table's axis."""
        if self.atoms.idle:
            return
        known = self._cut.setdefault(axis.tobytes(), (axis, [], self.where))
        known[1].append(part)

    def pin_rest(self) -> None:
        """Pins the nodes of tables that no cut takes."""
        for axis, parts, where in self._cut.values():
            rest = np.setdiff1d(axis, np.concatenate(parts))
            self.atoms.freeze(rest, f"not part of any slice at {where}")

    def fresh(self, size: int) -> Axis:
        """A new axis that adopts its partner's channels; None for size 1 or 0."""
        return self.atoms.fresh(size) if size > 1 else None

    def constant(self, value: Any, shape: Sequence[int]) -> Value:
        """A constant of the program: uniform axes adopt, varying ones freeze (or
        adopt as well, where `tables` is set).

        Abstract or extended-dtype constants (PRNG keys) count as varying.
        """
        if any(value is state for state in self.streams):
            return Value((None,) * len(shape))
        integers = constant_integers(value)
        if not shape or not math.prod(shape):
            return Value((None,) * len(shape), pure=True, integers=integers)
        dtype = getattr(value, "dtype", None)
        key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended)
        if key or isinstance(value, jax.core.Tracer) or not hasattr(value, "__array__"):
            return Value((None,) * len(shape), pure=True)
        array = np.asarray(value)
        axes = []
        for axis, size in enumerate(shape):
            first = np.take(array, [0], axis)
            adopts = self.tables or (array == first).all()
            axes.append(self.fresh(size) if adopts else None)
        return Value(tuple(axes), pure=True, integers=integers)


# What checkify.check makes: it raises, and JAX runs it in checkified functions only.
CHECK = "check"


def live(jaxpr: jex.Jaxpr) -> list[bool]:
    """For each equation whether a result or an effect of the jaxpr needs it; arrays
    without entries, as jnp.pad makes of axes that it leaves alone, need nothing."""
    needed = {v for v in jaxpr.outvars if _has_entries(v)}
    found = []
    for eqn in reversed(jaxpr.eqns):
        found.append(acts(eqn) or not needed.isdisjoint(eqn.outvars))
        if found[-1]:
            needed.update(v for v in eqn.invars if _has_entries(v))
    return found[::-1]


def acts(eqn: jex.JaxprEqn) -> bool:
    """True for an equation that is run for more than its results."""
    return bool(eqn.effects) and eqn.primitive.name != CHECK


def _has_entries(atom: Any) -> bool:
    return not isinstance(atom, jex.Literal) and not is_empty(atom)


def is_empty(atom: Any) -> bool:
    """True for an array without entries."""
    return 0 in getattr(atom.aval, "shape", ())


_LIBRARIES = tuple(
    os.path.dirname(module.__file__ or "") + os.sep for module in (jax, flax)
)
_ENGINE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_MODELS = _ENGINE + "models" + os.sep


def is_user_file(name: str) -> bool:
    """True unless JAX, Flax or this package (its models aside) owns the file."""
    inner = name.startswith(_ENGINE) and not name.startswith(_MODELS)
    return not (inner or name.startswith(_LIBRARIES))


def scope_of(eqn: jex.JaxprEqn) -> str:
    """The names that the equation was made under ("Net/block/norm"), by jax.named_scope;
    Linen modules open one each."""
    stack = getattr(eqn.source_info, "name_stack", None)
    return "" if stack is None else str(stack)


def axis_in_scope(records: Iterable[Record], path: str) -> Axis:
    """The last axis of what the layer of that path reads first; None if not known."""
    for record in records:
        scope = scope_of(record.eqn)
        if path in (scope, scope.partition("/")[2]) and record.inputs:
            return record.inputs[0].axes[-1] if record.inputs[0].axes else None
    return None


def source_line(eqn: jex.JaxprEqn) -> str:
    """ "file.py:12 (function)" of the user's frame that made the equation, or ""."""
    for frame in _user_frames(eqn):
        name = os.path.basename(frame.file_name)
        return f"{name}:{frame.line_num} ({frame.function_name})"
    return ""


def source_places(eqn: jex.JaxprEqn) -> list[tuple[str, int]]:
    """(file, line) of the user's frames that made the equation, innermost first."""
    return [(frame.file_name, frame.line_num) for frame in _user_frames(eqn)]


def _user_frames(eqn: jex.JaxprEqn) -> Iterator[Any]:
    traceback = getattr(eqn.source_info, "traceback", None)
    for frame in traceback.frames if traceback else ():
        if is_user_file(frame.file_name):
            yield frame
