"""Files that appear whole or not at all, however the process that writes them ends; and what a killed one left goes.

What is not whole yet has a hidden name, `.NAME.xxxxxxxx.cntlora`, beside the file NAME that it will be, and is locked
by its writer. The system takes the lock back when a process ends, so that the next writer of NAME tells what a killed
process left from what another one is writing, and removes the former.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no flock: leftovers stay there
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".cntlora"


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name beside `path`, then rename: the old file or the new one, never half of one.

    Raises:
        OSError: if it cannot be written, as on a full disk; names the file, which is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path) as unfinished:
            with unfinished.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            unfinished.chmod(0o644)
            unfinished.replace(path)
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: OSError) -> OSError:
    """The error that names the file and says that nothing is lost; of the same kind and number."""
    told = type(error)(f"{path} could not be written: {error.strerror or error}; what was there is as it was")
    told.errno = error.errno
    return told


@contextmanager
def temporary(path: Path, folder: bool = False) -> Iterator[Path]:
    """A new empty file or folder beside `path`, to be renamed to it; what is left of it afterwards is removed."""
    remove_leftovers(path.parent, path.name)
    unfinished, lock = _locked(_maker(path, folder))
    try:
        yield unfinished
    finally:
        _remove(unfinished)
        if lock is not None:
            os.close(lock)


def remove_leftovers(folder: Path, name: str | None = None) -> int:
    """Remove what processes that were killed while they wrote the file `name`, or any, left in a folder; their number.

    What another process is writing stays.
    """
    if fcntl is None or not folder.is_dir():
        return 0
    of = ".+" if name is None else re.escape(name)
    ours = re.compile(rf"\.{of}\.[a-z0-9_]{{8}}{re.escape(SUFFIX)}")
    removed = 0
    for found in list(folder.iterdir()):
        if ours.fullmatch(found.name):
            with suppress(OSError):  # locked: it is being written; or gone already
                lock = os.open(found, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(found)
                    removed += 1
                finally:
                    os.close(lock)
    return removed


def _maker(path: Path, folder: bool) -> Callable[[], Path]:
    def make() -> Path:
        if folder:
            return Path(tempfile.mkdtemp(SUFFIX, f".{path.name}.", path.parent))
        handle, name = tempfile.mkstemp(SUFFIX, f".{path.name}.", path.parent)
        os.close(handle)
        return Path(name)

    return make


def _locked(make: Callable[[], Path]) -> tuple[Path, int | None]:
    """Return what `make` makes, and the descriptor that holds its lock; None without locks."""
    while True:
        unfinished = make()
        if fcntl is None:
            return unfinished, None
        with suppress(FileNotFoundError):  # another process took it for a leftover before it was locked
            lock = os.open(unfinished, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if unfinished.exists():
                return unfinished, lock
            os.close(lock)


def _remove(unfinished: Path) -> None:
    if unfinished.is_dir():
        shutil.rmtree(unfinished, ignore_errors=True)
    else:
        unfinished.unlink(missing_ok=True)
