"""The structure that the docs promise, read from the code itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "cntlora"
ORDER = [
    "core",
    "config",
    "sharded",
    "quantised",
    "offloaded",
    "patches",
    "layouts",
    "sites",
    "weight_files",
    "batches",
    "anatomy",
    "padding",
    "rows",
    "calls",
    "streams",
    "bypass",
    "collect",
    "plan",
    "ties",
    "assemble",
    "checks",
    "memory",
    "gradients",
    "reach",
    "reading",
    "passes",
    "compute",
    "agreement",
    "distributed",
    "lockstep",
    "provenance",
    "masks",
    "summary",
    "holders",
    "adapters",
    "initialize",
]


def imports(path: Path) -> set[str]:
    """First components of the relative imports of a module at the top of the package."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("index", range(1, len(ORDER)))
def test_imports_point_one_way(index: int) -> None:
    later = set(ORDER[index + 1 :])
    assert not imports(PACKAGE / f"{ORDER[index]}.py") & later


def test_core_knows_nothing_of_the_rest() -> None:
    for path in (PACKAGE / "core").glob("*.py"):
        assert not re.search(r"^from \.\.", path.read_text(), re.MULTILINE), path


def test_the_check_can_fail() -> None:
    assert "core" in imports(PACKAGE / "config.py")


def test_every_option_is_in_the_readme() -> None:
    from dataclasses import fields

    from cntlora import InitConfig

    readme = (ROOT / "README.md").read_text()
    hidden = {"seed", "rank_budget", "min_rank", "max_rank"}
    missing = [f.name for f in fields(InitConfig) if f"`{f.name}`" not in readme and f.name not in hidden]
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


def test_the_guide_to_a_new_method_shows_the_code_that_is_there() -> None:
    """Every line of its Python blocks stands in the sources; a made-up line would not."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adding_a_method.md").read_text(), re.DOTALL)
    files = [PACKAGE / "core" / "peers.py", PACKAGE / "core" / "family.py", ROOT / "tests" / "reference.py"]
    code = {line.strip() for path in files for line in path.read_text().splitlines()}
    lines = [line.strip() for block in blocks for line in block.splitlines() if line.strip()]
    assert len(lines) == 7
    assert [line for line in lines if line not in code] == []
    assert "return Target(M=G)" not in code
