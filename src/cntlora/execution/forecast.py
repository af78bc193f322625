"""Forecast of what an initialisation takes, from two batches and from one layer of each shape; nothing is written.

Seconds are those of the first batch and of one layer of each shape. Memory is counted while two batches are read: from
the second on the sums over batches are held while the model runs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..config import InitConfig
from ..data.batches import KeptBatches, default_forward, device_of, to_device, unwrapped
from ..data.memory import Budget, readable
from ..data.peak_memory import counted_memory
from ..data.reading_mode import reading_mode
from ..methods.statistics import InputEstimator, MapEstimator
from ..model.sites import Site
from .arguments import Request, called_with
from .choice import with_method
from .executor import LocalExecutor
from .head import wants_head
from .reading import Statistics, bound_by_free, prepared
from .site_plans import plan_sites
from .step_size import TRIED

COUNTED = 2
"""Batches whose memory is counted."""


@dataclass(frozen=True)
class Forecast:
    """Seconds and memory of an initialisation, of which one batch was read and one site of each shape factored.

    Attributes:
        method: that will be used. sites: how many will be initialised.
        data_seconds: in the passes over the batches; seconds: in all, without loading the model.
        passes: over the batches.
        peak: bytes on the model's device above the model: the statistics, the room to work in, and the forward (and
            backward) pass.
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
            f"{passes} over the batches; about {readable(self.peak)} above the model{free}"
        )


@called_with(Request)
def forecast(request: Request) -> Forecast:
    """Foretell the seconds and the memory of `initialize` from the first two batches.

    They are read as `initialize` would read them, and one site of each shape is factored; the rest is counted. Later
    batches are taken to be like these.

    Returns:
        The forecast: `print` it.

    Raises:
        ValueError, TypeError: what `initialize` would raise for this model, batch and configuration.
    """
    with with_method(request, LocalExecutor()) as (chosen, _):
        config = chosen.config
        assert config is not None
        first = None if chosen.batches is None else KeptBatches(chosen.batches, min(COUNTED, config.num_batches))
        chosen = replace(chosen, batches=first)
        statistics = _some(chosen, 1)
        free = bound_by_free(statistics)
        with closing(statistics.budget):
            statistics.read(statistics.sites, "the end of its data")
            factors = _factored(statistics)
        passes, room = _passes(statistics)
        peak = _peak(_some(chosen, COUNTED), config.num_batches)
    reads = config.chosen.reads != "weights"
    data = passes * config.num_batches * statistics.seconds if reads else 0.0
    forwards = 2 * min(TRIED, config.num_batches) if config.chosen.finds_step_size else 0
    forwards += config.num_batches if wants_head(request, request.config or InitConfig()) else 0
    trials = forwards * _forward_seconds(statistics) if forwards else 0.0
    known = free if free < float("inf") else None
    seconds = data + sum(layer.seconds for layer in factors) + trials
    return Forecast(
        config.chosen.name, len(statistics.sites), data, seconds, passes, room if peak is None else peak, known
    )


def _some(request: Request, batches: int) -> Statistics:
    """The statistics of the first batches, of which none was read."""
    config = request.config
    assert config is not None
    weights = config.chosen.batch_weights
    if weights is not None:
        method: Any = config.chosen
        config = replace(config, method=replace(method, batch_weights=weights[:batches]))
    return prepared(
        replace(request, config=replace(config, num_batches=min(batches, config.num_batches))), LocalExecutor()
    )


@dataclass(frozen=True)
class _Factored:
    """All sites of one shape: the seconds that their factors take, and the bytes of these."""

    seconds: float
    size: int


def _factored(statistics: Statistics) -> list[_Factored]:
    """Factor one site of each shape, and multiply by the number of such sites."""
    ready = statistics.budget.admitted if statistics.config.chosen.reads != "weights" else None
    made = []
    for shape, count in Counter(map(_shape, statistics.sites)).items():
        fit = [s for s in statistics.sites if _shape(s) == shape and (ready is None or s.name in ready)]
        fit = [s for s in fit if statistics.has_gradient(s.name)]
        if fit:
            start = time.perf_counter()
            (plan,) = plan_sites(fit[:1], statistics).values()
            size = sum(t.numel() * t.element_size() for t in (plan.A, plan.B))
            made.append(_Factored(count * (time.perf_counter() - start), count * size))
    return made


def _peak(statistics: Statistics, batches: int) -> float | None:
    """Count the most bytes above the model while the first batches are read and one site of each shape is factored.

    On the CPU one thread does all of that, since the memory of others is not counted; what several have to work in is
    added. Sums of low rank grow with every batch that is not read here.
    """
    device = statistics.sites[0].device
    bound_by_free(statistics)
    with closing(statistics.budget), _one_thread(device) as threads:
        with counted_memory(device) as reading:
            statistics.read(statistics.sites, "the end of its data")
        with counted_memory(device) as factoring:
            factors = _factored(statistics)
    if reading.most is None or factoring.most is None:
        return None
    reads = statistics.config.chosen.reads != "weights"
    more = _growth(statistics, batches) if reads else 0
    plans = sum(made.size for made in factors)
    side_by_side = statistics.budget.working_room(statistics.sites)
    others = side_by_side * (threads - 1) / threads if device.type == "cpu" else 0
    return more + others + max(reading.most, reading.left + factoring.most + plans)


@contextmanager
def _one_thread(device: torch.device) -> Iterator[int]:
    """Context in which torch has one thread on the CPU, of the number that is yielded."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _growth(statistics: Statistics, batches: int) -> int:
    """Bytes by which the sums that are held by their rows grow up to the last batch."""
    read, grown = max(statistics.facts.batches, 1), 0
    for sums in statistics.estimator.accumulated:
        for total in sums.of_low_rank():
            rows, d = total.rank, total.terms[0].rows.shape[1]
            last = rows * batches // read
            size = total.terms[0].rows.element_size()
            grown += size * d * ((last if 2 * last <= d else d) - rows)
    return grown


def _shape(site: Site) -> tuple[int, int]:
    return site.out_features, site.in_features


def _passes(statistics: Statistics) -> tuple[int, float]:
    """Count the passes over the batches that there will be, and the bytes that one may take beside the forward pass."""
    if statistics.config.chosen.reads == "weights":
        return 1, float(statistics.budget.working_room(statistics.sites))
    estimator, budget = statistics.estimator, statistics.budget
    of_inputs = estimator.accumulated[0] if isinstance(estimator, (MapEstimator, InputEstimator)) else None
    tokens = max(statistics.facts[site.name].largest_batch for site in statistics.sites)
    again = Budget(
        budget.limits, budget.of_gradients, budget.of_inputs, budget.own_sums, budget.single, budget.early,
        budget.solved_in,
    )  # fmt: skip
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
