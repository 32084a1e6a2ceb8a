"""A traced program as one list of steps, to be run from any step to any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend import core as jex

from jaxprune.graph.evaluate import Before, bind, loop
from jaxprune.graph.interpret import CHECK, Record, Site
from jaxprune.graph.rules.control import CALLS, inner_jaxpr

# An operand: the number of a slot, or a literal's value in a tuple.
Operand = int | tuple[Any]
State = dict[int, Any]
After = Callable[[int, list[Any], list[Any]], list[Any] | None]


@dataclass(frozen=True, eq=False)
class Step:
    """One equation with calls inlined: it reads slots and fills slots.

    Attributes:
      pure: its results depend on the variables alone.
    """

    site: Site
    eqn: jex.JaxprEqn
    operands: tuple[Operand, ...]
    results: tuple[int, ...]
    pure: bool


@dataclass(frozen=True, eq=False)
class Flat:
    """The steps of a program.

    Attributes:
      steps: in the order of execution.
      constants: {slot: value}.
      variables: slots of the leaves of the variables.
      inputs: slots of the model's inputs.
      outputs: what the program returns.
    """

    steps: tuple[Step, ...]
    constants: State
    variables: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[Operand, ...]

    def number(self, site: Site) -> int:
        """The step at a call site."""
        return next(k for k, step in enumerate(self.steps) if step.site == site)

    def live(self, start: int) -> frozenset[int]:
        """Slots that must be carried to step `start`: set before it, read from it on.

        What depends on the variables alone is not among them: it is made anew from
        the variables of the moment.
        """
        made = set(self.inputs)
        made |= {s for k in self.steps[:start] if not k.pure for s in k.results}
        read = {
            slot
            for step in self.steps[start:]
            for slot in step.operands
            if isinstance(slot, int)
        }
        return frozenset(made & read)

    def run(
        self,
        variables: Sequence[Any],
        state: Mapping[int, Any],
        start: int,
        stop: int,
        after: After | None = None,
        before: Before | None = None,
    ) -> State:
        """The slots that step `stop` needs, from those that step `start` needs.

        Args:
          variables: flat leaves.
          state: the slots of `live(start)`; the inputs' for start 0.
          after: (step, operands, results) is called behind every step that runs; what
            it returns, if anything, takes the results' place.
          before: changes the operands of every step, inside of loops too.
        """
        environment: State = {
            **self.constants,
            **dict(zip(self.variables, variables, strict=True)),
            **state,
        }
        for number, step in enumerate(self.steps[:stop]):
            if number < start and not step.pure:
                continue
            operands = [
                environment[o] if isinstance(o, int) else o[0] for o in step.operands
            ]
            if before is not None:
                operands = before(step.site, step.eqn, operands)
                results = loop(step.eqn, operands, step.site, before)
            else:
                results = bind(step.eqn, operands)
            if after is not None and number >= start:
                results = after(number, operands, results) or results
            environment.update(zip(step.results, results, strict=True))
        return {slot: environment[slot] for slot in self.live(stop)}


def flatten(
    closed: jex.ClosedJaxpr, records: Mapping[Site, Record], variables: int
) -> Flat:
    """The program with its calls inlined; loops and branches stay single steps.

    Args:
      variables: how many of the program's inputs are leaves of the variables.
    """
    steps: list[Step] = []
    constants: State = {}
    count = 0

    def slots(number: int) -> list[int]:
        nonlocal count
        count += number
        return list(range(count - number, count))

    def inline(
        inner: jex.ClosedJaxpr, operands: Sequence[Operand], site: Site
    ) -> list[Operand]:
        names: dict[Any, Operand] = dict(zip(inner.jaxpr.invars, operands, strict=True))
        for var, value in zip(inner.jaxpr.constvars, inner.consts, strict=True):
            (names[var],) = slots(1)
            constants[count - 1] = value

        def read(atom: Any) -> Operand:
            return (atom.val,) if isinstance(atom, jex.Literal) else names[atom]

        for number, eqn in enumerate(inner.jaxpr.eqns):
            if eqn.primitive.name == CHECK:
                continue
            here = (*site, number)
            given = [read(atom) for atom in eqn.invars]
            if eqn.primitive.name in CALLS:
                results = inline(inner_jaxpr(eqn), given, here)
            else:
                results = slots(len(eqn.outvars))
                pure = all(value.pure for value in records[here].inputs)
                steps.append(Step(here, eqn, tuple(given), tuple(results), pure))
            names.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in inner.jaxpr.outvars]

    arguments = slots(len(closed.jaxpr.invars))
    outputs = inline(closed, arguments, ())
    return Flat(
        tuple(steps),
        constants,
        tuple(arguments[:variables]),
        tuple(arguments[variables:]),
        tuple(outputs),
    )
