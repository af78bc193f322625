"""The two rounds of a sweep: every learning rate on the lowest seed, then the other seeds at the best few of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from .runs import Run

RecordOf = Callable[[Run], Mapping[str, Any] | None]


def runs_of_round(runs: Sequence[Run], best: int, record_of: RecordOf) -> tuple[list[Run], int]:
    """The runs that can be told by now, and how many more there will be.

    Args:
        runs: the whole grid.
        best: learning rates of a method that its other seeds are run at, those of the lowest mean training
            loss on the lowest; 0 for all.
        record_of: the record of a run, None where there is none yet.

    Returns:
        The runs in their order, and the number of those that depend on records which are not there yet.
    """
    if not best:
        return list(runs), 0
    kept: set[str] = set()
    later = 0
    for _, group in groupby(sorted(runs, key=lambda run: run.method), key=lambda run: run.method):
        own = list(group)  # `runs_of` has the lowest seed first, and sorting is stable
        first = [run for run in own if run.seed == own[0].seed]
        records = [record_of(run) for run in first]
        kept.update(run.name for run in first)
        if any(record is None for record in records):
            later += min(best, len(first)) * len({run.seed for run in own[len(first) :]})
            continue
        losses = {
            run.learning_rate: record["mean_loss"]
            for run, record in zip(first, records, strict=True)
            if record is not None and record["status"] == "finished" and record["mean_loss"] is not None
        }
        rates = sorted(losses, key=lambda rate: losses[rate])[:best]
        kept.update(run.name for run in own if run.learning_rate in rates)
    return [run for run in runs if run.name in kept], later
