"""How large a start is: descent's step gets the size that lowers the loss on the first batches most.

The loss at zero and its slope along the step come with the backward pass, so that one trial places the minimum, and a
second one is made only where that lies far from the first. Those batches gave the directions too, so that the loss
falls further on them than on others; but where it is lowest depends on the curvature of the loss, and was found at the
same size on others (docs/math.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..data.batches import default_forward, device_of, to_device, unwrapped
from ..data.collect import reading_mode
from ..data.gradients import loss_in
from ..linalg.factors import halves_cancel
from ..model.layouts import shaped_like
from ..model.sites import Site
from ..plan import InitPlan, SitePlan
from .agreement import agreed, alone, attempt, gathered
from .reading import Reading

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


def sized(plan: InitPlan, reading: Reading) -> InitPlan:
    """The plan with all factors B times one number, where its method leaves the size open; else the plan.

    Where several processes run, all have to call it with the same plan. The losses are those of all of them.

    Returns:
        A plan whose largest ‖scaling·B·A‖/‖W‖ is `strength`, or, where that is None, lowers the loss most.
    """
    config = plan.config
    if not config.method.sized:
        return plan
    start = time.perf_counter()
    largest = max((s.start_norm / s.weight_norm for s in plan.sites.values() if s.weight_norm), default=0.0)
    if largest == 0:
        return plan
    strength: float | None = getattr(config.method, "strength", None)
    if strength is not None:
        return _scaled(plan, strength / largest, {"size": strength})
    with _trials(reading, plan) as loss_at:
        slope = sum(site.slope or 0.0 for site in plan.sites.values()) / largest
        found = best_size(lambda size: loss_at(size / largest), loss_at.before, slope)
        batches = loss_at.batches
    scaled = _scaled(plan, found["size"] / largest, {**found, "batches": batches})
    spent = time.perf_counter() - start
    return replace(scaled, seconds=plan.seconds + (spent if alone() else max(gathered(spent))))


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


def lowest_near(size: float, share: float) -> float:
    """Where the loss is lowest, from one trial that lowered it by `share` of what its slope alone foretells.

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
    """

    def __init__(self, reading: Reading, added: _Added) -> None:
        self.request, self.added, self.seed = reading.request, added, reading.work.config.seed
        self.model = unwrapped(self.request.model)
        kept = list(islice(self.request.batches or (), min(TRIED, reading.seen.batches)))
        fewest = len(kept) if alone() else min(gathered(len(kept)))
        self.kept = [to_device(batch, device_of(self.model)) for batch in kept[:fewest]]
        self.batches = fewest if alone() else sum(gathered(fewest))
        noisy = reading.losses.noisy if alone() else any(gathered(reading.losses.noisy))
        self.before = self(0.0) if noisy else self._mean(reading.losses.first(fewest))

    def __call__(self, factor: float) -> float:
        self.added.factor = factor
        torch.manual_seed(self.seed)  # a loss that draws noise draws the same each time
        call = self.request.loss or self.request.forward or default_forward
        losses = agreed(
            attempt(lambda: [float(loss_in(call(self.model, batch), index)) for index, batch in enumerate(self.kept)])
        )
        return self._mean(losses)

    def _mean(self, losses: list[float]) -> float:
        """Over those of all processes."""
        everyone = [losses] if alone() else gathered(losses)
        return sum(map(math.fsum, everyone)) / max(1, sum(map(len, everyone)))


class _Added:
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
def _trials(reading: Reading, plan: InitPlan) -> Iterator[_LossAt]:
    """Inside, the yielded function gives losses; the model is as found afterwards."""
    sites = [site for site in reading.sites if site.name in plan.sites and plan.sites[site.name].rank > 0]
    added = _Added()
    with ExitStack() as stack:
        stack.enter_context(reading_mode(reading.request.model, sites, reading.request.batches or ()))
        stack.enter_context(torch.no_grad())
        for site in sites:
            handle = site.layer.register_forward_hook(added.hook(site, plan.sites[site.name]))
            stack.callback(handle.remove)
        yield _LossAt(reading, added)
