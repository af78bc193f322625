"""The sentences of a report: what was run, what came out best, how the numbers are made, and from where they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...messages import counted
from ..record import RunRecord
from .formats import BEST, Table
from .study import Study
from .tables import ONE_SEED, criterion_words, metric_name


def lead(found: Sequence[Study]) -> str:
    """One line for the top of a report."""
    runs = sum(len(study.runs) for study in found)
    spread = ", mean ± standard deviation over seeds" if any(study.repeated for study in found) else ""
    return f"{', '.join(study.name for study in found)}: {counted(runs, 'run')}{spread}."


def summary(study: Study) -> str:
    """Return the numbers of methods, learning rates, seeds and runs, and of those that did not finish."""
    broken = sum(len(group.runs) - len(group.finished) for group in study.groups)
    rates = ", ".join(f"{rate:g}" for rate in study.learning_rates)
    seeds = ", ".join(map(str, study.seeds))
    ending = f"{counted(broken, 'run')} did not finish; see Failures." if broken else "All runs finished."
    methods, runs = counted(len(study.best), "method"), counted(len(study.runs), "run")
    chance = "" if study.repeated else f" {ONE_SEED}"
    rate, seed = ("s" * (len(values) != 1) for values in (study.learning_rates, study.seeds))
    return f"{methods} at learning rate{rate} {rates}, seed{seed} {seeds}: {runs}. {ending}{chance}"


def glance(study: Study, main: Table) -> list[tuple[str, str]]:
    """(what, which method has the best and what plain LoRA has) of the training loss and the main metric.

    Args:
        main: the study's `main_table`.
    """
    metric = metric_name(study.main_metric) if study.main_metric else None
    lora = next((i for i, row in enumerate(main.rows) if row.method == "lora"), None)
    lines = []
    for j, column in enumerate(main.columns):
        best = [i for (i, at), mark in main.marks.items() if at == j and mark == BEST]
        if column.head not in ("mean training loss", metric) or not best:
            continue
        printed = [" ± ".join(filter(None, main.body(i, j))) for i in range(len(main.rows))]
        words = "; ".join(f"{main.rows[i].cells[0].text} {printed[i]}" for i in best)
        plain = "" if lora is None or lora in best else f" (plain LoRA {printed[lora]})"
        lines.append((f"{'Lowest' if column.direction == 'min' else 'Highest'} {column.head}", words + plain))
    return lines


def rules(study: Study) -> list[str]:
    """Return how the numbers are made, one rule a sentence or two."""
    return [
        f"A method's best learning rate is the one with the {criterion_words(study)}. One at which any seed diverged "
        "or failed never beats one at which all finished.",
        "Means and sample standard deviations are over the seeds that finished; a single seed has no spread.",
        "The best of a column is bold, the second best underlined, by what is printed, so values that print alike "
        "share the mark. A method with a broken seed is not ranked.",
        "Seconds, memory and parameters are as the runs measured them, on the machine under Provenance.",
    ]


def provenance(records: Iterable[RunRecord]) -> list[tuple[str, list[str]]]:
    """(what, its values) of the runs: how they ended, commits, machines and versions, with counts where they differ."""
    runs = list(records)
    states = Counter(str(run["status"]) for run in runs)
    return [
        ("Runs", [f"{len(runs)}: " + ", ".join(f"{count} {state}" for state, count in sorted(states.items()))]),
        ("Commit", _counted(str(run.get("git") or "unknown") for run in runs)),
        ("Machine", _counted(_listed(run.get("machine")) for run in runs)),
        ("Versions", _counted(_listed(run.get("versions")) for run in runs)),
    ]


def _counted(values: Iterable[str]) -> list[str]:
    counts = sorted(Counter(values).items())
    return [value if len(counts) == 1 else f"{value} ({counted(count, 'run')})" for value, count in counts]


def _listed(values: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (values or {}).items() if value is not None) or "unknown"
