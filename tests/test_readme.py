"""README.md: its example runs, its options are documented, its numbers are those of the records."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from tests.tiny import base_model, causal_batches
from tests.trainer_cases import assert_plain

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As a reader would paste it, with a tiny model for `base`; the saved file loads in plain PEFT."""
    (block,) = re.findall(r"<!-- runnable: readme -->\n```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    lines = block.partition("# train as always")
    given = {"base": base_model("llama"), "loader": causal_batches(8)}
    exec(compile(lines[0], "README.md", "exec"), given)
    assert "layers.0.self_attn.q_proj" in capsys.readouterr().out
    for batch in given["loader"]:
        given["model"](**batch).loss.backward()
        given["optimizer"].step()
        given["optimizer"].zero_grad()
    exec(compile(lines[2].partition("\n")[2], "README.md", "exec"), given)
    assert_plain(given["model"], tmp_path / "adapter", moved=1e-5)


def test_it_can_be_read_in_two_minutes() -> None:
    assert len(README.splitlines()) <= 120
    parts = ("Install", "Use", "What it brings", "When to use", "Methods", "Try it and test it", "Limits", "More")
    order = ["# cntlora", *(f"\n## {part}" for part in parts)]
    places = [README.index(heading) for heading in order]
    assert places == sorted(places)


def test_its_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", README)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).is_file()] == []


@pytest.mark.published
def test_its_table_and_figure_are_those_of_the_records() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import headline

    found = headline.rows(headline.RUNS)
    assert [row for row in found if f"| {' | '.join(row)} |" not in README.replace("**", "")] == []
    assert f"| {' | '.join([*found[0][:-1], found[1][-1]])} |" not in README  # control
    pinned = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    if version("matplotlib") == pinned["matplotlib"]:
        assert headline.figure(headline.RUNS) == headline.FIGURE.read_bytes()


def test_the_files_that_contributing_names_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:src|tests|benchmarks|docs)/[\w/.]+)`", text) + re.findall(r"\]\(([\w/.]+)\)", text)
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []
    named = re.findall(r"`(src/[\w/]+\.py)` \(`(\w+)`", text)
    assert len(named) >= 10
    assert [pair for pair in named if not _defines(pair[0], pair[1])] == []
    assert not _defines(named[0][0], "no_such_function")  # the control
    rooms = {path.name for path in (ROOT / "src" / "cntlora").iterdir() if (path / "__init__.py").is_file()}
    assert rooms == set(re.findall(r"`(\w+)/`", text.partition("## The rooms")[2].partition("Outside")[0]))


def _defines(path: str, name: str) -> bool:
    """Return whether a file defines a function, a class or a constant of this name."""
    return bool(re.search(rf"^\s*(?:def |class )?{name}\b(?=[(:\[ ])", (ROOT / path).read_text("utf-8"), re.MULTILINE))


def test_no_page_is_long() -> None:
    """A page answers one question; those of results too, where they were made."""
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "docs").rglob("*.md")}
    assert len(lines) > 30
    assert [path.name for path, count in lines.items() if count > 250] == []
