"""Config files: their typed arguments (FILE:method=cpli,runlocal) and their form."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from types import NoneType, SimpleNamespace
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxprune.errors import ConfigError
from jaxprune.options import Options, Pruning

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


def job_arguments(text: str | None) -> SimpleNamespace:
    """The arguments that every config file here takes.

    `macs` is None for importance_redundancy where it is not given: its thresholds
    decide then.
    """
    args = parse_arguments(text, method="cpli", macs=0.5, preset="", runlocal=False)
    given = {part.partition("=")[0].strip() for part in (text or "").split(",")}
    if args.method == "importance_redundancy" and "macs" not in given:
        args.macs = None
    return args


def pruning(args: SimpleNamespace, *, layer_epochs: int) -> Pruning:
    """What `args` ask for, with the thresholds that importance_redundancy starts from.

    Args:
      layer_epochs: of fine-tuning after each layer, for importance_redundancy.
    """
    common = Pruning(
        args.method,
        macs=args.macs,
        preset=args.preset,
        # Vector units and tensor cores waste what is no multiple of 8; the preset's
        # own rules alone decide what it keeps.
        round_to=None if args.preset else 8,
    )
    if args.method != "importance_redundancy":
        return common
    return dataclasses.replace(
        common,
        entropy_threshold=0.3,
        similarity_threshold=0.8,
        layer_epochs=layer_epochs,
        # The script trains all its epochs after each layer.
        layer_patience=None if args.preset else 1,
    )


def to_config(options: Options) -> ConfigDict:
    """The options as the ConfigDict that a config file returns.

    Every field is in it, so that each can be set on the command line; one that is
    None keeps its type as a placeholder.
    """
    return _config(options)


def _config(record: Any) -> ConfigDict:
    config = ConfigDict()
    hints = typing.get_type_hints(type(record))
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            config[field.name] = _config(value)
        elif value is None:
            kinds = set(typing.get_args(hints[field.name])) - {NoneType}
            config[field.name] = placeholder(kinds.pop())
        else:
            config[field.name] = value
    return config
