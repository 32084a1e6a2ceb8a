"""The flags by which modules are told that a call is for inference."""

from __future__ import annotations

import inspect
from typing import Any

# By the name under which a module may take them.
INFERENCE = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
}


def call_flags(kind: type[Any], inputs: int = 1, made: Any = None) -> dict[str, Any]:
    """The flags of INFERENCE that the call of this class takes beside its inputs.

    Args:
      made: the module; flags with which it was made are left out where the call can do
        without, because `nn.merge_param` refuses a second statement.
    """
    found = {}
    parameters = list(inspect.signature(kind.__call__).parameters.values())[1:]
    for number, parameter in enumerate(parameters):
        name, value = parameter.name, INFERENCE.get(parameter.name)
        alone = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        if value is None or (number < inputs and not alone):
            continue
        needed = parameter.default is inspect.Parameter.empty
        if needed or getattr(made, name, None) is not value:
            found[name] = value
    return found
