"""Runs of another model than the rest of a comparison: one that is pretrained anew under its old name is another."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..record import RunRecord
from .study import start_loss

ROUNDING = 1e-3
"""Relative difference of two losses of the same model and batch, in half precision or on another machine."""


def runs_of_other_models(runs: Iterable[RunRecord]) -> list[tuple[RunRecord, float]]:
    """The runs whose loss before the initialisation is not that of most of their seed, by seed, each with that of most.

    It is the loss of the first training batch, for which neither method nor learning rate has done anything yet. Runs
    that do not have it are left out.
    """
    alike: dict[int, list[tuple[float, list[RunRecord]]]] = {}
    for run in runs:
        loss = start_loss(run, "loss_before")
        if loss is None:
            continue
        of_seed = alike.setdefault(run["seed"], [])
        same = next((same for known, same in of_seed if math.isclose(loss, known, rel_tol=ROUNDING)), None)
        if same is None:
            of_seed.append((loss, [run]))
        else:
            same.append(run)
    found = []
    for of_seed in alike.values():
        usual, most = max(of_seed, key=lambda known: len(known[1]))
        found += [(run, usual) for _, same in of_seed if same is not most for run in same]
    return found
