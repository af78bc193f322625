"""Warnings that point at the line of the user's code that called us, however deep inside they come up."""

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
