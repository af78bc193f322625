"""Checks of the commands' arguments before anything slow is imported, and the names of the methods."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from ..messages import unknown_name

_METHODS = Path(__file__).parents[1] / "methods"


def method_names() -> tuple[str, ...]:
    """Read the names of the methods, in the order of tables, off their sources: an import takes as long as torch."""
    named: dict[str, str] = {}
    for file in _METHODS.glob("*.py"):
        named.update(
            re.findall(
                r"^class (\w+)\(\w+\):(?:(?!^class ).)*?^    name = \"(\w+)\"", file.read_text("utf-8"), re.S | re.M
            )
        )
    listed = re.search(r"^__all__ = \[(.*?)\]", (_METHODS / "__init__.py").read_text("utf-8"), re.S | re.M)
    return tuple(named[name] for name in re.findall(r"\"(\w+)\"", listed[1] if listed else "") if name in named)


def check_method(name: str | None) -> None:
    """Check the name of a method; what may be FILE.PY:FUNCTION is left to the configuration, which loads it.

    Raises:
        ValueError: with the nearest right name.
    """
    if name is not None and ":" not in name and name not in method_names():
        raise ValueError(unknown_name("method", name, [*method_names(), "or file.py:function, of yours"]))


def check_at_least(**values: tuple[float | None, float]) -> None:
    """Check numbers against their least values; None is not checked.

    Raises:
        ValueError: names the option, what was expected and what came.
    """
    for name, (value, low) in values.items():
        if value is not None and not (math.isfinite(value) and value >= low):
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {low:g}, got {value:g}")


def check_folder(option: str, folder: Path, *, overwrite: bool | None = None) -> None:
    """Check that a folder can be made, or written into.

    Args:
        option: that names it, for the message.
        folder: the folder.
        overwrite: whether one that is not empty may be written into; None if it always may.

    Raises:
        ValueError: says what is there.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option} {folder} is a file; expected a folder")
    if overwrite is False and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{option} {folder} is not empty; choose another folder, or replace it with --overwrite")
    _check_writable(option, folder)


def check_file(option: str, file: Path) -> None:
    """Check that a file can be written.

    Raises:
        ValueError: says what is in the way.
    """
    if file.is_dir():
        raise ValueError(f"{option} {file} is a folder; expected the name of a file")
    _check_writable(option, file.parent)


def _check_writable(option: str, folder: Path) -> None:
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"{option} {folder}: {existing} is a file, so no folder can be made there")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {folder}: {existing} cannot be written to; choose another folder")
