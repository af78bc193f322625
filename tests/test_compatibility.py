"""What the docs say was run has a test of that name."""

from __future__ import annotations

import re
from pathlib import Path


def test_the_tests_that_the_docs_name_exist() -> None:
    root = Path(__file__).parents[1]
    missing, named = [], 0
    for page in ("compatibility.md", "reliability.md", "guides/trainers.md"):
        for file, function in re.findall(
            r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`", (root / "docs" / page).read_text()
        ):
            named += 1
            path = next((root / "tests").rglob(file), None)
            if path is None or (function and f"def {function}(" not in path.read_text()):
                missing.append(f"{page}: {file}::{function}")
    assert not missing
    assert named > 40  # control: the pattern finds them
