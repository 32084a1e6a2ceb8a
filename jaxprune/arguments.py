"""Typed arguments behind a config file's name: FILE:method=cpli,runlocal."""

from __future__ import annotations

import difflib
from types import SimpleNamespace

from jaxprune.errors import ConfigError

Value = bool | int | float | str


def _convert(name: str, text: str | None, default: Value) -> Value:
    if isinstance(default, bool):
        words = {None: True, "true": True, "1": True, "false": False, "0": False}
        value = words.get(text.lower() if text else text)
        if value is None:
            raise ConfigError(f"argument {name}={text}: expected true or false")
        return value
    if not text:
        raise ConfigError(f"argument {name} needs a value, such as {name}={default}")
    try:
        return type(default)(text)
    except ValueError as error:
        raise ConfigError(
            f"argument {name}={text}: expected {type(default).__name__}, such as "
            f"{default}"
        ) from error


def parse_arguments(text: str | None, **defaults: Value) -> SimpleNamespace:
    """The named arguments in `text`, each of the type of its default.

    `text` is "name=value,name=value"; a name alone sets a boolean to true.

    Raises:
      ConfigError: a name without a default, or a value of another type.
    """
    values = dict(defaults)
    for part in filter(None, (text or "").split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in defaults:
            close = difflib.get_close_matches(name, defaults, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ";"
            raise ConfigError(
                f"unknown argument {name!r}{hint} known: {', '.join(sorted(defaults))}"
            )
        values[name] = _convert(name, value if equals else None, defaults[name])
    return SimpleNamespace(**values)
