"""Warnings point at the line of the user's code."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from cntlora.lab.recipes.image_files import left_out
from cntlora.messages import warn_caller


def test_frames_of_the_standard_library_are_passed_over() -> None:
    """The caller of the package's function is functools itself here."""
    namespace = {"warn_caller": warn_caller, "__name__": "cntlora.lab.recipes.some"}
    exec("def rows(self):\n    warn_caller('one')\n    return 1", namespace)
    rows = functools.cached_property(namespace["rows"])  # type: ignore[call-overload]
    holder = type("Holder", (), {"rows": rows})
    rows.__set_name__(holder, "rows")
    with pytest.warns(UserWarning, match="one") as caught:
        _ = holder().rows
    assert Path(caught[0].filename).name == Path(__file__).name


@pytest.mark.parametrize(("count", "says"), [(1, "1 file is no image"), (2, "2 files are no images")])
def test_what_is_left_out_is_counted_in_words(count: int, says: str) -> None:
    assert says in left_out("photos", count, "notes.txt")
