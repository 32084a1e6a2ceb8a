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


def call_flags(kind: type[Any], inputs: int = 1) -> dict[str, Any]:
    """The flags of INFERENCE that the call of this class takes beside its inputs."""
    parameters = list(inspect.signature(kind.__call__).parameters.values())[1:]
    alone = inspect.Parameter.KEYWORD_ONLY
    taken = {p.name for k, p in enumerate(parameters) if k >= inputs or p.kind is alone}
    return {name: value for name, value in INFERENCE.items() if name in taken}
