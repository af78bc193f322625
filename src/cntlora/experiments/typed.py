"""Dataclasses from tables of plain values, as TOML gives them: unknown keys, wrong types and ranges are errors."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, Union

from ..config import unknown_name

Section = TypeVar("Section")


def build(kind: type[Section], values: Mapping[str, Any], where: str) -> Section:
    """A dataclass from a table, each value checked against the annotation of its field."""
    hints = typing.get_type_hints(kind)
    built = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(unknown_name(f"key of [{where}]" if where else "key or section", key, hints))
        built[key] = _value(f"{where}.{key}" if where else key, value, hints[key])
    return kind(**built)


def _value(where: str, value: Any, kind: Any) -> Any:
    """A value as its field wants it."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else _value(where, value, inner[0])
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{where}: expected a list, got {type(value).__name__} {value!r}")
        return tuple(_value(where, item, inner[0]) for item in value)
    if dataclasses.is_dataclass(kind) or origin is not None:
        if not isinstance(value, Mapping):
            raise TypeError(f"{where}: expected a section [{where}], got {type(value).__name__} {value!r}")
        if origin is None:
            return build(kind, value, where)
        return {key: _value(f"{where}.{key}", item, inner[1]) for key, item in value.items()}
    if kind is Any or (type(value) is int and kind is float) or type(value) is kind:
        return float(value) if kind is float else value
    names = {str: "text", int: "a whole number", float: "a number"}
    raise TypeError(f"{where}: expected {names[kind]}, got {type(value).__name__} {value!r}")


def at_least(section: str, values: Any, **lows: int) -> None:
    """Checks fields of a section against their least values."""
    for name, low in lows.items():
        if getattr(values, name) < low:
            raise ValueError(f"{section}.{name}: expected at least {low}, got {getattr(values, name)}")


def within(where: str, value: float, low: float, high: float, hint: str, *, open_low: bool = False) -> None:
    """Checks a finite number against its range; `open_low` leaves out `low` itself."""
    if not (math.isfinite(value) and (low < value if open_low else low <= value) and value <= high):
        raise ValueError(f"{where}: expected a finite number from {low:g} to {high:g}, got {value}; {hint}")
