"""Checks of settings: a value out of its range is one error that says what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ...messages import unknown_name


def at_least(section: str, values: Any, **lows: int) -> None:
    """Check fields of a section against their least values.

    Raises:
        ValueError: names section, field, what was expected and what came.
    """
    for name, low in lows.items():
        if getattr(values, name) < low:
            raise ValueError(f"{section}.{name}: expected at least {low}, got {getattr(values, name)}")


def within(where: str, value: float, low: float, high: float, hint: str, *, open_low: bool = False) -> None:
    """Check a finite number against its range; `open_low` leaves out `low` itself.

    Raises:
        ValueError: names the setting, the range and what came.
    """
    if not (math.isfinite(value) and (low < value if open_low else low <= value) and value <= high):
        lowest = f"above {low:g}" if open_low else f"from {low:g}"
        highest = "" if high == math.inf else f"{' and at most' if open_low else ' to'} {high:g}"
        raise ValueError(f"{where}: expected a finite number {lowest}{highest}, got {value}; {hint}")


def one_of(where: str, value: str, allowed: Iterable[str]) -> None:
    """Check a word against those that are known.

    Raises:
        ValueError: with the nearest right one.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(unknown_name(where, value, allowed))


def check_held_out(
    where: object, count: int, what: str, eval_size: float, classes: int = 1, *, apart: str | None = None
) -> None:
    """Check that rows can be held out of all rows, with each class in both parts.

    Args:
        where: the data, for the message.
        count: rows.
        what: they are, such as "rows".
        eval_size: how many to hold out: a number from 1, or a share below 1.
        classes: parts in which each must have one; 1 for data without classes.
        apart: the setting that names held-out rows of their own, if there is one.

    Raises:
        ValueError: if not; says what to set.
    """
    held_out = math.ceil(eval_size * count) if eval_size < 1 else int(eval_size)
    least = max(1, classes)
    if least <= held_out <= count - least:
        return
    if held_out >= count:
        problem = "leaves nothing to train on"
    elif held_out < least:
        problem = f"is less than one for each of {classes} classes"
    else:
        problem = f"leaves {count - held_out} to train on, less than one for each of {classes} classes"
    if count < 2 * least:
        cure = f"add {what}: at least {2 * least} are needed"
    else:
        cure = f"set it to a fifth of the {what} or so: --set task.eval_size={max(least, count // 5)}"
    other = f", or name held-out {what} with {apart}" if apart else ""
    raise ValueError(f"{where}: {count} {what}, so task.eval_size={eval_size:g} {problem}; {cure}{other}")
