"""Studies: records of runs grouped over seeds, and each method's best learning rate."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from ..record import SCHEMA, RunRecord, SiteFacts, check_required
from ..run_table import SUFFIX, read_table
from .methods import order_key, ordered

MEAN_LOSS = "mean_loss"
MAIN = "main"  # as a criterion: each study's own main metric
_ADVICE = "remove it and run that arm again"


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds, sample standard deviation (None with fewer than two values), and how many values there were."""

    mean: float | None
    spread: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[Any]) -> Estimate:
        """Estimate over the values that are finite numbers; the others are left out."""
        known = [v for v in map(finite, values) if v is not None]
        return cls(mean(known) if known else None, stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True)
class Group:
    """The runs of one method at one learning rate, one a seed."""

    method: str
    learning_rate: float
    runs: tuple[RunRecord, ...]

    @property
    def finished(self) -> tuple[RunRecord, ...]:
        """The runs that went to their end."""
        return tuple(run for run in self.runs if run["status"] == "finished")

    @property
    def whole(self) -> bool:
        """Return whether no seed diverged or failed."""
        return len(self.finished) == len(self.runs)

    def estimate(self, key: str) -> Estimate:
        """Estimate a number of the record, such as "mean_loss" or "init_seconds", over the finished runs."""
        return Estimate.of(run.get(key) for run in self.finished)

    def pairs(self, other: Group) -> list[tuple[RunRecord, RunRecord]]:
        """The finished runs of both groups by seed: in a difference what the seeds share drops out."""
        theirs = {run["seed"]: run for run in other.finished}
        return [(run, theirs[run["seed"]]) for run in self.finished if run["seed"] in theirs]

    def against(self, other: Group) -> Estimate:
        """Mean training loss minus that of another group's run with the same seed."""
        losses = [(mine.get("mean_loss"), its.get("mean_loss")) for mine, its in self.pairs(other)]
        return Estimate.of(a - b for a, b in losses if a is not None and b is not None)

    def final(self, metric: str) -> Estimate:
        """Estimate a held-out metric at the last evaluation, over the finished runs."""
        return Estimate.of(final_metric(run, metric) for run in self.finished)

    def value(self, key: str) -> Estimate:
        """Estimate the mean training loss ("mean_loss") or of a held-out metric at the last evaluation."""
        return self.estimate(key) if key == MEAN_LOSS else self.final(key)

    def over_sites(self, key: str, over: str | None = None, kind: str | None = None) -> Estimate:
        """Estimate the mean over sites (of one `kind`) of a site's `key`, or of `key` divided by the site's `over`."""
        return Estimate.of(_site_mean(run, key, over, kind) for run in self.finished)


@dataclass(frozen=True)
class Study:
    """All runs of one experiment on one task.

    Attributes:
        name: the experiment, with the task where that has another name.
        groups: by method in the paper's order, then by learning rate.
        labels: method → what tables and legends call it.
        metrics: held-out metric → "min" or "max".
        main_metric: the one that stands for the task, or None without metrics.
        criterion: what the best learning rate has the best of: "mean_loss" or a metric's name.
        best: method → its group at the best learning rate, in the paper's order.
    """

    name: str
    groups: tuple[Group, ...]
    labels: Mapping[str, str]
    metrics: Mapping[str, str]
    main_metric: str | None
    criterion: str
    best: Mapping[str, Group]

    @property
    def runs(self) -> tuple[RunRecord, ...]:
        """All records, in the order of `groups`."""
        return tuple(run for group in self.groups for run in group.runs)

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """All learning rates that any method was run at, rising."""
        return tuple(sorted({group.learning_rate for group in self.groups}))

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds that any method was run with, rising."""
        return tuple(sorted({run["seed"] for run in self.runs}))

    @property
    def repeated(self) -> bool:
        """Return whether there are several seeds, without which a difference may be chance."""
        return len(self.seeds) > 1

    def way(self, key: str) -> str:
        """Return whether less ("min") or more ("max") of the mean training loss or of a held-out metric is better."""
        return "min" if key == MEAN_LOSS else self.metrics.get(key, "min")


def load_records(source: Path) -> list[RunRecord]:
    """Read all run records of a folder, or of a packed table, sorted by what they are of.

    Args:
        source: a table that `cntlora results pack` wrote, or a folder: of it and its subfolders every table and every
            *.json with `schema` 1 and a `method` is read.

    Returns:
        The records, each with the folder of its file as `folder`: what its samples' files are relative to.

    Raises:
        ValueError: there is no such folder or table, it holds no record, a file is broken, a record lacks what
            identifies it or was changed after it was written, or two records are of the same run. Names the file.
    """
    source = Path(source)
    if not source.is_dir() and source.suffix != SUFFIX:
        raise ValueError(f"{source} is no folder; give the folder that the records of the runs are in, or their table")
    found: dict[tuple[Any, ...], tuple[Path, RunRecord]] = {}
    for path, record in _records_below(source):
        key = record_key(record)
        if key in found:
            raise ValueError(f"{path} and {found[key][0]} are records of the same run; remove one of them")
        found[key] = (path, record)
    if not found:
        raise ValueError(f"no run record in {source}; expected *.json files with schema {SCHEMA} and a method")
    return [found[key][1] for key in sorted(found)]


def _records_below(source: Path) -> Iterator[tuple[Path, RunRecord]]:
    """Every record of a table or a folder, with its file."""
    if not source.is_dir():
        yield from ((source, record) for record in read_table(source))
        return
    for path in sorted(source.rglob("*.json")):
        if (record := _read(path)) is not None:
            yield path, {**record, "folder": str(path.parent)}
    for path in sorted(source.rglob(f"*{SUFFIX}")):
        yield from ((path, record) for record in read_table(path))


def record_key(record: RunRecord) -> tuple[Any, ...]:
    """Return what a record is of, sortable: experiment, task, method, learning rate, seed."""
    method = str(record["method"])
    task = str(record.get("task") or "")
    return (str(record["experiment"]), task, order_key(method), float(record["learning_rate"]), int(record["seed"]))


def studies(records: Iterable[RunRecord], criterion: str = MEAN_LOSS) -> list[Study]:
    """The records by experiment and task, each with its best learning rates.

    Args:
        criterion: "mean_loss" (training loss, mean over all steps), a held-out metric at the last evaluation, or
            "main": each study's own main metric. A learning rate's value is the mean over seeds; the best one wins,
            the smaller learning rate in a tie; one at which any seed diverged or failed never beats a whole one, and
            one with fewer seeds than another of the method does not compete.

    Raises:
        ValueError: a study has no metric of the name `criterion`.
    """
    by_study: dict[tuple[str, str], list[RunRecord]] = {}
    for record in sorted(records, key=record_key):
        by_study.setdefault(record_key(record)[:2], []).append(record)
    experiments = [experiment for experiment, _ in by_study]
    found = []
    for (experiment, task), runs in by_study.items():
        # the task tells studies apart where one experiment has several
        name = experiment if experiments.count(experiment) == 1 else f"{experiment} · {task}"
        found.append(_study(name, runs, criterion))
    return found


def finite(value: Any) -> float | None:
    """The value as a number, or None for null, NaN and infinity."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def final_metric(record: RunRecord, metric: str) -> float | None:
    """A held-out metric at the last evaluation."""
    evaluations = record.get("evaluations") or ()
    return finite(evaluations[-1].get(metric)) if evaluations else None


def start_loss(record: RunRecord, when: Literal["loss_before", "loss_after"]) -> float | None:
    """The loss of the first training batch, before or after the initialisation."""
    start = record.get("start")
    return finite(start.get(when)) if start else None


def sites_of(record: RunRecord, kind: str | None = None) -> list[SiteFacts]:
    """The sites of a record (of one kind); none for full fine-tuning, failed runs and older records."""
    sites = (record.get("sites") or {}).values()
    return [site for site in sites if kind in (None, kind_of(site))]


def kind_of(site: SiteFacts) -> str:
    """Return what a site projects to, "other" where the record does not say."""
    return str(site.get("kind") or "other")


def kinds(groups: Iterable[Group]) -> list[str]:
    """The kinds of projection that have sites: query, key, value, out, then the others by name."""
    first = ("query", "key", "value", "out")
    found = {kind_of(site) for group in groups for run in group.runs for site in sites_of(run)}
    return [kind for kind in first if kind in found] + sorted(found - set(first))


def _read(path: Path) -> RunRecord | None:
    """The record in a JSON file; None where it is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no whole JSON file ({error}); {_ADVICE}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or "method" not in content:
        return None
    return check_required(path, content, _ADVICE)


def _study(name: str, runs: Sequence[RunRecord], criterion: str) -> Study:
    by_group: dict[tuple[str, float], list[RunRecord]] = {}
    for run in runs:
        by_group.setdefault((str(run["method"]), float(run["learning_rate"])), []).append(run)
    groups = tuple(Group(method, rate, tuple(same)) for (method, rate), same in by_group.items())
    metrics = {name: way for run in runs for name, way in (run.get("metrics") or {}).items()}
    main = next((run["main_metric"] for run in runs if run.get("main_metric") in metrics), next(iter(metrics), None))
    criterion = main or MEAN_LOSS if criterion == MAIN else criterion
    if criterion != MEAN_LOSS and criterion not in metrics:
        known = ", ".join([MEAN_LOSS, MAIN, *metrics])
        raise ValueError(f"{name} has no {criterion!r} to choose by; expected one of {known}")
    best = {
        method: min(_fullest(groups, method), key=lambda g: _badness(g, criterion, metrics))
        for method in ordered(group.method for group in groups)
    }
    return Study(name, groups, _labels(best, runs), metrics, main, criterion, best)


def _fullest(groups: Iterable[Group], method: str) -> list[Group]:
    """A method's groups that have the most seeds: one that has fewer may only have had the easier ones."""
    own = [group for group in groups if group.method == method]
    return [group for group in own if len(group.runs) == max(len(other.runs) for other in own)]


def _badness(group: Group, criterion: str, metrics: Mapping[str, str]) -> tuple[bool, float, float]:
    """Sort learning rates: whole before broken, then the better mean, then the smaller learning rate."""
    value = group.value(criterion).mean
    sign = -1.0 if metrics.get(criterion) == "max" and criterion != MEAN_LOSS else 1.0
    return not group.whole, math.inf if value is None else sign * value, group.learning_rate


def _labels(methods: Iterable[str], runs: Sequence[RunRecord]) -> dict[str, str]:
    """Return the label of each method; with its own name added where two methods would be called the same."""
    found = {m: next((str(r["label"]) for r in runs if r["method"] == m and r.get("label")), m) for m in methods}
    calls = list(found.values())
    return {method: label if calls.count(label) == 1 else f"{label} ({method})" for method, label in found.items()}


def _site_mean(run: RunRecord, key: str, over: str | None, kind: str | None) -> float | None:
    values = []
    for site in sites_of(run, kind):
        value = finite(site.get(key))
        divisor = 1.0 if over is None else finite(site.get(over))
        if value is not None and divisor:
            values.append(value / divisor)
    return mean(values) if values else None
