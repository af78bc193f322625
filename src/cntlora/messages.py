"""Messages to the user: warnings that point at the line of their code, errors in one line, checks of plain values."""

from __future__ import annotations

import difflib
import logging
import math
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_STANDARD = sysconfig.get_path("stdlib") + os.sep
_PACKAGES = tuple(f"{_STANDARD}{name}{os.sep}" for name in ("site-packages", "dist-packages"))


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning at the first frame outside this package and the standard library."""
    level, frame = 1, sys._getframe()
    outer: FrameType | None = frame
    while outer is not None and _passed_over(outer):
        outer, level = outer.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _passed_over(frame: FrameType) -> bool:
    """Return whether a frame is of this package, or of the standard library, as `functools.cached_property` is."""
    file = frame.f_code.co_filename
    ours = frame.f_globals.get("__name__", "").partition(".")[0] == "cntlora"
    return ours or (file.startswith(_STANDARD) and not file.startswith(_PACKAGES))


_TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")
_VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")


def quiet_libraries() -> None:
    """Errors only, also in child processes, from libraries that tell of optional parts that they lack when imported.

    Not where the user has chosen otherwise by the environment variables of transformers and diffusers.
    """
    for name in _VERBOSITY:
        os.environ.setdefault(name, "error")
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_logging(library: Any) -> Iterator[None]:
    """Silence all but errors inside, and draw no bar; then all is as it was.

    Args:
        library: `transformers.utils.logging`, or that of diffusers, which has the same functions.
    """
    verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Context in which transformers reports no new head and draws no bar for a second of loading."""
    from transformers.utils import logging as transformers_logging

    with quiet_logging(transformers_logging):
        yield


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, its kind if it says nothing: to be quoted in a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_short(text: object, most: int = 300) -> str:
    """Return what a text or an exception says, in one line; from the middle of a long one something is left out.

    The cause of an error may be at either end, and in between whole models may be printed.
    """
    line = " ".join(str(text).split()) or type(text).__name__
    if len(line) <= most:
        return line
    head = most // 3
    return f"{line[:head]} … {line[head + 3 - most :]}"


def counted(number: int, word: str) -> str:
    """A number of things: "1 batch", "1,200 batches"."""
    plural = f"{word}{'es' if word.endswith('ch') else 's'}"
    return f"{number:,} {word if number == 1 else plural}"


def quoted(value: Any) -> str:
    """A value that was given, for a message: of a tensor or a model no more than its kind."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    if hasattr(value, "named_modules"):
        return f"a model ({type(value).__name__})"
    return in_short(repr(value), 120)


def unknown_name(what: str, name: object, allowed: Iterable[str]) -> str:
    """One line that lists the right names, the nearest first if there is one."""
    allowed = list(allowed)
    near = difflib.get_close_matches(str(name), allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{what}: {quoted(name)} is not known{hint}; expected one of: {', '.join(allowed)}"


def check_number(name: str, value: object, low: float, high: float, hint: str, *, open_low: bool = False) -> None:
    """Raise TypeError for what is no number, ValueError for one that is out of range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {quoted(value)}; {hint}")
    inside = math.isfinite(value) and (low < value if open_low else low <= value) and value <= high
    if not inside:
        left = "(" if open_low else "["
        raise ValueError(f"{name}: expected a finite number in {left}{low:g}, {high:g}], got {quoted(value)}; {hint}")


def check_integer(name: str, value: object, low: int) -> None:
    """Raise TypeError for what is no whole number, ValueError for one below `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__} {quoted(value)}")
    if value < low:
        raise ValueError(f"{name}: expected at least {low}, got {value}")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {quoted(value)}")
