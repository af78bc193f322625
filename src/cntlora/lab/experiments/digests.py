"""Digests of a user's files, by which a record tells one user's data from another's and notices a change."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet")


def data_digests(settings: Any) -> dict[str, str | None]:
    """Return the digests of `data` and of every field whose name ends with "_data", under the name with "_sha256".

    None where nothing is given, or a name (a hub data set, "sample:tweets") that is no path here.

    Raises:
        FileNotFoundError: for what must be a path and is not there.
    """
    names = [f.name for f in fields(settings) if f.name.endswith("_data")]
    return {f"{name}_sha256": _digest(name, getattr(settings, name, None)) for name in ("data", *names)}


def _digest(name: str, data: Any) -> str | None:
    if not isinstance(data, str):
        return None
    path = Path(data).expanduser()
    if path.is_dir():
        return _digest_of_folder(path)
    if path.is_file():
        return _digest_of_file(path.resolve(), path.stat().st_mtime_ns)
    if data.endswith((*_SUFFIXES, "/")) or data.startswith(("/", "./", "../", "~")):
        raise FileNotFoundError(f"task.{name}: there is no file or folder {data}, seen from the working directory")
    return None


def _digest_of_folder(folder: Path) -> str:
    """Digest of the relative paths and sizes: reading thousands of images for every run would take too long."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@cache
def _digest_of_file(path: Path, modified: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
