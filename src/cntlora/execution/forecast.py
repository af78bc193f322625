"""Forecast of what an initialisation takes, from one batch and from one layer of each shape; nothing is written."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..data.batches import KeptBatches, default_forward, device_of, to_device, unwrapped
from ..data.memory import Budget, readable
from ..data.reading_mode import reading_mode
from ..methods.statistics import InputEstimator, MapEstimator
from ..model.sites import Site
from .arguments import Request, called_with
from .choice import with_method
from .executor import LocalExecutor
from .reading import Statistics, bound_by_free, prepared
from .site_plans import plan_sites
from .step_size import TRIED


@dataclass(frozen=True)
class Forecast:
    """Seconds and memory of an initialisation, of which one batch was read and one site of each shape factored.

    Attributes:
        method: that will be used. sites: how many will be initialised.
        data_seconds: in the passes over the batches; seconds: in all, without loading the model.
        passes: over the batches.
        peak: bytes of statistics and working room on the model's device, beside the forward pass.
        free: bytes that are free there; None where the system does not say.
    """

    method: str
    sites: int
    data_seconds: float
    seconds: float
    passes: int
    peak: float
    free: float | None

    def __str__(self) -> str:
        passes = "one pass" if self.passes == 1 else f"{self.passes} passes"
        free = "" if self.free is None else f", of {readable(self.free)} that are free"
        return (
            f"{self.method}, {self.sites} sites: about {self.seconds:.3g} s, {self.data_seconds:.3g} s of it in "
            f"{passes} over the batches; at most {readable(self.peak)} beside the model and its forward pass{free}"
        )


@called_with(Request)
def forecast(request: Request) -> Forecast:
    """Foretell the seconds and the memory of `initialize` from the first batch.

    The batch is read as `initialize` would read it, and one site of each shape is factored; the rest is counted. Later
    batches are taken to be like the first.

    Returns:
        The forecast: `print` it.

    Raises:
        ValueError, TypeError: what `initialize` would raise for this model, batch and configuration.
    """
    executor = LocalExecutor()
    with with_method(request, executor) as (chosen, _):
        config = chosen.config
        assert config is not None
        first = None if chosen.batches is None else KeptBatches(chosen.batches, 1)
        method: Any = config.chosen
        if method.batch_weights is not None:
            config = replace(config, method=replace(method, batch_weights=method.batch_weights[:1]))
        statistics = prepared(replace(chosen, batches=first, config=replace(config, num_batches=1)), executor)
        free = bound_by_free(statistics)
        with closing(statistics.budget):
            statistics.read(statistics.sites, "the end of its data")
            factors = _factor_seconds(statistics)
        passes, peak = _passes(statistics)
    reads = config.chosen.reads != "weights"
    data = passes * config.num_batches * statistics.seconds if reads else 0.0
    trials = 2 * min(TRIED, config.num_batches) * _forward_seconds(statistics) if config.chosen.finds_step_size else 0.0
    known = free if free < float("inf") else None
    seconds = data + factors + trials
    return Forecast(config.chosen.name, len(statistics.sites), data, seconds, passes, peak, known)


def _factor_seconds(statistics: Statistics) -> float:
    """One site of each shape, times the number of such sites."""
    ready = statistics.budget.admitted if statistics.config.chosen.reads != "weights" else None
    shapes = Counter(map(_shape, statistics.sites))
    seconds = 0.0
    for shape, count in shapes.items():
        fit = [s for s in statistics.sites if _shape(s) == shape and (ready is None or s.name in ready)]
        fit = [s for s in fit if statistics.has_gradient(s.name)]
        if fit:
            start = time.perf_counter()
            plan_sites(fit[:1], statistics)
            seconds += count * (time.perf_counter() - start)
    return seconds


def _shape(site: Site) -> tuple[int, int]:
    return site.out_features, site.in_features


def _passes(statistics: Statistics) -> tuple[int, float]:
    """Count the passes over the batches that there will be, and the most bytes that one takes."""
    if statistics.config.chosen.reads == "weights":
        return 1, float(statistics.budget.working_room(statistics.sites))
    estimator, budget = statistics.estimator, statistics.budget
    of_inputs = estimator.accumulated[0] if isinstance(estimator, (MapEstimator, InputEstimator)) else None
    tokens = max(statistics.facts[site.name].largest_batch for site in statistics.sites)
    again = Budget(budget.limits, budget.of_gradients, budget.of_inputs, budget.own_sums)
    again.use.free = budget.use.free
    peak = again.foretold(
        statistics.sites, lambda site: site.name if of_inputs is None else of_inputs.key(site.name), tokens
    )
    return again.use.passes, peak


def _forward_seconds(statistics: Statistics) -> float:
    """A forward pass over the first batch."""
    request = statistics.request
    call, model = request.loss or request.forward or default_forward, unwrapped(request.model)
    batch = to_device(next(iter(statistics.batches or ())), device_of(model))
    with reading_mode(request.model, statistics.sites, ()), torch.no_grad():
        start = time.perf_counter()
        call(model, batch)
        return time.perf_counter() - start
