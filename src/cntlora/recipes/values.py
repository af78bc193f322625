"""Checks of settings: a value out of its range is one error that says what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..config import unknown_name


def at_least(section: str, values: Any, **lows: int) -> None:
    """Checks fields of a section against their least values.

    Raises:
        ValueError: names section, field, what was expected and what came.
    """
    for name, low in lows.items():
        if getattr(values, name) < low:
            raise ValueError(f"{section}.{name}: expected at least {low}, got {getattr(values, name)}")


def within(where: str, value: float, low: float, high: float, hint: str, *, open_low: bool = False) -> None:
    """Checks a finite number against its range; `open_low` leaves out `low` itself.

    Raises:
        ValueError: names the setting, the range and what came.
    """
    if not (math.isfinite(value) and (low < value if open_low else low <= value) and value <= high):
        raise ValueError(f"{where}: expected a finite number from {low:g} to {high:g}, got {value}; {hint}")


def one_of(where: str, value: str, allowed: Iterable[str]) -> None:
    """Checks a word against those that are known.

    Raises:
        ValueError: with the nearest right one.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(unknown_name(where, value, allowed))
