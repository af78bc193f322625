"""Tables over a setting: the same methods in experiments that differ by it (tables 3, 5, 7, 10 of the paper)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from ..record import RunRecord
from .formats import DASH, Cell, Column, Row, Table
from .methods import group_of, ordered
from .study import MEAN_LOSS, Estimate, Study
from .tables import BROKEN, metric_name, number_spec, slug

_FIELDS = ("experiment", "task")  # of the record itself; everything else is of its settings
_ABSENT = object()


def tables_by(found: Sequence[Study], key: str) -> list[Table]:
    """Methods by the values of a setting: a table of the main metric, and one of the mean training loss.

    Args:
        found: the studies, as `studies` gives them: each method counts at its best learning rate there.
        key: a setting of the experiment files, such as "lora.rank", "init.num_batches" or "task.data", or "experiment"
            or "task". Studies with the same value are averaged, for the methods that all of them have.

    Raises:
        ValueError: a study has no such setting (with the nearest one), its runs differ by it, or all studies share
            one value.
    """
    by_value: dict[Any, list[Study]] = {}
    for study in found:
        by_value.setdefault(value_of(study, key), []).append(study)
    if len(by_value) == 1:
        value = _words(next(iter(by_value)))
        raise ValueError(f"--by {key}: expected experiments that differ by it, all of them have {value}")
    columns = dict(sorted(by_value.items(), key=lambda pair: _sortable(pair[0])))
    tables = [_table(columns, key, None)] if all(study.main_metric for study in found) else []
    return [*tables, _table(columns, key, MEAN_LOSS)]


def value_of(study: Study, key: str) -> Any:
    """The value of a setting in a study: the one that all its runs that have the setting share; lists become tuples."""
    values = {v for run in study.runs if (v := _value(run, key)) is not _ABSENT and v is not None}
    if not values and any(_value(run, key) is None for run in study.runs):
        return None
    if not values:
        known = sorted({*_FIELDS, *(k for run in study.runs for k in _keys("", run.get("config") or {}))})
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"--by {key}: the runs of {study.name} have no such setting; the nearest is {near}")
    if len(values) > 1:
        listed = ", ".join(sorted(map(_words, values)))
        raise ValueError(f"--by {key}: the runs of {study.name} differ by it ({listed}); expected one value a study")
    return values.pop()


def _table(columns: Mapping[Any, Sequence[Study]], key: str, metric: str | None) -> Table:
    """Methods by value: of one metric, or of each study's main metric (None)."""
    every = [study for same in columns.values() for study in same]
    metrics = {metric or str(study.main_metric) for study in every}
    ways = {study.way(metric or str(study.main_metric)) for study in every}
    methods = ordered(method for study in every for method in study.best)
    values = {(m, v): _estimate(same, m, metric) for m in methods for v, same in columns.items()}
    averaged = metric is None and len(ways) == 1 and any(isinstance(value, str) for value in columns)
    heads = []
    for value, same in columns.items():
        names = {metric or str(study.main_metric) for study in same}
        own = f", {metric_name(names.pop())}" if len(metrics) > 1 and len(names) == 1 else ""
        spec = number_spec(values[method, value] for method in methods)
        heads.append(Column(f"{_words(value)}{own}", "max" if _way(same, metric) == "max" else "min", spec))
    rows = []
    for method in methods:
        cells = [_cell(columns[value], method, values[method, value]) for value in columns]
        rows.append(Row(method, (Cell(_label(every, method)), *cells, *_average(cells, averaged)), group_of(method)))
    heads += [Column("mean", heads[0].direction, max(c.spec for c in heads))] if averaged else []
    what = metric_name(metrics.pop()) if len(metrics) == 1 else "main metric"
    name = f"by-{slug(key)}-{slug(metric or 'main')}"
    title = f"{what[0].upper()}{what[1:]} by {key}"
    caption, ranked = _caption(columns, rows, averaged), any(study.repeated for study in every)
    return Table(name, title, (Column("Method"), *heads), tuple(rows), caption, ranked=ranked)


def _estimate(same: Sequence[Study], method: str, metric: str | None) -> Estimate:
    """Estimate over the seeds of one study; over the means of several, if all of them have the method."""
    found = [
        study.best[method].value(metric or str(study.main_metric)) if method in study.best else Estimate.of([])
        for study in same
    ]
    if len(found) == 1:
        return found[0]
    means = [estimate.mean for estimate in found]
    return Estimate.of([]) if None in means else Estimate.of(means)


def _cell(same: Sequence[Study], method: str, estimate: Estimate) -> Cell:
    broken = any(method in study.best and not study.best[method].whole for study in same)
    return Cell.of(estimate, BROKEN if broken and estimate.mean is not None else "", competes=not broken)


def _average(cells: Sequence[Cell], wanted: bool) -> list[Cell]:
    """The mean of the columns, for a method that has all of them."""
    means = [cell.mean for cell in cells]
    if not wanted:
        return []
    competes = all(cell.competes for cell in cells)
    return [Cell(DASH) if None in means else Cell(mean=Estimate.of(means).mean, competes=competes)]


def _caption(columns: Mapping[Any, Sequence[Study]], rows: Sequence[Row], averaged: bool) -> str:
    words = "Each method at its best learning rate in each experiment; the last evaluation. Mean ± sample standard "
    words += "deviation over seeds"
    several = {_words(value): len(same) for value, same in columns.items() if len(same) > 1}
    if several:
        listed = ", ".join(f"{count} at {value}" for value, count in several.items())
        words += f", or over experiments where several share a value ({listed})"
    words += ". The last column is the mean of the others, for methods that have them all." if averaged else "."
    if any(cell.note for row in rows for cell in row.cells):
        words += f" {BROKEN} a seed diverged or failed: mean over the others, not ranked."
    return words


def _value(run: RunRecord, key: str) -> Any:
    if key in _FIELDS:
        return run.get(key, _ABSENT)
    value: Any = run.get("config") or {}
    for part in key.split("."):
        value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    return tuple(value) if isinstance(value, list) else _ABSENT if isinstance(value, Mapping) else value


def _keys(where: str, values: Mapping[str, Any]) -> list[str]:
    """The dotted keys of all settings."""
    found = []
    for key, value in values.items():
        own = f"{where}.{key}" if where else str(key)
        found += _keys(own, value) if isinstance(value, Mapping) else [own]
    return found


def _sortable(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, "" if value is None else str(value)


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_words, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _label(every: Sequence[Study], method: str) -> str:
    return next(study.labels[method] for study in every if method in study.labels)


def _way(same: Sequence[Study], metric: str | None) -> str:
    return same[0].way(metric or str(same[0].main_metric))
