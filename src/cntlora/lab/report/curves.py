"""Curves over seeds: smoothing, mean and spread at common steps, and the step at which a loss is reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..record import RunRecord
from .study import Estimate, Group, Study, finite

WINDOWS = 20  # the smoothing window is a run's length divided by this
MOST_LABELS = 9  # of learning rates, such as 0.0001, that fit side by side under a plot


@dataclass(frozen=True)
class Curve:
    """Points of a curve over seeds; `spread` is None where fewer than two seeds have a value."""

    x: tuple[float, ...]
    mean: tuple[float, ...]
    spread: tuple[float | None, ...]


def smooth(losses: Sequence[float | None]) -> list[float | None]:
    """Mean over a trailing window of 1/20 of the run (at least one step); None until the window is full of numbers."""
    window = max(1, len(losses) // WINDOWS)
    known = [finite(loss) for loss in losses]
    parts = (known[max(0, end - window) : end] for end in range(1, len(known) + 1))
    return [sum(p) / window if len(p) == window and None not in p else None for p in parts]  # type: ignore[arg-type]


def loss_curve(group: Group, clock: bool = False) -> Curve:
    """Smoothed training loss over the finished seeds, as long as all of them.

    Args:
        clock: against seconds (of the initialisation and of training, mean over seeds) instead of steps from 1 on.
    """
    runs = [run for run in group.finished if run.get("losses")]
    curves = [smooth(run["losses"]) for run in runs]
    places = [float(i + 1) for i in range(min(map(len, curves), default=0))]
    if clock:
        init = group.estimate("init_seconds").mean or 0.0
        seconds = zip(*(run.get("seconds") or () for run in runs), strict=False)
        places = [init + place for place in (Estimate.of(same).mean for same in seconds) if place is not None]
    points = zip(places, map(Estimate.of, zip(*curves, strict=False)), strict=False)
    return _curve(list(points), len(curves))


def metric_curve(group: Group, metric: str, clock: bool = False) -> Curve:
    """A held-out metric at the evaluations that all finished seeds have.

    Args:
        clock: against seconds (of the initialisation and of training, mean over seeds) instead of steps.
    """
    runs = [{e["step"]: e for e in run["evaluations"]} for run in group.finished if run.get("evaluations")]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    init = group.estimate("init_seconds").mean or 0.0
    points = []
    for step in steps:
        seconds = Estimate.of(_seconds(run, step) for run in group.finished).mean
        x = float(step) if not clock else None if seconds is None else init + seconds
        if x is not None:
            points.append((x, Estimate.of(run[step].get(metric) for run in runs)))
    return _curve(points, len(runs))


def rates_curve(study: Study, group: Group, key: str) -> Curve:
    """Mean training loss ("mean_loss") or a held-out metric of the group's method at every whole learning rate."""
    found = [g for g in study.groups if g.method == group.method and g.whole]
    values = [(g.learning_rate, g.value(key)) for g in found]
    known = [(x, e.mean, e.spread) for x, e in values if e.mean is not None]
    return Curve(tuple(k[0] for k in known), tuple(k[1] for k in known), tuple(k[2] for k in known))


def rate_labels(rates: Sequence[float]) -> list[str]:
    """Labels of rising learning rates at a logarithmic axis; "" for one that would run into the label before it."""
    labels: list[str] = []
    last = -math.inf
    room = math.log10(rates[-1] / rates[0]) / MOST_LABELS if rates else 0.0
    for rate in rates:
        near = math.log10(rate) - last < room
        labels.append("" if near else f"{rate:g}")
        last = last if near else math.log10(rate)
    return labels


def epochs_a_step(study: Study) -> float | None:
    """Epochs that one step is, where the experiment counts its training in epochs; None where it counts steps."""
    found = set()
    for run in study.runs:
        epochs = finite(((run.get("config") or {}).get("train") or {}).get("epochs"))
        if epochs and run["status"] == "finished" and run.get("losses"):
            found.add(epochs / len(run["losses"]))
    return found.pop() if len(found) == 1 else None


def stretched(curve: Curve, factor: float | None) -> Curve:
    """The same curve with its places multiplied; None leaves them."""
    return curve if factor is None else Curve(tuple(x * factor for x in curve.x), curve.mean, curve.spread)


def steps_to_reach(group: Group, loss: float) -> int | None:
    """The first step at which the smoothed training loss, averaged over seeds, is at or below `loss`; None if never."""
    curve = loss_curve(group)
    return next((round(x) for x, y in zip(curve.x, curve.mean, strict=True) if y <= loss), None)


def seconds_to_reach(group: Group, loss: float) -> float | None:
    """Count as `steps_to_reach`, in seconds of the initialisation and of training, averaged over seeds."""
    curve = loss_curve(group, clock=True)
    return next((x for x, y in zip(curve.x, curve.mean, strict=True) if y <= loss), None)


def reference_loss(study: Study) -> float | None:
    """The smoothed training loss at the end of plain LoRA at its own best learning rate; None without such runs."""
    curve = loss_curve(study.best["lora"]) if "lora" in study.best else None
    return curve.mean[-1] if curve and curve.mean else None


def thin(curve: Curve, points: int = 120) -> Curve:
    """The same curve with at most about `points` points, the last one kept."""
    step = max(1, -(-len(curve.x) // points))
    keep = range(len(curve.x) - 1, -1, -step)[::-1]
    return Curve(*(tuple(values[i] for i in keep) for values in (curve.x, curve.mean, curve.spread)))  # type: ignore[arg-type]


def _curve(points: Sequence[tuple[float, Estimate]], seeds: int) -> Curve:
    """Return the points that every seed has: a mean over fewer would jump."""
    kept = [(x, e.mean, e.spread) for x, e in points if e.mean is not None and e.count == seeds]
    return Curve(tuple(k[0] for k in kept), tuple(k[1] for k in kept), tuple(k[2] for k in kept))


def _seconds(run: RunRecord, step: int) -> float | None:
    """Training seconds at an evaluation; from the seconds of the steps where the evaluation has none."""
    found = next((finite(e.get("seconds")) for e in run.get("evaluations") or () if e["step"] == step), None)
    seconds = run.get("seconds") or ()
    if found is None and step <= len(seconds):
        return 0.0 if step == 0 else finite(seconds[step - 1])
    return found
