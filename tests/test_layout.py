"""The structure that the docs promise, read from the code itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.structure import REST, ImportCycleError, measure, percentile

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "cntlora"
LIBRARY: dict[str, Any] = {"without": ("cli", "lab")}


def contracts_of(source: Path) -> subprocess.CompletedProcess[str]:
    """The contracts of pyproject.toml, as `make lint` checks them, for the package in `source`."""
    code = (
        "import sys; from importlinter.cli import lint_imports_command; "
        "sys.argv[1:] = ['--no-cache']; lint_imports_command()"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(source)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("linalg/moments.py", "from ..model import sites"),
        ("methods/descent.py", "from ..data import batches"),
        ("execution/reading.py", "from ..lab import demo"),
        ("data/collect.py", "from ..execution import reading"),
    ],
)
def test_an_import_against_the_direction_is_found(tmp_path: Path, file: str, line: str) -> None:
    """The control of the contract: each of these is broken by one line."""
    shutil.copytree(PACKAGE, tmp_path / "cntlora", ignore=shutil.ignore_patterns("__pycache__"))
    changed = tmp_path / "cntlora" / file
    changed.write_text(changed.read_text() + "\n" + line + "\n")
    assert "BROKEN" in contracts_of(tmp_path).stdout


def test_imports_go_one_way() -> None:
    told = contracts_of(ROOT / "src").stdout
    assert "KEPT" in told and "BROKEN" not in told, told


@pytest.mark.parametrize(("part", "depth"), [(LIBRARY, 6), ({"only": "lab"}, 10), ({"only": "cli"}, 4)])
def test_no_chain_of_imports_is_long(part: dict[str, Any], depth: int) -> None:
    """Of the library; of the laboratory and of the commands, whose imports from elsewhere count as one file."""
    chain = measure(PACKAGE, **part).chain
    assert len(chain) <= depth, " > ".join(chain)


def test_no_import_of_the_library_hides_in_a_function() -> None:
    """The depth counts what runs on loading, so nothing else may be imported but by the command line."""
    assert measure(PACKAGE, **LIBRARY).deferred == (("cntlora.__main__", "cntlora.cli.app"),)
    assert len(measure(PACKAGE, only="lab").deferred) > 20  # the control: optional libraries are imported late there


def test_the_measured_structure_is_that_of_a_package_made_for_it(tmp_path: Path) -> None:
    """The control of the depth: imports that do not run on loading are left out, a cycle is an error."""
    root = tmp_path / "made"
    files = {
        "__init__.py": "from .top import f\n",
        "top.py": "import os\nfrom .inner import middle\nclass C:\n    def g(self):\n        from . import unused\n",
        "inner/__init__.py": "",
        "inner/middle.py": "try:\n    from ..low import x\nexcept ImportError:\n    x = 1\n",
        "low.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .top import f\n"
        'def x():\n    """One\n    two."""\n    return 1\n',
        "unused.py": "from . import top\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    found = measure(root, without=["unused"])
    assert found.chain == ("made", "made.top", "made.inner.middle", "made.low")
    assert found.deferred == (("made.top", "made.unused"),)
    assert sorted(found.function_lines) == [2, 2] and len(found.file_lines) == 5
    assert measure(root).depths["made.unused"] == 4
    assert measure(root, only="inner").chain == ("made.inner.middle", REST)
    assert (percentile(range(1, 11), 0.9), percentile(range(1, 12), 0.9)) == (9, 10)
    (root / "low.py").write_text("from . import unused\n")
    with pytest.raises(ImportCycleError, match="made.top > made.inner.middle > made.low > made.unused > made.top"):
        measure(root)


def test_every_option_is_documented() -> None:
    from dataclasses import fields

    from cntlora import InitConfig
    from cntlora.methods.method import all_options

    page = (ROOT / "docs" / "options.md").read_text()
    names = [*(f.name for f in fields(InitConfig)), *all_options()]
    missing = [name for name in names if f"`{name}`" not in page]
    assert not missing


def test_no_pickle_is_loaded() -> None:
    """But for the weights of EfficientNet, which come as such a file only: checksummed, and read as tensors alone."""
    safe = re.compile(r"torch\.load\([^()]*weights_only=True\)")
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if path.name == "efficientnet.py":
            text, found = safe.subn("", text)
            assert found == 1 and "packaged_file(" in text
        assert "torch.load" not in text and "pickle.load" not in text, path


def _library_part() -> str:
    """The page from the class of a method on; the function before it is run by tests/methods/test_function.py."""
    return (ROOT / "docs" / "adding_a_method.md").read_text().partition("## A method of the library")[2]


def test_the_guide_to_a_new_method_shows_the_code_that_is_there() -> None:
    """Every line of its Python blocks stands in the sources; a made-up line would not."""
    blocks = re.findall(r"```python\n(.*?)```", _library_part(), re.DOTALL)
    files = [*(PACKAGE / "methods").glob("*.py"), ROOT / "tests" / "reference.py"]
    code = {line.strip() for path in files for line in path.read_text().splitlines()}
    lines = [line.strip() for block in blocks for line in block.splitlines() if line.strip()]
    assert len(lines) == 10
    assert [line for line in lines if line not in code] == []
    assert "return Target(M=G)" not in code
