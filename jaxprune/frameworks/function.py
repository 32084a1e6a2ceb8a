"""Plain functions of a parameter tree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class FunctionHandle:
    """A function (params, *inputs) -> outputs; it must follow its arrays' shapes."""

    model: Callable[..., Any]

    @property
    def random_state(self) -> tuple[()]:
        """None: keys are inputs, or stated by the source."""
        return ()

    def __call__(self, variables: Any, *inputs: Any) -> Any:
        return self.model(variables, *inputs)

    @staticmethod
    def is_parameter(path: str) -> bool:
        del path
        return True

    @staticmethod
    def mirror_name(path: str) -> str:
        """The leaf's name in an optimizer's trees."""
        return path.removeprefix("params/")

    def trace(self, notes: dict[str, int], variables: Any, *inputs: Any) -> Any:
        """As the call; a function has nothing to note."""
        del notes
        return self(variables, *inputs)

    def numbers(self, variables: Any, *inputs: Any) -> dict[str, Any]:
        """None: what a function closes over is out of reach."""
        del variables, inputs
        return {}

    @property
    def stated(self) -> tuple[()]:
        """Nothing: a function is never changed."""
        return ()

    def settings(self, notes: Any, masks: Any) -> tuple[()]:
        """Nothing: shapes say it all."""
        del notes, masks
        return ()

    def rebuild(self, variables: Any, settings: Any = ()) -> FunctionHandle:
        """The same function: its widths are those of the arrays it is given."""
        del variables, settings
        return self
