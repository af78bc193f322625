"""Runs the notebooks and stores what they show: `make notebooks`.

    python benchmarks/notebooks.py                       # all, in notebooks/
    python benchmarks/notebooks.py quickstart vision --tiny --check   # random models; nothing is stored

Each runs in a folder of its own, so that what it writes does not lie about. The seconds are printed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
SECONDS = 3600


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
    for cell in notebook.cells:
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
    options = parser.parse_args()
    for path in [FOLDER / f"{name}.ipynb" for name in options.names] or sorted(FOLDER.glob("*.ipynb")):
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder), options.tiny)
        if not options.check:
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.monotonic() - begun:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
