"""The size of a start: descent's step gets the size that lowers the loss on the first batches most.

The loss at zero and its slope along the step come with the backward pass, so that one trial places the minimum, and a
second one is made only where that lies far from the first. Those batches gave the directions too, so that the loss
falls further on them than on others; but where it is lowest depends on the curvature of the loss, and was found at the
same size on others (docs/math/descent.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..data.batches import default_forward, device_of, loss_in, to_device, unwrapped
from ..data.reading_mode import reading_mode
from ..linalg.factors import halves_cancel
from ..model.layouts import shaped_like

if TYPE_CHECKING:
    from ..model.sites import Site
    from ..plan import InitPlan
    from ..site_plan import SitePlan
    from .reading import Statistics

TRIED = 4
"""Batches that the loss is the mean of, the first ones; each trial costs their forward passes."""
LEAST, MOST = 2.0**-12, 0.5
"""The smallest and the largest size: half of a layer's norm is far for a start."""
FIRST, OTHERWISE = 0.25, 2.0**-5
"""The first size that is tried: a share of that where a straight line along the slope reaches a loss of zero; or, of a
loss that is not above zero, a size."""
NEAR = 1.5
"""A trial is trusted where the minimum that it places is within this factor of its own size."""
ENOUGH = 6
"""Trials, where neither of the first two has lowered the loss."""


def with_step_size(plan: InitPlan, statistics: Statistics) -> InitPlan:
    """The plan with all factors B times one number, where its method leaves the size open; else the plan.

    Where several processes run, all have to call it with the same plan. The losses are those of all of them.

    Returns:
        A plan whose largest ‖scaling·B·A‖/‖W‖ is `strength`, or, where that is None, lowers the loss most.
    """
    method = plan.config.chosen
    if not method.has_step_size:
        return plan
    start = time.perf_counter()
    largest = max((s.start_norm / s.weight_norm for s in plan.sites.values() if s.weight_norm), default=0.0)
    if largest == 0:
        return plan
    strength: float | None = getattr(method, "strength", None)
    if strength is not None:
        return _scaled(plan, strength / largest, {"size": strength})
    with _trials(statistics, plan) as loss_at:
        slope = sum(site.slope or 0.0 for site in plan.sites.values()) / largest
        found = best_size(lambda size: loss_at(size / largest), loss_at.before, slope)
        batches = loss_at.batches
    if is_idle(found, method.least_gain):
        found |= {"size": 0.0, "loss_after": found["loss_before"]}
    scaled = _scaled(plan, found["size"] / largest, {**found, "batches": batches})
    spent = max(statistics.executor.gather(time.perf_counter() - start))
    return replace(scaled, seconds=plan.seconds + spent)


def best_size(loss_at: Callable[[float], float], before: float, slope: float) -> dict[str, float]:
    """A size near the lowest loss, from the loss at zero, its slope there, and one or two trials.

    Args:
        loss_at: the loss at a size above zero.
        before: the loss at zero.
        slope: its derivative by the size at zero, below zero.

    Returns:
        The tried size with the lowest loss, that loss, the loss before and the number of trials. More than two are made
        only where none of them has lowered the loss.
    """
    known: dict[float, float] = {}
    size = _bounded(FIRST * before / -slope if before > 0 > slope else OTHERWISE)
    while size not in known and len(known) < ENOUGH:
        value = loss_at(size)
        known[size] = value if math.isfinite(value) else math.inf
        lowest = _bounded(lowest_near(size, (known[size] - before) / (slope * size) if slope < 0 else -math.inf))
        fell = min(known.values()) < before
        if fell and (len(known) > 1 or max(size / lowest, lowest / size) <= NEAR):
            break
        size = lowest
    best = min(known, key=lambda tried: (known[tried], tried))
    return {"size": best, "loss_before": before, "loss_after": known[best], "trials": len(known)}


def is_idle(found: Mapping[str, float], least_gain: float | None) -> bool:
    """Return whether the best size of `best_size` lowers the loss by less than this share of it.

    With a head that is new the gradient by the layers is hardly more than noise. A step along it lowers the loss of
    ten image classes by 0.1 %, at a size at which training goes on far slower.
    """
    gain = found["loss_before"] - found["loss_after"]
    return least_gain is not None and gain < least_gain * abs(found["loss_before"])


def lowest_near(size: float, share: float) -> float:
    """Place the minimum of the loss, from one trial that lowered it by `share` of what its slope alone foretells.

    Along such a step the share falls about as exp(−t/τ): measured at six sizes on six tasks, where a parabola, whose
    share falls in a straight line, misses by up to a factor of two. t·exp(−t/τ) is largest at τ. Where the loss has
    hardly fallen, or has risen, τ says little: the minimum is placed at a quarter, or where the parabola has it if that
    is nearer.
    """
    if not math.isfinite(share):
        return size / 16
    if share <= 0.02:
        return size / max(4.0, 2 * (1 - share))
    return 4 * size if share >= 0.98 else min(-size / math.log(share), 4 * size)


def _bounded(size: float) -> float:
    return min(max(size, LEAST), MOST)


def _scaled(plan: InitPlan, factor: float, step: Mapping[str, float]) -> InitPlan:
    sites = {
        name: replace(site, B=site.B * factor, start_norm=site.start_norm * factor, slope=(site.slope or 0.0) * factor)
        for name, site in plan.sites.items()
    }
    return replace(plan, sites=sites, step=dict(step))


class _LossAt:
    """The mean loss of the first batches with the start of a plan times a factor.

    Attributes:
        before: without the start; of the data pass, unless its losses drew noise of their own.
        batches: that it is the mean of, those of all processes.
    """

    def __init__(self, statistics: Statistics, scaled: _ScaledStart) -> None:
        self.request, self.executor = statistics.request, statistics.executor
        self.scaled, self.seed = scaled, statistics.config.seed
        self.model = unwrapped(self.request.model)
        read = list(islice(statistics.batches or (), TRIED))
        fewest = min(self.executor.gather(len(read)))  # each process has to make as many calls
        self.tried = [to_device(batch, device_of(self.model)) for batch in read[:fewest]]
        self.batches = fewest * len(self.executor.gather(fewest))
        noisy = any(self.executor.gather(statistics.losses.noisy))
        self.before = self(0.0) if noisy else self._mean(statistics.losses.first(fewest))

    def __call__(self, factor: float) -> float:
        self.scaled.factor = factor
        torch.manual_seed(self.seed)  # a loss that draws noise draws the same each time
        call = self.executor.model_call(self.request.loss or self.request.forward or default_forward)
        losses = self.executor.run(
            lambda: [float(loss_in(call(self.model, batch), index)) for index, batch in enumerate(self.tried)]
        )
        return self._mean(losses)

    def _mean(self, losses: list[float]) -> float:
        """The mean over the losses of all processes."""
        parts = self.executor.gather(losses)
        return sum(map(math.fsum, parts)) / max(1, sum(map(len, parts)))


class _ScaledStart:
    """Hooks that add factor·scaling·B·A·x to what a layer gives."""

    factor = 0.0

    def hook(self, site: Site, planned: SitePlan) -> Callable[..., Tensor]:
        down, up = site.layer.lora_A[site.adapter], site.layer.lora_B[site.adapter]
        h = planned.file_rank // 2 if halves_cancel(planned.B, planned.A) else planned.file_rank
        A, B = shaped_like(down.weight, planned.A[:h]), shaped_like(up.weight, planned.B[:, :h])

        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if self.factor == 0.0:
                return output
            inner = functional_call(down, {"weight": A.to(args[0].device)}, (args[0].to(A.dtype),))
            more = functional_call(up, {"weight": B.to(args[0].device) * self.factor}, (inner,))
            return output + (planned.scaling * more).to(output.dtype)

        return add


@contextmanager
def _trials(statistics: Statistics, plan: InitPlan) -> Iterator[_LossAt]:
    """Context in which the yielded function gives losses; the model is as found afterwards."""
    sites = [site for site in statistics.sites if site.name in plan.sites and plan.sites[site.name].rank > 0]
    scaled = _ScaledStart()
    with ExitStack() as stack:
        stack.enter_context(reading_mode(statistics.request.model, sites, statistics.batches or ()))
        stack.enter_context(torch.no_grad())
        for site in sites:
            handle = site.layer.register_forward_hook(scaled.hook(site, plan.sites[site.name]))
            stack.callback(handle.remove)
        yield _LossAt(statistics, scaled)
