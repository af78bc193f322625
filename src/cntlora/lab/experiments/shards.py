"""The part of a sweep that a process runs, and the lock that keeps another process from running the same."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no flock; two sweeps there would repeat runs, not break records
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One of several parts of a sweep, each run by a process of its own, on any machine that sees the folder.

    Attributes:
        number: of the part, from 1.
        count: of the parts.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ValueError(f"--shard: expected 1/{self.count} to {self.count}/{self.count}, got {self}")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "3/16", the third of 16 parts.

        Raises:
            ValueError: if the text is none of that form, or the number is out of range.
        """
        found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if not found or not int(found[2]):
            raise ValueError(f"--shard: expected NUMBER/COUNT such as 3/16, the third of 16 parts, got {text!r}")
        return cls(int(found[1]), int(found[2]))

    def of(self, runs: Sequence[T]) -> Sequence[T]:
        """Return this part of the runs: every `count`-th, so that each part has some of every seed."""
        return runs[self.number - 1 :: self.count]


@contextmanager
def locked(folder: Path, shard: Shard | None = None) -> Iterator[None]:
    """Hold the lock of a folder; the system takes it back when the process ends, however it ends.

    A whole sweep excludes every other one. A shard excludes whole sweeps and the same shard.

    Raises:
        RuntimeError: if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        held.enter_context(_flock(folder, folder, shared=shard is not None))
        if shard is not None:
            file = folder / f".shard-{shard.number}-of-{shard.count}.lock"
            file.touch()
            held.enter_context(_flock(file, folder))
        yield


@contextmanager
def _flock(path: Path, folder: Path, *, shared: bool = False) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    # the folder itself is locked, so that no file of ours lies among the records; a file has to be open for writing,
    # or NFS refuses the lock
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise RuntimeError(f"{folder}: another sweep is running there; wait for it, or use another --out") from error
    except OSError:
        pass  # a file system that locks no folders, as NFS
    try:
        yield
    finally:
        os.close(handle)
