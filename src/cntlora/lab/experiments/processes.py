"""The processes of a sweep: one a run, started cheaply, and every way in which one can end is told apart."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import Any

import torch

from ..record import RunRecord, read_record, write_record
from .environment import machine
from .runs import Run, failed, path_of, remove_checkpoints

UNWRITTEN = 74
"""Exit code of a process that could not write its record (EX_IOERR of sysexits.h)."""

UNKNOWN = dict.fromkeys(("processor", "threads", "device"))
"""The machine of a run whose process said nothing."""

RunFunction = Callable[[Run, Path], RunRecord]
"""Makes the record of a run; the folder is that of the records."""


@dataclass
class _Running:
    run: Run
    process: Any
    before: tuple[int, int] | None  # which file was there when it began


@dataclass
class Pool:
    """Keeps processes busy, one a run.

    Attributes:
        out: folder of the records.
        jobs: processes side by side.
        function: makes the record of a run; None for `run.run_kept`.
        ended: called with the record of every run that has ended.
    """

    out: Path
    jobs: int
    function: RunFunction | None
    ended: Callable[[RunRecord], None]

    def work(self, pending: list[Run]) -> None:
        """Run all; on any exception (Ctrl-C above all) its processes are ended."""
        context, threads = _context(self.function), max(1, cores() // self.jobs)
        running: list[_Running] = []
        try:
            while pending or running:
                while pending and len(running) < self.jobs:
                    running.append(self._start(context, pending.pop(0), threads))
                connection.wait([one.process.sentinel for one in running])
                for one in [one for one in running if not one.process.is_alive()]:
                    running.remove(one)
                    self.ended(self._record(one))
        finally:
            for one in running:
                _end(one.process)

    def _start(self, context: Any, run: Run, threads: int) -> _Running:
        path = path_of(self.out, run)
        before = _identity(path)
        process = context.Process(target=_child, args=(run, path, threads, self.function), daemon=True)
        process.start()
        return _Running(run, process, before)

    def _record(self, one: _Running) -> RunRecord:
        """Return the record of a process that is gone: what it wrote, or the reason why it wrote nothing."""
        one.process.join()
        path = path_of(self.out, one.run)
        if _identity(path) in (None, one.before):
            write_record(path, failed(one.run, UNKNOWN, _reason(one.process.exitcode)))
        return read_record(path)


def _context(function: RunFunction | None) -> Any:
    """Forks of a server that has imported the libraries start at once; where there are none, fresh interpreters."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # this module is named too: the server may not find another one, since it ignores changes of sys.path
    context.set_forkserver_preload([_FIRST, __name__, *(_PRELOADED if function is None else [function.__module__])])
    # Ctrl-C reaches all processes of a terminal; the server would end in a traceback while it imports
    resource_tracker.ensure_running()  # first, since it lets the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


_FIRST = "cntlora.lab.experiments.server"
_PRELOADED = ("cntlora.lab.experiments.run", "cntlora.lab.recipes.trainer", "cntlora.lab.recipes.loading")


def cores() -> int:
    """Cores that this process may use: no more than OMP_NUM_THREADS, where it is set, as everywhere else in torch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(limit)) if limit.isdecimal() and int(limit) else cores


def _identity(path: Path) -> tuple[int, int] | None:
    """Tell whether a file has been replaced."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _reason(exitcode: int | None) -> str:
    """Return why a process ended without a record."""
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{hint}"
    if exitcode == UNWRITTEN:
        return "its record could not be written; is the disk full?"
    return f"the process ended with exit code {exitcode} and without a record"


def _end(process: Any) -> None:
    process.terminate()
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()


def record_of(run: Run, out: Path, threads: int, function: RunFunction | None) -> RunRecord:
    """Make the record of a run in a process that is its own, whatever Python can still say.

    Args:
        run: what to run.
        out: folder of the records.
        threads: of torch.
        function: makes the record; None for `run.run_kept`.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one more pool of threads beside torch's
    warnings.simplefilter("ignore", FutureWarning)  # of the libraries, which a user of the command cannot mend
    torch.set_num_threads(threads)
    try:
        make = function or _run_one()
        gc.freeze()  # collections, which the trainer asks for, need not walk through a million objects of the libraries
        return make(run, out)
    except Exception as error:
        return failed(run, machine(), f"{type(error).__name__}: {error}", traceback.format_exc())


def _child(run: Run, path: Path, threads: int, function: RunFunction | None) -> None:
    """Run in the process of a run: write its record."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the sweep ends this one
    _die_with_parent()
    record = record_of(run, path.parent, threads, function)
    try:
        write_record(path, record)
    except OSError:
        sys.exit(UNWRITTEN)
    remove_checkpoints(path.parent, run, record)  # only now: killed in between, it would have to begin anew


def _run_one() -> RunFunction:
    from .run import run_kept

    return run_kept


def _die_with_parent() -> None:
    """End this process when the sweep is gone, also after SIGKILL, so that no run goes on unseen."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
