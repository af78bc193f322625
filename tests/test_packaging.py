"""Agreement of what a package index and a stranger read: versions, supported Pythons, oldest dependencies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests import oldest
from tests.test_extras import PROJECT

from cntlora.version import VERSION

ROOT = Path(__file__).parents[1]


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_version_is_the_same_everywhere() -> None:
    assert read("CITATION.cff")["version"] == VERSION
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert released[0] == VERSION and len(set(released)) == len(released)


def test_the_supported_pythons_are_those_that_are_tested() -> None:
    listed = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d", c)]
    jobs = read(".github/workflows/tests.yml")["jobs"]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == listed
    assert PROJECT["requires-python"] == f">={listed[0]}"
    (oldest_python,) = [step["with"]["python-version"] for step in jobs["oldest"]["steps"] if "python" in str(step)]
    assert oldest_python == listed[0]


def test_every_dependency_of_the_package_has_an_oldest_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = oldest.minima()
    assert found["torch"] and found["peft"] and "pytest" not in found
    texts = "\n".join(
        str(text) for e, texts in PROJECT["optional-dependencies"].items() if e not in oldest.TOOLS for text in texts
    )
    named = {re.split(r"[>=;\[ ]", text)[0] for text in texts.splitlines()} - {"cntlora"}
    assert named <= set(found)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["torch>=2.4"]\noptional-dependencies = { a = ["numpy>=1"], b = ["numpy>=2"] }\n'
    )
    monkeypatch.setattr(oldest, "ROOT", tmp_path)
    assert oldest.minima() == {"torch": "2.4", "numpy": "2"}  # the higher, with which both extras work


def test_hooks_before_a_commit_run_what_lint_runs() -> None:
    (local,) = read(".pre-commit-config.yaml")["repos"]
    hooks = [" ".join(hook["entry"].split()[:2]).removeprefix(".venv/bin/") for hook in local["hooks"]]
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nlint: ")[2].partition("\n\n")[0]
    run = re.findall(r"\$\(BIN\)/(\S+(?: check| format)?)", lint)
    assert hooks == run
