"""A sweep: every run in a process of its own, `jobs` side by side; it goes on where it stopped, and nothing ends it.

A run that crashes, is killed for its memory or ends in a segmentation fault leaves a record with status "failed", and
the sweep goes on. Records appear whole or not at all, so a sweep may be killed at any moment and started again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...atomic import remove_leftovers
from ..recipes.trackers import check_trackers
from ..record import RunRecord, read_record
from .cluster import Cluster, ClusterRuns
from .processes import Pool, RunFunction
from .rounds import runs_of_round
from .runs import Run, check_record, path_of, remove_checkpoints, runs_of
from .settings import Experiment
from .shards import Shard, locked
from .tasks import make_task
from .user_data import check_first

Listener = Callable[["Sweep", RunRecord], None]


@dataclass(frozen=True)
class Todo:
    """The runs of an experiment by what is to happen to them.

    Attributes:
        pending: to be run.
        present: records that are there already.
        done: their runs.
        later: how many more there will be once those of the first seed are there, see `runs_of_round`.
    """

    pending: Sequence[Run]
    present: Sequence[RunRecord]
    done: Sequence[Run] = ()
    later: int = 0


@dataclass
class Sweep:
    """State of a sweep.

    Attributes:
        total: runs to be done now, without those that had a record before; with `[sweep] best` at most so many.
        records: of the runs done now, in the order in which they ended.
        later: at the end, runs of a shard that wait for what other shards have not done yet; see `runs_of_round`.
        present: records that were there before.
        jobs: processes side by side.
        began: clock at the start, seconds. ended: the same for each of `records`.
    """

    total: int
    present: Sequence[RunRecord]
    jobs: int
    began: float = field(default_factory=time.perf_counter)
    records: list[RunRecord] = field(default_factory=list)
    later: int = 0
    ended: list[float] = field(default_factory=list)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    @property
    def remaining(self) -> float | None:
        """Seconds to go; None before the first run has ended.

        By the pace since as many runs had ended as go side by side, so that the imports of the start do not count;
        until then by the runs' own seconds.
        """
        done, left = len(self.records), self.total - len(self.records)
        if not done:
            return None
        if done > self.jobs and len(self.ended) == done:
            return (time.perf_counter() - self.ended[self.jobs - 1]) / (done - self.jobs) * left
        own = [(record["init_seconds"] or 0.0) + (record["train_seconds"] or 0.0) for record in self.records]
        return sum(own) / done * left / self.jobs

    def count(self, status: str) -> int:
        """Records of a status among those done now."""
        return sum(record["status"] == status for record in self.records)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        counts = {status: self.count(status) for status in ("finished", "diverged", "failed")}
        return {"runs": self.total, **counts, "present": len(self.present), "seconds": self.elapsed}


def plan_sweep(
    experiment: Experiment,
    out: Path,
    *,
    retry_failed: bool = False,
    replace: bool = False,
    shard: Shard | None = None,
) -> Todo:
    """Return the runs of a sweep that are to be made, and those that have a record.

    Args:
        experiment: gives the runs.
        out: folder of the records.
        retry_failed: run again what failed.
        replace: run again what has a record of other settings, or of another schema, instead of raising.
        shard: the part of the runs to look at; None for all.

    Raises:
        ValueError: if a file is no record, or of other settings; names the file and the setting.
    """
    grid = runs_of(experiment)
    known = {run.name: _present(path_of(out, run), run, replace) for run in grid}
    runs, later = runs_of_round(grid, experiment.sweep.best, lambda run: known[run.name])
    if shard is not None:  # parts of the grid, not of the round, so that a run stays in its part
        own = {run.name for run in shard.of(grid)}
        runs, later = [run for run in runs if run.name in own], -(-later // shard.count)
    pending, present, done = [], [], []
    for run in runs:
        record = known[run.name]
        if record is None or (retry_failed and record["status"] == "failed"):
            pending.append(run)
        else:
            present.append(record)
            done.append(run)
    return Todo(pending, present, done, later)


def _present(path: Path, run: Run, replace: bool) -> RunRecord | None:
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
    save_adapters: bool = False,
    shard: Shard | None = None,
    cluster: Cluster | None = None,
    listener: Listener | None = None,
    run: RunFunction | None = None,
    say: Callable[[str], object] | None = None,
    begin: Callable[[Sweep], object] | None = None,
) -> Sweep:
    """Run what has no record yet and write one record a run.

    Args:
        experiment: what to run.
        out: folder of the records, made if missing; locked while the sweep runs.
        jobs: processes side by side, each with cores // jobs threads.
        retry_failed, replace: see `plan_sweep`.
        save_adapters: keep the trained adapter of every run that is done now beside its record.
        shard: the part of the runs to do; others may be done at the same time, by processes that see the folder.
        cluster: where the runs are done instead of on this machine, `jobs` is without a meaning then; None for here.
        listener: called after every run with the state of the sweep and the record.
        run: makes the record of a run, in its own process, from the run and the folder of the records; a function that
            can be imported. Default: `run.run_kept`.
        begin: called before the first run, once the data are checked.
        say: receives a line about the data, such as which class has which index, once they are checked.

    Returns:
        The state at the end.

    Raises:
        ValueError: see `plan_sweep`; `jobs` under 1; or what the task's `check` finds in the user's data.
        RuntimeError: if another sweep, or the same shard, runs in this folder.
        KeyboardInterrupt: after the processes have been ended; finished records stay.
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}")
    with locked(out, shard), _tidied(out, shard):
        todo = plan_sweep(experiment, out, retry_failed=retry_failed, replace=replace, shard=shard)
        for one, record in zip(todo.done, todo.present, strict=True):  # a kill may have left its checkpoints
            remove_checkpoints(out, one, record)
        sweep = Sweep(len(todo.pending) + todo.later, todo.present, jobs)
        if todo.pending:
            check_trackers(experiment.train.report_to)
            task = make_task(experiment.task)
            check_first(experiment, task)  # once instead of in every run
            if say and (line := task.describe()):
                say(line)
            if begin:
                begin(sweep)

        def ended(record: RunRecord) -> None:
            sweep.records.append(record)
            sweep.ended.append(time.perf_counter())
            if listener:
                listener(sweep, record)

        names: set[str] = set()
        while pending := [one for one in todo.pending if one.name not in names]:  # what failed now is not tried again
            names |= {one.name for one in pending}
            pool = ClusterRuns(out, cluster, run, ended) if cluster else Pool(out, jobs, run, ended)
            pool.work([dataclasses.replace(one, save_adapter=save_adapters) for one in pending])
            if todo.later:
                todo = plan_sweep(experiment, out, retry_failed=retry_failed, replace=replace, shard=shard)
        sweep.later = todo.later
        return sweep


@contextmanager
def _tidied(out: Path, shard: Shard | None) -> Iterator[None]:
    """Nothing half-written lies in the folder, before and after; beside other shards each run looks to its own files.

    Another machine may be writing, and a shared file system need not have the locks that tell.
    """
    if shard is None:
        remove_leftovers(out)
    try:
        yield
    finally:
        if shard is None:
            remove_leftovers(out)
