"""The notebooks run on tiny models; what they show was made by running them, and is small and of no one machine."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BY_NAME = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    found = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]
    assert found
    return found


@pytest.mark.published
@BY_NAME
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.notebooks import executed

    monkeypatch.setenv("CNTLORA_NOTEBOOK", "")
    shown = executed(path, tmp_path, tiny=True)
    assert all(cell["execution_count"] for cell in shown.cells if cell["cell_type"] == "code")
    before = json.loads(path.read_text(encoding="utf-8"))
    assert not [path for path in tmp_path.rglob("*") if path.name == "log.txt" and "\x1b" in path.read_text()]
    assert [cell["source"] for cell in shown.cells] == ["".join(cell["source"]) for cell in before["cells"]]


@pytest.mark.published
def test_a_cell_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    import nbformat
    from benchmarks.notebooks import executed
    from nbclient.exceptions import CellExecutionError

    monkeypatch.setenv("CNTLORA_NOTEBOOK", "")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        executed(tmp_path / "bad.ipynb", tmp_path, tiny=True)


@BY_NAME
def test_it_shows_its_outputs(path: Path) -> None:
    code = cells(path, "code")
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))  # run once, from top to bottom
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(root|home|tmp|work|Users)/", text)


@BY_NAME
def test_it_opens_on_colab_and_installs_what_it_needs(path: Path) -> None:
    first = "".join(cells(path, "markdown")[0]["source"])
    assert "colab.research.google.com" in first and "pip install" in first
    install = "".join(cells(path, "code")[0]["source"])
    extras = re.search(r'%pip install --quiet "cntlora\[([\w,]+)\]', install)
    assert extras is not None
    known = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{extra} = ", known, re.MULTILINE) for extra in extras[1].split(","))


@BY_NAME
def test_its_badge_and_installation_follow_from_the_address_in_pyproject(path: Path) -> None:
    import nbformat
    from benchmarks.notebooks import linked, repository

    read = partial(nbformat.read, path, as_version=4)
    assert linked(read(), path.stem, repository()) == read()
    public = linked(read(), path.stem, "https://github.com/someone/lora.git")
    first, install = (cell.source for cell in public.cells[:2])
    (opened,) = re.findall(r"\(https://colab\.research\.google\.com/github/someone/lora/blob/main/([^)]+)\)", first)
    assert (ROOT / opened).samefile(path) and '] @ git+https://github.com/someone/lora"' in install
    assert public.cells[2:] == read().cells[2:] and linked(public, path.stem, repository()) == read()
    with pytest.raises(ValueError, match="Repository: expected https://github.com/OWNER/NAME"):
        linked(read(), path.stem, "https://example.org/lora")


@BY_NAME
def test_its_links_lead_to_files(path: Path) -> None:
    text = "".join(line for cell in cells(path, "markdown") for line in cell["source"])
    links = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text)
    assert links and [link for link in links if not (path.parent / link).is_file()] == []


def test_readme_and_docs_name_them_all_and_they_are_small() -> None:
    assert NOTEBOOKS and sum(path.stat().st_size for path in NOTEBOOKS) < 1_000_000
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "docs/notebooks.md" in readme
    for path in NOTEBOOKS:
        assert f"(../notebooks/{path.name})" in page and f"notebooks/{path.name}" in readme
