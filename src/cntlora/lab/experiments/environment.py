"""The environment of a run, for its record: versions, the commit, the machine; and texts without the folders of it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...version import VERSION


@cache
def versions() -> dict[str, str]:
    """Versions of cntlora and of what the outcome depends on; "missing" for what is not installed."""
    found = {"cntlora": VERSION}
    for name in ("torch", "peft", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return {**found, "python": platform.python_version()}


@cache
def git_state() -> str:
    """The commit of the code, "-dirty" behind it if files differ from it; "unknown" outside a checkout."""
    if _git("ls-files", "--error-unmatch", "version.py") is None:
        return "unknown"
    return _git("describe", "--always", "--dirty", "--exclude=*") or "unknown"


def _git(*arguments: str) -> str | None:
    """Return what a git command says in the folder of the package; None if it fails."""
    folder, environment = Path(__file__).resolve().parents[2], {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return None if done.returncode else done.stdout.strip()


def machine() -> dict[str, Any]:
    """Describe the machine of this process: the CPU's name, threads, and "cpu" or the GPU's name."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"processor": _processor(), "threads": torch.get_num_threads(), "device": device}


@cache
def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.M)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine() or "unknown"


def without_places(text: str) -> str:
    """A message without the folders of this machine: those of the code, of the temporary files and of the user."""
    code = sorted({path for path in sys.path if len(path) > 1}, key=len, reverse=True)
    for folder in (*code, Path.cwd(), tempfile.gettempdir()):
        text = text.replace(f"{folder}{os.sep}", "")
    return text.replace(str(Path.home()) + os.sep, f"~{os.sep}")
