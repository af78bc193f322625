"""Optional dependencies: each is imported where it is used only, and a missing one is named with its extra."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import save_file
from tests.conftest import RunFresh
from typer.testing import CliRunner

from cntlora.cli.app import app
from cntlora.extras import EXTRAS, MissingExtraError, require
from cntlora.lab.experiments.tasks import TASKS, task_kind

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL", "mlflow-skinny": "mlflow"}
"""Distribution → module, where the names differ."""
OF_DEVELOPERS = {"dev", "docs", "peft-tests"}
"""Extras that no code of the package imports."""
OPTIONAL = sorted({module for modules in EXTRAS.values() for module in modules})
HIDE = """
for name in {names}:
    sys.modules[name] = None
sys.argv = ["cntlora", *sys.argv[1:]]
"""


def brought(extra: str) -> set[str]:
    """The modules that an extra of pyproject.toml brings on this version of Python, with those that it includes."""
    found = set()
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        if requirement.name == "cntlora":
            found |= set().union(*(brought(part) for part in requirement.extras))
        else:
            found.add(MODULES.get(requirement.name, requirement.name))
    return found


def test_the_table_is_that_of_pyproject() -> None:
    assert set(EXTRAS) == set(PROJECT["optional-dependencies"]) - OF_DEVELOPERS
    for extra, modules in EXTRAS.items():
        assert brought(extra) == set(modules), extra


def test_the_library_alone_needs_torch_and_safetensors() -> None:
    assert {Requirement(text).name for text in PROJECT["dependencies"]} == {"torch", "safetensors"}


def imported(file: Path) -> set[str]:
    """Top-level names of the packages that a file imports anywhere, but for those of the type checker alone."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    absolute = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0 and n.module]
    names = {n.module for n in absolute if n.module} | {
        alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
    }
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)


FOLDERS = {
    "lab/recipes/text": ("text",),
    "lab/recipes/vision": ("vision",),
    "lab/recipes/diffusion": ("diffusion",),
    "lab/recipes/captioning": ("vlm",),
    "lab/recipes/samples": ("samples", "vision"),
    "lab": ("lab", "vision", "ray"),
    "cli": ("cli",),
    "integrations": ("peft",),
    "": ("peft", "text", "lab"),
}
"""Folder → the extras whose modules its files may import; the first that fits a file counts."""
HOSTS = {
    "integrations/axolotl.py": {"axolotl", "pydantic"},
    "integrations/method_comparison.py": {"utils", "data"},  # of PEFT's folder
}
"""File → modules of the program that it is for."""
IN_USE = {"torch", "safetensors", "bitsandbytes", "tokenizers", "tomli"}
"""Needed by the library itself, there with the model that is given to it or with transformers, or on Python 3.10."""


def test_a_file_imports_only_what_the_extra_of_its_folder_brings() -> None:
    package = ROOT / "src" / "cntlora"
    for file in package.rglob("*.py"):
        name = file.relative_to(package).as_posix()
        folder = next(folder for folder in FOLDERS if name.startswith(folder))
        allowed = IN_USE.union(*(EXTRAS[extra] for extra in FOLDERS[folder]))
        assert imported(file) <= allowed | HOSTS.get(name, set()), name
    assert imported(ROOT / "tests" / "test_extras.py") >= {"pytest", "torch", "typer"}  # the control


# --- commands and recipes, each module hidden in turn ---------------------------------------------------------

COMMANDS = {
    "cntlora init": ("text", ["init", "model", "--out", "out", "--data", "x.csv"]),
    "cntlora demo": ("demo", ["demo", "--out", "out"]),
    "cntlora report": ("lab", ["report", "results", "--out", "page"]),
    "cntlora results pack": ("lab", ["results", "pack", "results", "runs.parquet"]),
    "cntlora results unpack": ("lab", ["results", "unpack", "runs.parquet", "results"]),
    "a comparison of methods": ("lab", ["run", "file.toml"]),
    "--engine ray": ("ray", ["run", "file.toml", "--engine", "ray"]),
}


@pytest.mark.parametrize(
    ("purpose", "module"),
    [(purpose, m) for purpose, (extra, _) in COMMANDS.items() for m in EXTRAS[extra] if m != "typer"],
)
def test_a_command_names_the_extra_that_it_lacks(
    purpose: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    extra, arguments = COMMANDS[purpose]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and not list(tmp_path.iterdir())
    assert result.stderr == f"cntlora: {purpose} needs {module}: pip install 'cntlora[{extra}]'\n"


@pytest.mark.parametrize("purpose", COMMANDS)
def test_with_everything_installed_a_command_gets_further(
    purpose: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The control: the same arguments, which name files that are not there, end otherwise."""
    if purpose == "cntlora demo":
        pytest.skip("it would run")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, COMMANDS[purpose][1])
    assert result.exit_code == 1 and "pip install" not in result.stderr


@pytest.mark.parametrize(("name", "module"), [(name, m) for name, (_, extra) in TASKS.items() for m in EXTRAS[extra]])
def test_a_recipe_names_the_extra_that_it_lacks(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = TASKS[name][1]
    task_kind(name)
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match=re.escape(f"needs {module}: pip install 'cntlora[{extra}]'")):
        task_kind(name)


def test_require_accepts_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for extra in set(EXTRAS) - {"trackers"}:  # of which `make test-trackers` has an environment of its own
        require(extra, "this test")
    monkeypatch.setitem(EXTRAS, "new", ("torch", "no_such_module"))
    with pytest.raises(MissingExtraError, match="this test needs no_such_module"):
        require("new", "this test")
    require("new", "this test", ["torch"])


# --- without any of them ----------------------------------------------------------------------------------------


def test_the_command_without_typer_says_what_to_install(run_fresh: RunFresh) -> None:
    script = HIDE.format(names=OPTIONAL) + (
        "from cntlora.__main__ import main\ntry:\n    main()\nexcept SystemExit as end:\n    print(end.code)\n"
    )
    assert run_fresh(script) == "cntlora: the command cntlora needs typer: pip install 'cntlora[cli]'\n"


def test_the_library_runs_with_torch_and_safetensors_alone(run_fresh: RunFresh) -> None:
    """Hand-made layers in the form of PEFT's are not needed: what imports is imported, what is read is read."""
    script = HIDE.format(names=OPTIONAL) + (
        "import cntlora\n"
        "from cntlora.report import text_table\n"
        "print(cntlora.methods(), text_table('t', ('rank',), [('a', '1')]).splitlines()[-1].split())\n"
    )
    assert "['a', '1']" in run_fresh(script)


def test_inspect_and_export_need_the_command_line_alone(run_fresh: RunFresh, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "base_model.model.unet.down.to_q.lora_{}.weight"
    save_file(
        {name.format("A"): torch.ones(2, 4), name.format("B"): torch.ones(4, 2)}, adapter / "adapter_model.safetensors"
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    hidden = sorted(set(OPTIONAL) - set(EXTRAS["cli"]))
    script = HIDE.format(names=hidden) + "from cntlora.__main__ import main\nmain()\n"
    assert "unet.down.to_q" in run_fresh(script, "inspect", adapter)
    out = tmp_path / "lora.safetensors"
    assert "1 site (" in run_fresh(script, "export", adapter, "--out", out) and out.is_file()
