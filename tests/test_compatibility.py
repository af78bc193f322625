"""Every run that the docs name has a test of that name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest


def test_the_tests_that_the_docs_name_exist() -> None:
    root = Path(__file__).parents[1]
    missing, named = [], 0
    for page in ("compatibility.md", "reliability.md", "guides/trainers.md", "guides/other_trainers.md"):
        for file, function in re.findall(
            r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`", (root / "docs" / page).read_text()
        ):
            named += 1
            path = next((root / "tests").rglob(file), None)
            if path is None or (function and f"def {function}(" not in path.read_text()):
                missing.append(f"{page}: {file}::{function}")
    assert not missing
    assert named > 40  # control: the pattern finds them


@pytest.mark.published
def test_the_tables_of_reliability_are_those_of_their_records(tmp_path: Path) -> None:
    from benchmarks import reliability
    from benchmarks.peft_suite import document as peft_tests
    from benchmarks.reliability_tables import put_into

    docs = Path(__file__).parents[1] / "docs"
    shutil.copytree(docs / "reliability", tmp_path / "reliability")
    shutil.copy(docs / "reliability.md", tmp_path)
    pages = ("reliability.md", "reliability/wrong_inputs.md", "reliability/peft_tests.md")
    record, suite = (json.loads(path.read_text()) for path in (reliability.RECORD, peft_tests.RECORD))
    put_into(tmp_path / "reliability.md", record)
    peft_tests.put_table(tmp_path / pages[2], suite)
    assert [page for page in pages if (tmp_path / page).read_bytes() != (docs / page).read_bytes()] == []
    put_into(tmp_path / "reliability.md", {**record, "wrong inputs": record["wrong inputs"][1:]})  # control
    assert [page for page in pages if (tmp_path / page).read_bytes() != (docs / page).read_bytes()] == list(pages[:2])
