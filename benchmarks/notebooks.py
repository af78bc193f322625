"""Runs the notebooks and stores what they show: `make notebooks`.

    python benchmarks/notebooks.py                       # all, in notebooks/
    python benchmarks/notebooks.py quickstart vision --tiny --check   # random models; nothing is stored
    python benchmarks/notebooks.py --links               # only how each opens on Colab and installs cntlora

Each runs in a folder of its own, so that what it writes does not lie about. The seconds are printed. How it opens on
Colab follows from `Repository` in pyproject.toml, the address of the repository on GitHub.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
SECONDS = 3600
COLAB = "https://colab.research.google.com/github/"
"""Colab's page of repositories; followed by one and a file it opens that."""
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"
HERE = "**To run it**: in a clone of the repository, `pip install '.[{extras}]' ipykernel` and open this file. "
PUBLIC = "On Colab, press the button above. The next cell installs cntlora where it is missing."
PRIVATE = (
    "On Colab, press the button above and give the address of your repository, or choose *File → Upload notebook*. The "
    "next cell installs cntlora where it is missing. Until a release is on PyPI, build the wheel in a clone "
    "(`make dist`), upload `dist/cntlora-….whl` to Colab, and write its name in place of `cntlora`."
)


def repository() -> str | None:
    """Address of the repository on GitHub, if pyproject.toml has one."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return urls.get("Repository")


def linked(notebook: Any, name: str, address: str | None) -> Any:
    """The notebook as it opens on Colab and installs cntlora from a repository; every other cell as it is.

    Args:
        notebook: has a badge and the lines to run it in its first cell, and the installation in its second.
        name: of its file, without .ipynb.
        address: of the repository on GitHub; without one the reader gives it.
    """
    first, install = notebook.cells[:2]
    extras = re.search(r'%pip install --quiet "cntlora\[([\w,]+)\]', install.source)[1]
    place = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", address or "")
    if address and not place:
        raise ValueError(f"pyproject.toml: Repository: expected https://github.com/OWNER/NAME, got {address}")
    link = f"{COLAB}{place[1]}/blob/main/notebooks/{name}.ipynb" if place else COLAB
    source = re.sub(r"\[!\[Open in Colab\].*", BADGE.format(link=link), first.source)
    how = HERE.format(extras=extras) + (PUBLIC if place else PRIVATE)
    first.source = re.sub(r"\*\*To run it\*\*:.*", how, source, flags=re.DOTALL)
    package = f"cntlora[{extras}]" + (f" @ git+https://github.com/{place[1]}" if place else "")
    install.source = re.sub(r'(%pip install --quiet) ".*"', rf'\1 "{package}"', install.source)
    return notebook


def executed(path: Path, folder: Path, tiny: bool = False) -> Any:
    """The notebook with its outputs, run in `folder`.

    Raises:
        CellExecutionError: with the cell and its traceback.
    """
    os.environ["CNTLORA_NOTEBOOK"] = "tiny" if tiny else ""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources, record_timing=False)
    client.execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{path.stem}-{number}"
        cell.metadata.clear()
        if cell.cell_type == "code":  # warnings of libraries name folders of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks, without .ipynb; all if none is named")
    parser.add_argument("--tiny", action="store_true", help="random models and made-up data")
    parser.add_argument("--check", action="store_true", help="store nothing")
    parser.add_argument("--links", action="store_true", help="run nothing")
    options = parser.parse_args()
    for path in [FOLDER / f"{name}.ipynb" for name in options.names] or sorted(FOLDER.glob("*.ipynb")):
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            read = nbformat.read(path, as_version=4)
            notebook = read if options.links else executed(path, Path(folder), options.tiny)
        if not options.check:
            nbformat.write(linked(notebook, path.stem, repository()), path)
        print(f"{path.name}: {time.monotonic() - begun:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
