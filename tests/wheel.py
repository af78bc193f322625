"""Installs the built wheel in an empty environment and uses it there as a stranger would: `make test-dist`.

    python -m tests.wheel dist

What the archives hold is checked first. Then comes the library alone, which draws torch and safetensors and no other
library that pyproject.toml names, then the example of README.md with PEFT, then the command.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
MIB = 2**20
NEEDED = ("cntlora/py.typed", "cntlora/api.py", "cntlora/lab/report/page.html")
UNWANTED = re.compile(r"^(tests|results|studies|docs|benchmarks|experiments)/")

ALONE = """
import importlib.metadata as metadata, subprocess, sys
import cntlora
names = {d.metadata["Name"].lower() for d in metadata.distributions()}
drawn = names & {"typer", "rich", "peft", "transformers", "numpy", "pandas", "accelerate"}
assert not drawn, f"the library alone draws {sorted(drawn)}"
ended = subprocess.run([sys.executable, "-m", "cntlora", "--help"], capture_output=True, text=True)
assert ended.returncode == 1 and "pip install 'cntlora[cli]'" in ended.stderr, ended.stderr
print(f"cntlora {cntlora.__version__} alone, with {len(names)} packages: imported")
"""

EXAMPLE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(**sizes))
rows = [torch.randint(0, 50, (2, 12)) for _ in range(8)]
loader = [{"input_ids": r, "attention_mask": torch.ones_like(r), "labels": r} for r in rows]
"""


def check_archives(wheel: Path, sdist: Path) -> None:
    """Check that both hold the package, its data and the licence, and nothing of the repository around it."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert all(name in names for name in NEEDED), f"{wheel.name} lacks one of {NEEDED}"
    assert any(name.endswith("licenses/LICENSE") for name in names), f"{wheel.name} lacks the licence"
    assert all(name.startswith(("cntlora/", "cntlora-")) for name in names), f"{wheel.name} holds other packages"
    with tarfile.open(sdist) as archive:
        members = [name.partition("/")[2] for name in archive.getnames()]
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= set(members), f"{sdist.name} is incomplete"
    for path, inside in ((wheel, names), (sdist, members)):
        found = [name for name in inside if UNWANTED.search(name)]
        assert not found, f"{path.name} holds {found[0]} and {len(found) - 1} more"
        assert path.stat().st_size < MIB, f"{path.name} has {path.stat().st_size / MIB:.1f} MiB, expected less than 1"
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, {len(inside)} entries")


def readme_example() -> str:
    """The lines of README.md's first example, which a test of README.md finds by the same mark."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- runnable: readme -->\n```python\n(.*?)```", text, re.DOTALL)
    return str(block)


def run(command: Iterable[object], folder: Path) -> str:
    """Return what a command prints; an error if it fails."""
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))[:200]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def main(folder: Path) -> None:
    """Check the archives in a folder and what the wheel does once it is installed."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_archives(wheel, sdist)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        run([sys.executable, "-m", "venv", home / "venv"], home)
        python = home / "venv" / "bin" / "python"
        install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt"]
        run([*install, wheel], home)
        print(run([python, "-c", ALONE], home), end="")
        run([*install, f"{wheel}[cli,peft]"], home)
        shown = run([python, "-W", "ignore", "-c", EXAMPLE + readme_example()], home)
        assert "q_proj" in shown and (home / "adapter" / "adapter_model.safetensors").is_file(), shown
        print("README.md's example: ran")
        shown = run([home / "venv" / "bin" / "cntlora", "inspect", "adapter"], home)
        assert "q_proj" in shown, shown
        print("cntlora inspect adapter: ran")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
