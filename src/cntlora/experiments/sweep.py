"""A sweep: every run in a process of its own, `jobs` side by side; it goes on where it stopped, and nothing ends it.

A run that crashes, is killed for its memory or ends in a segmentation fault leaves a record with status "failed", and
the sweep goes on. Records appear whole or not at all, so a sweep may be killed at any moment and started again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from .records import Run, check_record, failed, machine, read_record, remove_leftovers, runs_of, write_record
from .settings import Experiment

RunFunction = Callable[[Run], dict[str, Any]]
Listener = Callable[["Sweep", dict[str, Any]], None]


@dataclass(frozen=True)
class Todo:
    """The runs of an experiment by what is to happen to them.

    Attributes:
        pending: to be run.
        present: records that are there already.
    """

    pending: Sequence[Run]
    present: Sequence[dict[str, Any]]


@dataclass
class Sweep:
    """Where a sweep stands.

    Attributes:
        total: runs to be done now, without those that had a record before.
        records: of the runs done now, in the order in which they ended.
        present: records that were there before.
        jobs: processes side by side.
        began: clock at the start, seconds.
    """

    total: int
    present: Sequence[dict[str, Any]]
    jobs: int
    began: float = field(default_factory=time.perf_counter)
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    @property
    def remaining(self) -> float | None:
        """Seconds to go, by the mean so far; None before the first run has ended."""
        done = len(self.records)
        return self.elapsed / done * (self.total - done) if done else None

    def count(self, status: str) -> int:
        """Records of a status among those done now."""
        return sum(record["status"] == status for record in self.records)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        counts = {status: self.count(status) for status in ("finished", "diverged", "failed")}
        return {"runs": self.total, **counts, "present": len(self.present), "seconds": self.elapsed}


def plan_sweep(experiment: Experiment, out: Path, *, retry_failed: bool = False, replace: bool = False) -> Todo:
    """What a sweep would run, and what has a record.

    Args:
        experiment: gives the runs.
        out: folder of the records.
        retry_failed: run again what failed.
        replace: run again what has a record of other settings, or of another schema, instead of raising.

    Raises:
        ValueError: if a file is no record, or of other settings; names the file and the setting.
    """
    pending, present = [], []
    for run in runs_of(experiment):
        record = _present(path_of(out, run), run, replace)
        if record is None or (retry_failed and record["status"] == "failed"):
            pending.append(run)
        else:
            present.append(record)
    return Todo(pending, present)


def path_of(out: Path, run: Run) -> Path:
    """The file of a run's record."""
    return out / f"{run.name}.json"


def _present(path: Path, run: Run, replace: bool) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        record = read_record(path)
        check_record(path, record, run)
    except ValueError:
        if replace:
            return None
        raise
    return record


def run_sweep(
    experiment: Experiment,
    out: Path,
    *,
    jobs: int = 1,
    retry_failed: bool = False,
    replace: bool = False,
    listener: Listener | None = None,
    run: RunFunction | None = None,
) -> Sweep:
    """Runs what has no record yet and writes one record a run.

    Args:
        experiment: what to run.
        out: folder of the records, made if missing; locked while the sweep runs.
        jobs: processes side by side, each with cores // jobs threads.
        retry_failed, replace: see `plan_sweep`.
        listener: called after every run with the state of the sweep and the record.
        run: makes the record of a run, in its own process; a function that can be imported. Default: `run.run_one`.

    Returns:
        The state at the end.

    Raises:
        ValueError: see `plan_sweep`; or `jobs` under 1.
        RuntimeError: if another sweep runs in this folder.
        KeyboardInterrupt: after the processes have been ended; finished records stay.
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}")
    with locked(out):
        remove_leftovers(out)
        todo = plan_sweep(experiment, out, retry_failed=retry_failed, replace=replace)
        sweep = Sweep(len(todo.pending), todo.present, jobs)
        if todo.pending:
            _Pool(out, jobs, run, sweep, listener).work(list(todo.pending))
        return sweep


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; the system takes it back when the process ends, however it ends.

    Raises:
        RuntimeError: if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ModuleNotFoundError:  # Windows has no flock; two sweeps there would repeat runs, not break records
            pass
        except OSError as error:
            raise RuntimeError(
                f"{folder}: another sweep is running there; wait for it, or use another --out"
            ) from error
        yield


@dataclass
class _Running:
    run: Run
    process: Any
    before: tuple[int, int] | None  # which file was there when it began


@dataclass
class _Pool:
    """Keeps `jobs` processes busy."""

    out: Path
    jobs: int
    function: RunFunction | None
    sweep: Sweep
    listener: Listener | None

    def work(self, pending: list[Run]) -> None:
        """Runs all; on any exception (Ctrl-C above all) its processes are ended."""
        context, threads = _context(self.function), max(1, _cores() // self.jobs)
        running: list[_Running] = []
        try:
            while pending or running:
                while pending and len(running) < self.jobs:
                    running.append(self._start(context, pending.pop(0), threads))
                connection.wait([one.process.sentinel for one in running])
                for one in [one for one in running if not one.process.is_alive()]:
                    running.remove(one)
                    self._ended(one)
        finally:
            for one in running:
                _end(one.process)
            remove_leftovers(self.out)

    def _start(self, context: Any, run: Run, threads: int) -> _Running:
        path = path_of(self.out, run)
        process = context.Process(target=_child, args=(run, path, threads, self.function), daemon=True)
        process.start()
        return _Running(run, process, _identity(path))

    def _ended(self, one: _Running) -> None:
        """A process that is gone: its record, or the reason why there is none."""
        one.process.join()
        path = path_of(self.out, one.run)
        if _identity(path) in (None, one.before):
            unknown = dict.fromkeys(("processor", "threads", "device"))
            write_record(path, failed(one.run, unknown, _reason(one.process.exitcode)))
        record = read_record(path)
        self.sweep.records.append(record)
        if self.listener:
            self.listener(self.sweep, record)


def _context(function: RunFunction | None) -> Any:
    """Forks of a server that has imported the libraries start at once; where there are none, fresh interpreters."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # this module is named too: the server may not find another one, since it ignores changes of sys.path
    context.set_forkserver_preload([__name__, f"{__package__}.run" if function is None else function.__module__])
    return context


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _identity(path: Path) -> tuple[int, int] | None:
    """Tells whether a file has been replaced."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _reason(exitcode: int | None) -> str:
    """Why a process ended without a record."""
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{hint}"
    return f"the process ended with exit code {exitcode} and without a record"


def _end(process: Any) -> None:
    process.terminate()
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()


def _child(run: Run, path: Path, threads: int, function: RunFunction | None) -> None:
    """In the process of a run: writes its record, whatever Python can still say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the sweep ends this one
    _die_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one more pool of threads beside torch's
    warnings.simplefilter("ignore", FutureWarning)  # of the libraries, which a user of the command cannot mend
    torch.set_num_threads(threads)
    try:
        if function is None:
            from .run import run_one as function
        record = function(run)
    except Exception as error:
        record = failed(run, machine(), f"{type(error).__name__}: {error}", traceback.format_exc())
    write_record(path, record)


def _die_with_parent() -> None:
    """Ends this process when the sweep is gone, also after SIGKILL, so that no run goes on unseen."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
