"""Shift mode over sharded weights: the data pass needs W, which all processes have to gather in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..data.collect import Groups
from ..linalg.moments import Moments
from ..linalg.parallel import read_back
from ..methods.estimator import Contribution, absorb_batch
from ..methods.shift import ShiftEstimator
from ..model.layouts import as_matrix
from ..model.sharded import full
from .agreement import agreed, alone, answered, attempt, gathered
from .assemble import Work
from .distributed import Shared, holding


def absorb_together(work: Work, groups: Groups, weight: float) -> None:
    """Hands the inputs of a batch to the estimator where weights are sharded (an `assemble.Take`).

    Most methods read no W here. Shift mode does where the inverse cannot be shared: which sites those are depends on
    the batch, so the processes tell each other, and all gather each of those weights, one at a time.
    """
    estimator: Any = work.estimator
    if not isinstance(estimator, ShiftEstimator):
        absorb_batch(estimator, groups, weight)
        return
    agreed(None, "the inputs of a batch")
    _note_weights(work, estimator)
    inputs = agreed(attempt(lambda: _prepared(estimator, groups)))
    _find_own(work, estimator, inputs)
    for one in inputs:
        estimator.add(one.names, one.contribution(estimator), weight)


@dataclass
class _Input:
    """One distinct input of a batch.

    Attributes:
        names: the sites that saw it; apart: those of them whose W it takes.
        own: what it adds to those, as they come.
    """

    names: Sequence[str]
    X: Moments
    prepared: Any
    numbers: Sequence[float]
    apart: Sequence[str]
    own: dict[str, Tensor] = field(default_factory=dict)
    last: Contribution | None = None

    def take(self, estimator: ShiftEstimator, name: str) -> None:
        """Adds the term of one site, whose weight the estimator can find now."""
        self.last = estimator.finish([name], self.X, self.prepared, self.numbers)
        self.own.update(self.last.own)

    def contribution(self, estimator: ShiftEstimator) -> Contribution:
        rest = [name for name in self.names if name not in self.apart]
        contribution = estimator.finish(rest, self.X, self.prepared, self.numbers) if rest else self.last
        assert contribution is not None, "each name is in one part"
        return replace(contribution, own=self.own)


def _note_weights(work: Work, estimator: ShiftEstimator) -> None:
    """What the weights decide, before the first batch: each on one process, told to all."""
    sites = [site for site in work.sites.values() if site.name not in estimator.weight_facts]
    ranks = 1 if alone() else dist.get_world_size()
    share = Shared({site.name: i % ranks for i, site in enumerate(sites)}, work)
    share.each(sites, lambda site: estimator.note_weight(site.name), streams=False)
    estimator.weight_facts.update(share.everyone(dict(estimator.weight_facts)))


def _prepared(estimator: ShiftEstimator, groups: Groups) -> list[_Input]:
    ready = [estimator.prepare(names, X) for names, X in groups]
    numbers = read_back([found for _, found in ready])
    return [
        _Input(names, X, prepared, known, estimator.asks_weight(names, known))
        for (names, X), (prepared, _), known in zip(groups, ready, numbers, strict=True)
    ]


def _find_own(work: Work, estimator: ShiftEstimator, inputs: list[_Input]) -> None:
    """The terms that take W: all processes gather it, those that need it use it."""
    mine = {name: one for one in inputs for name in one.apart}
    wanted = set(mine) if alone() else {name for names in gathered(list(mine)) for name in names}
    failure: Exception | None = None
    for site in list(work.sites.values()):
        if site.name not in wanted:
            continue
        with answered():
            whole = replace(site, gathered=as_matrix(site.base, full(site.stored)))
        if site.name in mine and failure is None:
            taken = attempt(partial(holding, work, whole, lambda s: mine[s.name].take(estimator, s.name)))
            failure = taken if isinstance(taken, Exception) else None
        del whole
    if wanted:
        agreed(failure)
