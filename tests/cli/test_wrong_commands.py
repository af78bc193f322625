"""Every wrong command of the docs in a process of its own: one line, exit code 1, nothing written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tests.wrong_commands import is_clear, prepare, run, wrong_commands

RIGHT = (
    ("init", "encoder", "--data", "rows.csv", "--label", "label", "--out", "out", "--rank", "4", "--dry-run"),
    ("compare", "mine.toml", "--dry-run"),
    ("export", "adapter", "--out", "x.safetensors"),
)


def test_there_are_twelve_of_each() -> None:
    assert set(Counter(wrong.command for wrong in wrong_commands()).values()) == {12}
    assert len({(wrong.command, wrong.what) for wrong in wrong_commands()}) == 60


@pytest.mark.slow
def test_a_wrong_command_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    prepare(tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    for wrong in wrong_commands():
        ended = run(wrong.arguments, tmp_path)
        assert is_clear(wrong, ended), (wrong, ended)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    for arguments in RIGHT:  # the controls
        assert run(arguments, tmp_path).code == 0, arguments
