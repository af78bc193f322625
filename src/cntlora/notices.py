"""What is said to the user: warnings that point at the line of their code, and errors quoted in one line."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


def warn_caller(message: str) -> None:
    """A UserWarning at the first frame outside this package."""
    level, frame = 1, sys._getframe()
    outer: FrameType | None = frame
    while outer is not None and outer.f_globals.get("__name__", "").partition(".")[0] == "cntlora":
        outer, level = outer.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, its kind if it says nothing: to be quoted in a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
