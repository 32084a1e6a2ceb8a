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


def call_flags(kind: type[Any]) -> dict[str, Any]:
    """The flags of INFERENCE that the call of this class takes."""
    taken = inspect.signature(kind.__call__).parameters
    return {name: value for name, value in INFERENCE.items() if name in taken}
