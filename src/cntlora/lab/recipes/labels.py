"""Columns of classes: which name has which index, and columns that are refused because they hold no classes."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd

from ...messages import counted, warn_caller

SHOWN = 20  # classes or rows that a message names

_NO_LABEL = {"", "nan", "<na>", "nat", "null", "#n/a"}
_NO_NUMBER = {"na", "n/a", "none", "-", "--", "?", "."}  # words that may be classes, but not among numbers
_FEW, _FEW_FRACTIONS, _MANY_FRACTIONS = 10, 4, 20

REGRESSION = "--set task.kind=regression"


def class_column(
    values: Sequence[Any], column: str, where: object, *, regression: str | None = REGRESSION, held_out: bool = False
) -> tuple[list[int], list[str]]:
    """Class indices and class names of a column; names are sorted, numbers by value.

    Blanks around a name do not count. Whole numbers that a file keeps as floating-point ones are written without ".0".
    Two names that differ in case or blanks only are two classes, with a warning.

    Args:
        values: the cells.
        column, where: its name and its file, for messages.
        regression: how the user asks for regression instead; None where there is none.
        held_out: the rows are only scored, so that a class may have one of them.

    Raises:
        ValueError: for cells without a label ("nan" too), a number written in two ways, or (nearly) a class a row;
            the message names file, column and rows, and what to change.
    """
    cells = [_text(value, row, column, where) for row, value in enumerate(values, start=1)]
    _check_labels(cells, column, where)
    counts = Counter(cells)
    numbers = {name: number for name in counts if (number := _number(name)) is not None}
    numeric = len(numbers) == len(counts)
    names = sorted(counts, key=lambda name: (numbers[name], name)) if numeric else sorted(counts)
    if numeric:
        _check_spelling(numbers, counts, column, where)
    if not held_out:
        warn_alike(counts, f"{where}: column {column!r}")
        _check_count(counts, list(numbers.values()) if numeric else [], column, where, regression)
    index = {name: i for i, name in enumerate(names)}
    return [index[cell] for cell in cells], names


def known_classes(values: Sequence[Any], names: Sequence[str], column: str, where: object) -> list[int]:
    """Class indices of a published column that holds indices of `names`.

    Raises:
        ValueError: for a value that is no index of a name; names the rows.
    """
    wrong = [row for row, value in enumerate(values, start=1) if pd.isna(value) or not 0 <= value < len(names)]
    if wrong:
        raise ValueError(
            f"{where}: column {column!r}: expected a class from 0 to {len(names) - 1} ({listed(names)}), got "
            f"{values[wrong[0] - 1]} in {rows_of(wrong)}; take a split with labels, or remove these rows"
        )
    return [int(value) for value in values]


def warn_alike(counts: Counter[str], where: str, what: str = "rows") -> None:
    """Warn of classes whose names differ in case or blanks only."""
    groups: dict[str, list[str]] = {}
    for name in sorted(counts):
        groups.setdefault("".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    alike = [group for group in groups.values() if len(group) > 1]
    if alike:
        shown = " and ".join(f"{name!r} ({counts[name]} {what})" for name in alike[0])
        more = f", and {len(alike) - 1} more such groups" if len(alike) > 1 else ""
        warn_caller(f"{where}: {shown} differ in case or blanks only and are classes of their own{more}; "
                    "write them alike if they are one")  # fmt: skip


def describe_classes(names: Sequence[str], labels: Sequence[int], what: str = "rows") -> str:
    """ "0 = bad, 1 = good (24, 25 rows)": the index that the head gives each class, and how many have it."""
    counts = Counter(labels)
    indices = listed([f"{i} = {name}" for i, name in enumerate(names)])
    return f"{indices} ({listed([str(counts[i]) for i in range(len(names))])} {what})"


def listed(names: Sequence[str]) -> str:
    """Names with commas, the first 20 where there are more."""
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def rows_of(rows: Sequence[int]) -> str:
    """ "row 3", or "3 rows (2, 17, 40)"; the first ten where there are more."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    return f"{counted(len(rows), 'row')} ({', '.join(map(str, rows[:10]))}{', …' if len(rows) > 10 else ''})"


def _text(value: Any, row: int, column: str, where: object) -> str:
    """A cell as a name; "" where there is none."""
    if not pd.api.types.is_scalar(value):
        kind = type(value).__name__
        raise ValueError(f"{where}: row {row}: expected text or a number in column {column!r}, got {kind}")
    if pd.isna(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _check_labels(cells: Sequence[str], column: str, where: object) -> None:
    words = {cell.lower() for cell in cells if _number(cell) is None} - _NO_LABEL
    among_numbers = words <= _NO_NUMBER and any(_number(cell) is not None for cell in cells)
    missing = _NO_LABEL | _NO_NUMBER if among_numbers else _NO_LABEL
    without = [row for row, cell in enumerate(cells, start=1) if cell.lower() in missing]
    if without:
        found = ", ".join(sorted({repr(cells[row - 1]) for row in without if cells[row - 1]}))
        have = "has" if len(without) == 1 else f"of {len(cells)} have"
        raise ValueError(
            f"{where}: {rows_of(without)} {have} nothing in column {column!r}{f' but {found}' if found else ''}; "
            "fill in the class, or remove what has none"
        )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


def _check_spelling(numbers: dict[str, float], counts: Counter[str], column: str, where: object) -> None:
    first: dict[float, str] = {}
    for name, number in numbers.items():
        other = first.setdefault(number, name)
        if other != name:
            raise ValueError(
                f"{where}: column {column!r} writes one number in two ways, {other!r} "
                f"({counted(counts[other], 'row')}) and {name!r} ({counted(counts[name], 'row')}), which would be two "
                "classes; write it in one way"
            )


def _check_count(
    counts: Counter[str], numbers: Sequence[float], column: str, where: object, regression: str | None
) -> None:
    """Refuse a column with nearly a class a row, and one of many fractions."""
    rows, classes = counts.total(), len(counts)
    nearly_one_a_row = 2 * classes > rows
    fractions = any(not number.is_integer() for number in numbers)
    if fractions and (classes > _MANY_FRACTIONS or (nearly_one_a_row and classes > _FEW_FRACTIONS)):
        pass
    elif not (nearly_one_a_row and classes > _FEW):
        return
    cures = ["name the column of the classes", "group the values into classes" if numbers else "remove rare classes"]
    if numbers and regression:
        cures.insert(0, f"to predict the number itself, regression: {regression}")
    raise ValueError(
        f"{where}: column {column!r} has {classes} different {'numbers' if numbers else 'values'} in {rows} rows, and "
        f"each would be a class; expected a few classes with several rows each; {', or '.join(cures)}"
    )
