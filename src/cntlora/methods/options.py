"""The options of the methods: each is checked by its name, whichever method has it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..messages import quoted, unknown_name

_RANGES: dict[str, tuple[float, float, str]] = {
    "p": (0.0, 1.0, "0.5 balances A and B, 1 gives the whole spectrum to A"),
    "rtol": (0.0, 1.0, "0 takes max(d, b)·eps"),
    "damping": (0.0, math.inf, "0.01 is CorDA's own"),
    "variance": (0.0, math.inf, "0.03 is LoRA-DA's own, 0 leaves the term out"),
    "shift_constant": (-math.inf, math.inf, "1 is the identity"),
}
"""Option → least and largest value, and a hint for the message."""

EARLIER_DEFAULTS: Mapping[str, Any] = {
    "decomposition": "svd",
    "p": 0.5,
    "strength": None,
    "gram": "sum",
    "root": "paper",
    "rtol": None,
    "shift_constant": 1.0,
    "center": True,
    "damping": 0.01,
    "batch_weights": None,
    "initial_weight": "pretrained",
}
"""Defaults of version 0.1, whose configurations, and so its plans and records, have the options of all methods."""


def option_names(method: type | Any) -> tuple[str, ...]:
    """The options of a method, or of its class."""
    return tuple(f.name for f in fields(method))


def own_default(method: type | Any, name: str) -> Any:
    """The default of an option of a method."""
    return next(f.default for f in fields(method) if f.name == name)


@cache
def choices(cls: Any) -> dict[str, tuple[str, ...]]:
    """The options of a method that take one of a few names, with those names."""
    hints = get_type_hints(cls)
    found = {name: hints[name] for name in option_names(cls)}
    return {name: get_args(hint) for name, hint in found.items() if get_origin(hint) is Literal}


def check_options(method: Any) -> None:
    """Checks every option of a method, and makes plain numbers of its batch weights.

    Raises:
        ValueError, TypeError: for a value that the option does not take; names it and what is expected.
    """
    cls: Any = type(method)
    named = choices(cls)
    for option in fields(method):
        name, value = option.name, getattr(method, option.name)
        if name in named:
            if value not in named[name]:
                raise ValueError(unknown_name(name, value, named[name]))
        elif value is None and option.default is None:
            continue
        elif name == "batch_weights":
            object.__setattr__(method, name, _weights(value))
        elif isinstance(option.default, bool):
            check_flag(name, value)
        elif name == "strength":
            check_number(name, value, 0.0, math.inf, "1 starts at [ΔW]_r itself", open_low=True)
        elif isinstance(option.default, int):
            check_integer(name, value, 1)
        elif name == "shift_constant" and isinstance(value, str):
            if value != "gaussian":
                raise ValueError(unknown_name(name, value, ["gaussian", "or a number"]))
        else:
            check_number(name, value, *_RANGES[name])


def at_earlier_default(name: str, value: object) -> bool:
    """Whether an option has the value that version 0.1 wrote where it was not set."""
    plain = isinstance(value, (str, int, float))
    return value is None or (plain and name in EARLIER_DEFAULTS and value == EARLIER_DEFAULTS[name])


def check_number(name: str, value: object, low: float, high: float, hint: str, *, open_low: bool = False) -> None:
    """Raises TypeError for what is no number, ValueError for one that is out of range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {quoted(value)}; {hint}")
    inside = math.isfinite(value) and (low < value if open_low else low <= value) and value <= high
    if not inside:
        left = "(" if open_low else "["
        raise ValueError(f"{name}: expected a finite number in {left}{low:g}, {high:g}], got {quoted(value)}; {hint}")


def check_integer(name: str, value: object, low: int) -> None:
    """Raises TypeError for what is no whole number, ValueError for one below `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__} {quoted(value)}")
    if value < low:
        raise ValueError(f"{name}: expected at least {low}, got {value}")


def check_flag(name: str, value: object) -> None:
    """Raises TypeError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {quoted(value)}")


def _weights(values: object) -> tuple[float, ...]:
    """Any iterable of numbers as plain floats."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"batch_weights: expected one number a batch, such as (1.0, 0.5), got {quoted(values)}")
    weights = tuple(values)
    for w in weights:
        if isinstance(w, (str, bytes, bool)) or not hasattr(w, "__float__"):
            raise TypeError(f"batch_weights: expected a number for each batch, got {quoted(w)}")
    if not weights or not all(map(math.isfinite, weights)):
        raise ValueError(f"batch_weights: expected one number a batch, all of them finite, got {weights}")
    return tuple(float(w) for w in weights)
