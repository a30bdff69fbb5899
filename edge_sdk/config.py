"""Configuration: TOML files into typed dataclasses, with errors that name file and key."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from edge_sdk.errors import ConfigError
from edge_sdk.files import expanded, read_text, why

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; :class:`ConfigError` in one sentence if that fails."""
    try:
        return tomllib.loads(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {why(error)}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def build(cls: type[T], raw: dict[str, Any], where: str) -> T:
    """Build a dataclass from a table: nested dataclasses from nested tables, types checked.

    Args:
        cls: the dataclass.
        raw: the table.
        where: what to call the table in errors.

    Raises:
        ConfigError: an unknown key, a missing key, or a value of the wrong type or out of range.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in raw:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}; known are {', '.join(fields)}")
    values: dict[str, Any] = {}
    for name, spec in fields.items():
        if name in raw:
            values[name] = _value(hints[name], raw[name], f"{where}: {name}")
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: the key {name!r} is missing")
    try:
        return cls(**values)
    except (ValueError, ConfigError) as error:  # raised by __post_init__
        raise ConfigError(f"{where}: {error}") from error


def load(cls: type[T], path: Path) -> T:
    """Read a TOML file into a dataclass. Raises :class:`ConfigError`."""
    return build(cls, read_toml(path), str(path))


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a table")
        return build(hint, value, where)
    if origin in (types.UnionType, typing.Union):
        return _value(next(arg for arg in args if arg is not type(None)), value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a table")
        return {key: _value(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list")
        return [_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is tuple:
        return tuple(_value(list[args[0]], value, where))  # type: ignore[valid-type]
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{where} is {value!r}, must be one of {', '.join(map(str, args))}")
        return value
    if hint is Path and isinstance(value, str):
        if not value:
            raise ConfigError(f"{where} is empty, must be a path")
        return expanded(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where} is {value!r}, must be of type {hint.__name__}")
    if hint is float and math.isnan(value):
        raise ConfigError(f"{where} is nan, must be a number")
    return value
