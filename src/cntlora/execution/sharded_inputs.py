"""Inputs of a batch over sharded weights: an estimator that needs W meanwhile has all processes gather it together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor

from ..linalg.parallel import read_back
from ..methods.estimator import WeightReader, absorb_batch
from .processes import gather, raise_together, run_together, world_size

if TYPE_CHECKING:
    from ..data.collect import Groups
    from ..linalg.moments import Moments
    from ..methods.estimator import Contribution
    from ..model.sites import Site

T = TypeVar("T")


class GathersWeights(Protocol):
    """The part of the executor that is asked: a sharded weight for one process, or for all."""

    def map_sharded(self, sites: Sequence[Site], make: Callable[[Site], T], owners: Mapping[str, int]) -> dict[str, T]:
        """Return what `make` gives for each site, on the process that owns it."""

    def on_all(self, site: Site, make: Callable[[Site], T] | None) -> T | Exception | None:
        """Return what `make` gives for a site whose weight all processes gather."""


def absorb_with_weights(
    executor: GathersWeights, estimator: Any, groups: Groups, weight: float, sites: Sequence[Site]
) -> None:
    """Hand the inputs of a batch to the estimator where weights are sharded.

    Most methods read no W here. Shift mode does where the inverse cannot be shared: which sites those are depends on
    the batch, so the processes tell each other, and all gather each of those weights, one at a time.
    """
    if not isinstance(estimator, WeightReader):
        absorb_batch(estimator, groups, weight)
        return
    raise_together(None, "the inputs of a batch")
    _note_weights(executor, estimator, sites)
    inputs = run_together(lambda: _prepared(estimator, groups))
    _add_own_terms(executor, estimator, inputs, sites)
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

    def take(self, estimator: WeightReader, name: str) -> None:
        """Add the term of one site, whose weight the estimator can find now."""
        self.last = estimator.finish([name], self.X, self.prepared, self.numbers)
        self.own.update(self.last.own)

    def contribution(self, estimator: WeightReader) -> Contribution:
        rest = [name for name in self.names if name not in self.apart]
        found = estimator.finish(rest, self.X, self.prepared, self.numbers) if rest else self.last
        assert found is not None, "each name is in one part"
        return replace(found, own=self.own)


def _note_weights(executor: GathersWeights, estimator: WeightReader, sites: Sequence[Site]) -> None:
    """Note what the weights decide, before the first batch: each on one process, told to all."""
    new = [site for site in sites if site.name not in estimator.weight_facts]
    owners = {site.name: i % world_size() for i, site in enumerate(new)}
    executor.map_sharded(new, lambda site: estimator.note_weight(site.name), owners)
    for part in gather(dict(estimator.weight_facts)):
        estimator.weight_facts.update(part)


def _prepared(estimator: WeightReader, groups: Groups) -> list[_Input]:
    ready = [estimator.prepare(names, X) for names, X in groups]
    numbers = read_back([found for _, found in ready])
    return [
        _Input(names, X, prepared, known, estimator.asks_weight(names, known))
        for (names, X), (prepared, _), known in zip(groups, ready, numbers, strict=True)
    ]


def _add_own_terms(
    executor: GathersWeights, estimator: WeightReader, inputs: list[_Input], sites: Sequence[Site]
) -> None:
    """The terms that take W: all processes gather it, those that need it use it."""
    mine = {name: one for one in inputs for name in one.apart}
    wanted = {name for names in gather(list(mine)) for name in names}
    failure: Exception | None = None
    for site in sites:
        if site.name not in wanted:
            continue
        takes = site.name in mine and failure is None
        taken = executor.on_all(site, (lambda s: mine[s.name].take(estimator, s.name)) if takes else None)
        failure = taken if isinstance(taken, Exception) else failure
    if wanted:
        raise_together(failure)
