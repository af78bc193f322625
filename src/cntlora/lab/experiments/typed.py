"""Dataclasses from tables of plain values, as TOML gives them: unknown keys, wrong types and ranges are errors."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, Union

from ...messages import unknown_name

Section = TypeVar("Section")


def build(kind: type[Section], values: Mapping[str, Any], where: str, **built: Any) -> Section:
    """A dataclass from a table, each value checked against the annotation of its field; `built` is ready already."""
    hints = typing.get_type_hints(kind)
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
    if origin is Literal:
        if value not in inner:
            raise ValueError(unknown_name(where, str(value), [str(i) for i in inner]))
        return value
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
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    raise TypeError(f"{where}: expected {names[kind]}, got {type(value).__name__} {value!r}")
