"""Learning rates: the best ones, losses without a sweep and widths of the good range, from the tables of runs.

    python benchmarks/rates.py     # prints the tables that benchmarks/study_pages.py puts on their page

All numbers are held-out losses at the end of the training, of the first seed, which alone was run at every rate.
Between two measured rates the loss is interpolated in the logarithm of the rate; beyond them nothing is assumed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import RESULTS
from benchmarks.overview import NO_PART, RUNS, TASKS, study_of
from benchmarks.tables import table

from cntlora.lab.report.study import finite, sites_of, start_loss

Curve = Mapping[float, float]
"""Learning rate → held-out loss at the end."""

METHODS = {"lora": "plain LoRA", "eva": "EVA", "lora_ga": "LoRA-GA", "self": "self", "descent": "descent"}
"""The methods that every task has at four rates or more (three: descent on two tasks)."""
SHORT = {
    "tweets": "tweets",
    "vision_emoji": "emoji",
    "language": "tales",
    "pairs": "pairs",
    "dreambooth": "lorikeet",
    "vision_fashion_mnist": "Fashion-MNIST",
    "vision_textiles": "textiles",
    "captioning_concepts": "captions",
    "dreambooth_dog": "husky",
}
"""Study → head of its column."""
PROPOSED = RESULTS / "proposed_rates.json"
"""The record of benchmarks/proposed_rates.py."""
FITTED = ("tweets", "vision_emoji", "vision_textiles")
"""The tasks that the rule of `propose_learning_rate` was fitted on."""
DECIDED = ("pairs", "language", "vision_fashion_mnist")
"""Those that took no part in it."""
UNTUNED = (1e-4, 3e-4, 1e-3, 3e-3)
SHARES = (0.01, 0.05)
RANKS = (("rank 2", "{}+r2"), ("rank 8", "{}"), ("rank 32", "{}+r32"))


@cache
def curves(results: Path, study: str) -> Mapping[str, Curve]:
    """Held-out losses of the first seed: method → learning rate → loss."""
    found: dict[str, dict[float, float]] = {}
    for group in study_of(results, study, "loss").groups:
        for run in group.finished:
            if run["seed"] == 0:
                found.setdefault(group.method, {})[group.learning_rate] = run["evaluations"][-1]["loss"]
    return found


def tasks() -> tuple[str, ...]:
    """The studies that have all methods at several rates."""
    return tuple(name for name, *_ in (*TASKS, *NO_PART))


def best(curve: Curve) -> float:
    """The rate with the lowest loss."""
    return min(curve, key=lambda rate: (curve[rate], rate))


def loss_at(curve: Curve, rate: float) -> float | None:
    """The loss at a rate; None beyond the rates that were run."""
    rates = sorted(curve)
    if not rates[0] * (1 - 1e-9) <= rate <= rates[-1] * (1 + 1e-9):
        return None
    for low, high in pairwise(rates):
        if rate <= high * (1 + 1e-9):
            share = math.log(rate / low) / math.log(high / low)
            return curve[low] + share * (curve[high] - curve[low])
    return curve[rates[-1]]


def good_range(curve: Curve, share: float) -> tuple[float, float, bool]:
    """The rates around the best one at which the loss is at most 1 + share times its own best.

    Returns:
        The smallest and the largest of them, and whether the range may go on beyond the rates that were run.
    """
    rates, limit = sorted(curve), (1 + share) * min(curve.values())
    place = rates.index(best(curve))

    def end(way: Sequence[float]) -> tuple[float, bool]:
        for inner, outer in pairwise(way):
            if curve[outer] > limit:
                inside = (limit - curve[inner]) / (curve[outer] - curve[inner])
                return inner * (outer / inner) ** inside, False
        return way[-1], True

    (low, open_low), (high, open_high) = end(rates[place::-1]), end(rates[place:])
    return low, high, open_low or open_high


def best_common_rate(some: Iterable[Curve]) -> tuple[float, float, float]:
    """The one rate for several tasks: that with the least mean excess over each task's own best.

    Returns:
        The rate, from those 1.05 apart that every curve has, and the mean and the largest relative excess there.
    """
    known = list(some)
    low, high = max(min(c) for c in known), min(max(c) for c in known)
    steps = round(math.log(high / low) / math.log(1.05))
    rates = [low * (high / low) ** (i / steps) for i in range(steps + 1)] if steps else [low]

    def excess(rate: float) -> list[float]:
        return [(loss_at(c, rate) or math.inf) / min(c.values()) - 1 for c in known]

    rate = min(rates, key=lambda r: sum(excess(r)))
    return rate, sum(excess(rate)) / len(known), max(excess(rate))


def best_rates(results: Path = RUNS) -> str:
    """Best rate of every method on every task, and the factor between its largest and its smallest."""
    rows = []
    for method, label in METHODS.items():
        rates = [best(curves(results, task)[method]) for task in tasks()]
        rows.append([label, *(f"{rate:g}" for rate in rates), f"{max(rates) / min(rates):.0f}"])
    return table(["best rate", *(SHORT[task] for task in tasks()), "largest / smallest"], rows)


def untuned(results: Path = RUNS) -> str:
    """Return how far the loss at one rate is above that of tuned plain LoRA: median and worst over the tasks."""
    columns = {rate: _with_rate(results, rate) for rate in UNTUNED}
    rows = []
    for method, label in METHODS.items():
        cells = []
        for rate, names in columns.items():
            excess = [
                (loss_at(curves(results, task)[method], rate) or math.inf) / min(curves(results, task)["lora"].values())
                - 1
                for task in names
            ]
            cells.append(f"{_percent(median(excess))} ({_percent(max(excess))})")
        rows.append([label, *cells])
    heads = [f"{rate:g} ({len(names)} tasks)" for rate, names in columns.items()]
    return table(["held-out loss above tuned plain LoRA's, median (worst)", *heads], rows)


def _with_rate(results: Path, rate: float) -> list[str]:
    """The tasks on which every method was run at rates below and above."""
    return [t for t in tasks() if all(loss_at(curves(results, t)[m], rate) is not None for m in METHODS)]


def widths(results: Path = RUNS) -> str:
    """Return the width of the range of good rates, and what one rate for all tasks costs."""
    rows = []
    for method, label in METHODS.items():
        own = [curves(results, task)[method] for task in tasks()]
        cells = []
        for share in SHARES:
            found = [good_range(curve, share) for curve in own]
            cells.append(f"{median(high / low for low, high, _ in found):.1f}")
        cut = sum(good_range(curve, SHARES[-1])[2] for curve in own)
        rate, average, worst = best_common_rate(own)
        rows.append([label, *cells, str(cut), f"{rate:.2g}", _percent(average), _percent(worst)])
    heads = [f"within {100 * share:.0f} % of its best" for share in SHARES]
    return table(["method", *heads, "cut off", "one rate for all tasks", "mean loss above its best", "worst"], rows)


def by_rank(results: Path = RUNS) -> str:
    """Best rates on the tweets by rank, at the same α/r."""
    found = curves(results, "tweets_ranks")
    rows = [
        [METHODS[method], *(f"{best(found[name.format(method)]):g}" for _, name in RANKS)]
        for method in ("lora", "eva", "self", "descent")
    ]
    return table(["best rate", *(head for head, _ in RANKS)], rows)


@dataclass(frozen=True)
class Known:
    """A quantity at step 0 beside the best rate of a method on a task."""

    task: str
    method: str
    quantity: float
    rate: float


def at_step_0(results: Path, key: str, relative: bool = False) -> list[Known]:
    """A quantity of the adapted layers at step 0 for every task and method that has it: the median over the layers.

    Args:
        key: of the facts of a site, such as "gradient_B". relative: divide by the loss before.
    """
    found = []
    for task in tasks():
        groups = {(g.method, g.learning_rate): g for g in study_of(results, task, "loss").groups}
        for method in METHODS:
            rate = best(curves(results, task)[method])
            run = next(run for run in groups[method, rate].finished if run["seed"] == 0)
            values = [v for site in sites_of(run) if (v := finite(site.get(key)))]
            divisor = start_loss(run, "loss_before") if relative else 1.0
            if values and divisor:
                found.append(Known(task, method, median(values) / divisor, rate))
    return found


def prediction_error(known: Sequence[Known], exponent: bool = True) -> float:
    """The typical factor (root mean square of logarithms) between the best rate and the one predicted for a task.

    It is predicted from the other tasks: log rate = a_method + b log quantity; without the exponent a_method alone.
    """
    errors = []
    for task in {one.task for one in known}:
        others = [one for one in known if one.task != task]
        centre = {m: _centre([one for one in others if one.method == m]) for m in {one.method for one in others}}
        offsets = [_from_centre(one, centre[one.method]) for one in others]
        squares = sum(x * x for x, _ in offsets)
        b = sum(x * y for x, y in offsets) / squares if exponent and squares else 0.0
        errors += [y - b * x for x, y in (_from_centre(one, centre[one.method]) for one in known if one.task == task)]
    return math.exp(math.sqrt(mean(error * error for error in errors)))


def _centre(known: Sequence[Known]) -> tuple[float, float]:
    return mean(math.log(one.quantity) for one in known), mean(math.log(one.rate) for one in known)


def _from_centre(one: Known, centre: tuple[float, float]) -> tuple[float, float]:
    return math.log(one.quantity) - centre[0], math.log(one.rate) - centre[1]


QUANTITIES = (
    ("norm of ∂L/∂B", "gradient_B", False),
    ("norm of ∂L/∂B, relative to the loss", "gradient_B", True),
    ("norm of ∂L/∂A (not where B = 0)", "gradient_A", False),
    ("effective rank of the inputs (where they are read)", "effective_rank", False),
)


def predicted(results: Path = RUNS) -> str:
    """Return how well a quantity at step 0 predicts the best rate, beside the mean of the other tasks."""
    rows = []
    for label, key, relative in QUANTITIES:
        known = at_step_0(results, key, relative)
        cells = (f"{prediction_error(known, exponent):.1f}" for exponent in (False, True))
        rows.append([label, str(len(known)), *cells])
    return table(["quantity", "task × method", "error of the mean alone", "error with the quantity"], rows)


@dataclass(frozen=True)
class Proposal:
    """A rate that `propose_learning_rate` gave, beside the swept ones of that start.

    Attributes:
        proposed, swept: the proposed rate and the best one of the sweep.
        excess, at_one: how far the loss is above the lowest of the sweep, at the proposed rate and at 1e-3; relative.
    """

    task: str
    method: str
    proposed: float
    swept: float
    excess: float
    at_one: float


def proposals(results: Path = RUNS, record: Path = PROPOSED) -> list[Proposal]:
    """All proposals of a record of benchmarks/proposed_rates.py."""
    found = []
    for task, methods in json.loads(record.read_text())["tasks"].items():
        for method, facts in methods.items():
            curve, rate = curves(results, task)[method], facts["learning_rate"]
            excess = (nearest_loss(curve, r) / min(curve.values()) - 1 for r in (rate, 1e-3))
            found.append(Proposal(task, method, rate, best(curve), *excess))
    return found


def nearest_loss(curve: Curve, rate: float) -> float:
    """The loss at a rate, or at the nearest rate that was run."""
    found = loss_at(curve, min(max(rate, min(curve)), max(curve)))
    assert found is not None
    return found


def proposed(results: Path = RUNS, record: Path = PROPOSED) -> str:
    """The proposed rate of every start beside the best one of its sweep, and what the loss there is above the best."""
    known = {(p.task, p.method): p for p in proposals(results, record)}
    methods = [m for m in METHODS if any(m == method for _, method in known)]
    rows = []
    for task in (*FITTED, *DECIDED):
        cells = []
        for method in methods:
            p = known[task, method]
            cells.append(f"{p.swept:g} → {p.proposed:.2g} ({_percent(p.excess)})")
        rows.append([SHORT[task], *cells])
    return table(["best → proposed (loss above the best)", *(METHODS[method] for method in methods)], rows)


def proposed_in_short(results: Path = RUNS, record: Path = PROPOSED) -> str:
    """Return how near the proposals come, on the tasks that the rule was fitted on and on those that took no part."""
    known, rows = proposals(results, record), []
    for label, chosen in (("fitted on", FITTED), ("took no part", DECIDED)):
        own = [p for p in known if p.task in chosen]
        factor = math.exp(math.sqrt(mean(math.log(p.proposed / p.swept) ** 2 for p in own)))
        cells = [
            f"{_percent(mean(values), 1)} ({_percent(max(values), 1)})"
            for values in ([p.excess for p in own], [p.at_one for p in own])
        ]
        rows.append([label, ", ".join(SHORT[task] for task in chosen), str(len(own)), f"{factor:.1f}", *cells])
    heads = ["the tasks that the rule", "", "starts", "typical factor", "loss above the best: proposed, mean (worst)"]
    return table([*heads, "at 1e-3, mean (worst)"], rows)


TABLES = {"best": best_rates, "untuned": untuned, "widths": widths, "ranks": by_rank, "predicted": predicted}
TABLES |= {"proposed": proposed, "proposed_in_short": proposed_in_short}
"""Name in the template → its table."""


def _percent(value: float, places: int = 0) -> str:
    printed = f"{100 * value:+.{places}f}"
    return f"{printed.replace('-', '−') if float(printed) else printed[1:]} %"


def main() -> None:
    """Command line."""
    print("\n\n".join(make(RUNS) for make in TABLES.values()))


if __name__ == "__main__":
    main()
