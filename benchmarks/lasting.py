"""Starts over whole trainings of 200 steps or more: what is left of them at the end, from the tables of runs.

    python benchmarks/lasting.py              # prints the tables that benchmarks/study_pages.py puts on their page
    python benchmarks/lasting.py results      # the same of the folders of records results/NAME, where there are any

A method is tuned by the mean of its held-out losses at the end: among the rates that it was run at with the most
seeds, the lowest. What is compared between rates or methods is of the seeds that both have. Beyond the rates that were
run nothing is assumed. Every cell says how many runs it rests on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.overview import RUNS
from benchmarks.rates import Curve, best, best_common_rate, good_range, loss_at
from benchmarks.tables import table

from cntlora.lab.report import load_records

STUDIES = {
    "tweets_300": "tweets",
    "pairs_300": "pairs",
    "vision_fashion_mnist_300": "Fashion-MNIST",
    "vision_emoji_300": "emoji",
    "language_300": "dialogue",
}
"""Study → head of its column. Those without records are left out."""
METHODS = {
    "lora": "plain LoRA",
    "lora+head": "plain LoRA, head fitted",
    "lora+fitted+head": "plain LoRA, head and rate fitted",
    "rslora": "rsLoRA",
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "eva": "EVA",
    "lora_ga": "LoRA-GA",
    "lora_one": "LoRA-One",
    "lora_da": "LoRA-DA",
    "self": "self",
    "descent": "descent",
    "whitened": "whitened",
    "whitened+fitted": "whitened, told the rate",
    "whitened+head": "the default",
    "whitened+fitted+head": "the default, told the rate",
    "whitened_descent": "whitened descent",
}
"""The methods, where there are records, without the word that their batches are unseen ones."""
TOLD = {"whitened+fitted": "whitened", "whitened+fitted+head": "whitened+head"}
"""Whose start is brought to the rate of the run → the same without. At `FIXED`, which whitened is made for, they are
one."""
DEFAULT, TOLD_DEFAULT = "whitened+head", "whitened+fitted+head"
"""Whitened, with a new head fitted: what is done where no method is named."""
OWN_HEAD = {key: {DEFAULT: "whitened", TOLD_DEFAULT: "whitened+fitted"} for key in ("language_300", "pairs_300")}
"""Studies where no head is fitted, and the default is whitened alone: there is no new one, or no ridge lowers the loss
of what is left out (pairs; the loss at the start and after a step is that of whitened to the last digit)."""
OURS = ("lora", "lora+head", "whitened", "whitened+head", "whitened_descent")
TOLD_OURS = ("lora", "lora+head", "lora+fitted+head", *TOLD)
PEERS = ("lora", *(method for method in METHODS if method not in (*OURS, *TOLD_OURS)))
"""What stands in one table: our starts beside plain LoRA, the same told their rate, the others' beside plain LoRA."""
UNTUNED = (1e-4, 2e-4, 1e-3)
WITHIN = 0.01
"""How far above its lowest loss a rate is still a good one."""
FIXED = 1e-3
"""The rate for all tasks that was fixed beforehand."""


@dataclass
class Runs:
    """The runs of a method on a task.

    Attributes:
        along: learning rate → seed → (step, held-out loss) along the training; the last loss is ∞ where it diverged.
        init: initialisation relative to the mean step of its run, of every run.
    """

    along: dict[float, dict[int, list[tuple[int, float]]]] = field(default_factory=dict)
    init: list[float] = field(default_factory=list)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take a record, unless it failed for another reason than its losses."""
        known = [(e["step"], e["loss"]) for e in record["evaluations"]]
        if record["status"] == "diverged":
            known.append((record["config"]["train"]["steps"], math.inf))
        elif record["status"] != "finished":
            return
        self.along.setdefault(record["learning_rate"], {})[record["seed"]] = known
        if record["status"] == "finished":
            self.init.append(record["init_seconds"] / (record["train_seconds"] / len(record["losses"])))

    @property
    def curve(self) -> Curve:
        """Learning rate → mean of the losses at the end, over the seeds that every rate was run with."""
        seeds = self.shared_seeds
        return {rate: mean(runs[seed][-1][1] for seed in seeds) for rate, runs in sorted(self.along.items())}

    @property
    def shared_seeds(self) -> list[int]:
        """The seeds that every rate was run with."""
        return sorted(set.intersection(*(set(runs) for runs in self.along.values())))

    @property
    def tuned(self) -> float:
        """The rate with the lowest mean loss at the end, among those with the most seeds."""
        most = max(len(runs) for runs in self.along.values())
        full = [rate for rate, runs in self.along.items() if len(runs) == most]
        return min(full, key=lambda rate: (mean(self.ends(rate).values()), rate))

    def ends(self, rate: float) -> dict[int, float]:
        """Seed → held-out loss at the end."""
        return {seed: run[-1][1] for seed, run in self.along[rate].items()}


Tasks = Mapping[str, Mapping[str, Runs]]
"""Study → method → its runs."""


def tasks_of(results: Path) -> Tasks:
    """The studies of `STUDIES` that have a table of runs, or a folder of records, in a folder."""
    found: dict[str, dict[str, Runs]] = {}
    for study in STUDIES:
        source = next((p for p in (results / f"{study}.parquet", results / study) if p.exists()), None)
        for record in load_records(source) if source else ():
            name = record["method"].replace("+unseen", "")
            if name in METHODS:
                found.setdefault(study, {}).setdefault(name, Runs()).add(record)
    for study, methods in found.items():
        for name, plain in OWN_HEAD.get(study, {}).items():
            methods[name] = replace(methods[plain], along=dict(methods[plain].along)) if plain in methods else Runs()
        for told, plain in TOLD.items():
            if FIXED in methods.get(plain, Runs()).along:
                methods.setdefault(told, Runs()).along[FIXED] = methods[plain].along[FIXED]
    return {study: {m: runs for m, runs in methods.items() if runs.along} for study, methods in found.items()}


def known_methods(tasks: Tasks, among: Sequence[str]) -> list[str]:
    """The methods among some that have records on any task."""
    return [m for m in among if any(m in methods for methods in tasks.values())]


def ends(tasks: Tasks, among: Sequence[str] = OURS) -> str:
    """Return the held-out loss at the end at each method's tuned rate, with its spread over seeds."""
    return _by_task("task", tasks, known_methods(tasks, among), lambda runs, method: _end(runs[method]))


def _by_task(head: str, tasks: Tasks, methods: Sequence[str], cell: Callable[[Mapping[str, Runs], str], str]) -> str:
    """A row a task and a column a method, with `cell` of the task's runs and the method; – where it was not run."""
    rows = []
    for study, runs in tasks.items():
        rows.append([STUDIES[study], *(cell(runs, m) if m in runs else "–" for m in methods)])
    return table([head, *(METHODS[m] for m in methods)], rows)


def _end(runs: Runs) -> str:
    values = list(runs.ends(runs.tuned).values())
    return f"{with_spread(values)} ({runs.tuned:g}; {_count(values, 'seed')}, {_count(runs.along, 'rate')})"


def with_spread(values: Sequence[float]) -> str:
    """The mean, and where there are several the standard deviation."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def against(tasks: Tasks) -> str:
    """Return starts against others, each at its tuned rate: how many of the paired seeds end lower."""
    pairs = [("whitened", "lora"), ("whitened", "eva"), (DEFAULT, "lora"), (DEFAULT, "lora+head")]
    pairs = [pair for pair in pairs if any(set(pair) <= set(runs) for runs in tasks.values())]
    rows = []
    for study, runs in tasks.items():
        cells = [_against(runs[own], runs[other]) if {own, other} <= set(runs) else "–" for own, other in pairs]
        rows.append([STUDIES[study], *cells])
    return table(["task", *(f"{METHODS[own]} − {METHODS[other]}" for own, other in pairs)], rows)


def _against(own: Runs, other: Runs) -> str:
    mine, its = own.ends(own.tuned), other.ends(other.tuned)
    differences = [mine[seed] - its[seed] for seed in sorted(mine.keys() & its.keys())]
    lower = sum(d < 0 for d in differences)
    return f"{mean(differences):+.3f} ({lower} of {_count(differences, 'seed')} lower)".replace("-", "−")


def step_reached(along: Sequence[tuple[float, float]], loss: float) -> float | None:
    """The first step at which a curve is at or below a loss, interpolated between evaluations; None if never."""
    if along[0][1] <= loss:
        return along[0][0]
    for (before, high), (after, low) in pairwise(along):
        if low <= loss:
            return before + (high - loss) / (high - low) * (after - before)
    return None


def reached(tasks: Tasks, among: Sequence[str] = OURS) -> str:
    """Return when each method has plain LoRA's loss at the end, both at their tuned rates.

    Shares of plain LoRA's steps; in brackets of its time, with the initialisation in units of the method's own steps,
    which take as long as plain LoRA's.
    """
    methods = [m for m in known_methods(tasks, among) if m != "lora"]
    return _by_task("task", tasks, methods, lambda runs, method: _reached(runs[method], runs["lora"]))


def _reached(own: Runs, plain: Runs) -> str:
    mine, its = own.along[own.tuned], plain.along[plain.tuned]
    seeds = sorted(mine.keys() & its.keys())
    if not seeds:
        return "–"
    last = its[seeds[0]][-1][0]
    step = step_reached(mean_curve([mine[seed] for seed in seeds]), mean(its[seed][-1][1] for seed in seeds))
    if step is None:
        return f"not ({_count(seeds, 'seed')})"
    return f"{step / last:.2f} ({(step + median(own.init)) / last:.2f}; {_count(seeds, 'seed')})"


def mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean of several runs' losses after the steps that all of them have."""
    steps = sorted(set.intersection(*({step for step, _ in curve} for curve in curves)))
    return [(step, mean(dict(curve)[step] for curve in curves)) for step in steps]


def widths(tasks: Tasks, among: Sequence[str] = ("lora", *TOLD)) -> str:
    """Return the factor between the smallest and the largest good rate; ≥ where the range may go on."""
    head = f"within {100 * WITHIN:.0f} % of its lowest loss"
    return _by_task(head, tasks, known_methods(tasks, among), lambda runs, method: _width(runs[method]))


def _width(runs: Runs) -> str:
    low, high, cut = good_range(runs.curve, WITHIN)
    return f"{'≥ ' if cut else ''}{high / low:.1f} ({_count(runs.along, 'rate')}, {_count(runs.shared_seeds, 'seed')})"


def untuned(tasks: Tasks, among: Sequence[str] = TOLD_OURS) -> str:
    """Return how far the loss at one rate is above that of tuned plain LoRA: median and worst over the tasks."""
    rows = []
    for method in known_methods(tasks, among):
        cells = []
        for rate in UNTUNED:
            found = [
                _excess(runs[method].ends(rate), runs["lora"].ends(runs["lora"].tuned))
                for runs in tasks.values()
                if method in runs and rate in runs[method].along
            ]
            excess = [value for value in found if value is not None]
            cells.append(f"{_percent(median(excess))} ({_percent(max(excess))}; {len(excess)})" if excess else "–")
        if set(cells) != {"–"}:
            rows.append([METHODS[method], *cells])
    return table(["above tuned plain LoRA: median (worst; tasks)", *(f"{rate:g}" for rate in UNTUNED)], rows)


def at_rate(tasks: Tasks, rate: float) -> str:
    """Return the held-out loss at the end of every method at one rate, a row a task, beside tuned plain LoRA's."""
    known = known_methods(tasks, (*TOLD_OURS, *PEERS[1:]))
    methods = [m for m in known if any(m in runs and rate in runs[m].along for runs in tasks.values())]
    rows = []
    for study, runs in tasks.items():
        tuned = _mean(runs["lora"].ends(runs["lora"].tuned))
        rows.append([STUDIES[study], tuned, *(_mean_at(runs, m, rate) for m in methods)])
    return table([f"at {rate:g}", "plain LoRA, tuned", *(METHODS[m] for m in methods)], rows)


def along_rates(tasks: Tasks, method: str) -> str:
    """Return the held-out loss at the end of one method at every rate of the studies, a row a task."""
    rates = sorted({rate for runs in tasks.values() for m in ("lora", method) if m in runs for rate in runs[m].along})
    rows = [[STUDIES[study], *(_mean_at(runs, method, rate) for rate in rates)] for study, runs in tasks.items()]
    return table([METHODS[method], *(f"{rate:g}" for rate in rates)], rows)


def _mean_at(runs: Mapping[str, Runs], method: str, rate: float) -> str:
    return _mean(runs[method].ends(rate)) if method in runs and rate in runs[method].along else "–"


def _mean(ends: Mapping[int, float]) -> str:
    return f"{mean(ends.values()):.3f} ({len(ends)})"


def _excess(mine: Mapping[int, float], its: Mapping[int, float]) -> float | None:
    """The distance of the mean loss above another, relative to it, over the seeds of both."""
    seeds = mine.keys() & its.keys()
    return mean(mine[seed] for seed in seeds) / mean(its[seed] for seed in seeds) - 1 if seeds else None


def one_rate(tasks: Tasks, among: Sequence[str] = (*OURS, *TOLD)) -> str:
    """Return the best single rate for the tasks with two rates or more, and how far above its lowest loss each is."""
    rows = []
    for method in known_methods(tasks, among):
        curves = [c for runs in tasks.values() if method in runs and len(c := runs[method].curve) > 1]
        if not curves:
            continue
        rate, average, worst = best_common_rate(curves)
        fixed = [loss / min(c.values()) - 1 for c in curves if (loss := loss_at(c, FIXED)) is not None]
        bests = ", ".join(f"{best(curve):g}" for curve in curves)
        cells = [bests, f"{rate:.2g}", _percent(average), _percent(worst), _percent(max(fixed)) if fixed else "–"]
        rows.append([METHODS[method], *cells])
    heads = ["each task's best rate", "best for all", "mean above the lowest", "worst", f"worst at {FIXED:g}"]
    return table(["method", *heads], rows)


TABLES: dict[str, Callable[[Tasks], str]] = {"against": against}
for _make in (ends, reached, widths, untuned, one_rate):
    TABLES |= {_make.__name__: _make, f"{_make.__name__}_peers": partial(_make, among=PEERS)}
TABLES |= {"rates_lora": partial(along_rates, method="lora")}
TABLES |= {"rates_default": partial(along_rates, method=TOLD_DEFAULT)}
TABLES |= {f"at_{rate:g}".replace(".", "_"): partial(at_rate, rate=rate) for rate in UNTUNED}
"""Name in the template → its table."""


def lasting(name: str, results: Path = RUNS) -> str:
    """Return one of the tables, from the records in a folder."""
    return TABLES[name](tasks_of(results))


def _count(things: Iterable[Any], word: str) -> str:
    number = len(list(things))
    return f"{number} {word}{'s' * (number != 1)}"


def _percent(value: float) -> str:
    printed = f"{100 * value:+.1f}"
    return f"{printed.replace('-', '−') if float(printed) else printed[1:]} %"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: the tables of a folder."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    tasks = tasks_of(Path(given[0]) if given else RUNS)
    print("\n\n".join(f"{name}\n\n{make(tasks)}" for name, make in TABLES.items()))


if __name__ == "__main__":
    main()
