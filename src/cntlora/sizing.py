"""How large a start is: descent's step gets the size that lowers the loss on the first batches most.

Those batches gave the directions too, so that the loss falls further on them than on others; but where it is lowest
depends on the curvature of the loss, and was found at the same size on others (docs/math.md).
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

from .adapters import shaped_like
from .agreement import agreed, alone, attempt, gathered
from .batches import default_forward, device_of, to_device, unwrapped
from .collect import reading_mode
from .core.factor import halves_cancel
from .core.family import METHODS
from .gradients import loss_in
from .plan import InitPlan, SitePlan
from .reading import Reading
from .sites import Site

SEARCHED = 4
"""Batches that the loss is the mean of, the first ones; each trial costs their forward passes."""
FIRST, LEAST, MOST = 2.0**-5, 2.0**-12, 0.5
"""Sizes: the first that is tried, and the smallest and the largest: half of a layer's norm is far for a start."""


def sized(plan: InitPlan, reading: Reading) -> InitPlan:
    """The plan with all factors B times one number, where its method leaves the size open; else the plan.

    Where several processes run, all have to call it with the same plan. The losses are those of all of them.

    Returns:
        A plan whose largest ‖scaling·B·A‖/‖W‖ is `strength`, or, where that is None, lowers the loss most.
    """
    config = plan.config
    if not METHODS[config.method].sized:
        return plan
    start = time.perf_counter()
    largest = max((s.start_norm / s.weight_norm for s in plan.sites.values() if s.weight_norm), default=0.0)
    if largest == 0:
        return plan
    if config.strength is not None:
        return _scaled(plan, config.strength / largest, {"size": config.strength})
    with _trials(reading, plan) as loss_at:
        found = search(lambda size: loss_at(size / largest))
        batches = loss_at.batches
    scaled = _scaled(plan, found["size"] / largest, {**found, "batches": batches})
    spent = time.perf_counter() - start
    return replace(scaled, seconds=plan.seconds + (spent if alone() else max(gathered(spent))))


def search(loss_at: Callable[[float], float]) -> dict[str, float]:
    """The size with the lowest loss: doubled from FIRST while that lowers the loss, or else halved while that does.

    A parabola through the best size and its two neighbours, in log₂ of the size, then places the minimum between them.
    """
    known = {0.0: loss_at(0.0)}

    def tried(size: float) -> float:
        if size not in known:
            value = loss_at(size)
            known[size] = value if math.isfinite(value) else math.inf
        return known[size]

    size = FIRST
    while size < MOST and tried(size) < known[0.0] and tried(2 * size) < known[size]:
        size *= 2
    while size <= FIRST and size > LEAST and (tried(size) >= known[0.0] or tried(size / 2) < known[size]):
        size /= 2
    between = size * 2 ** _vertex(*(known.get(s) for s in (size / 2, size, 2 * size)))
    best = min(size, between, key=tried)
    return {"size": best, "loss_before": known[0.0], "loss_after": tried(best), "trials": len(known)}


def _vertex(left: float | None, middle: float | None, right: float | None) -> float:
    """Where the parabola through (−1, left), (0, middle), (1, right) is lowest; 0 where a point is missing."""
    if left is None or middle is None or right is None or not math.isfinite(left + middle + right):
        return 0.0
    curvature = left - 2 * middle + right
    return 0.0 if curvature <= 0 else min(max((left - right) / (2 * curvature), -0.5), 0.5)


def _scaled(plan: InitPlan, factor: float, step: Mapping[str, float]) -> InitPlan:
    sites = {
        name: replace(site, B=site.B * factor, start_norm=site.start_norm * factor) for name, site in plan.sites.items()
    }
    return replace(plan, sites=sites, step=dict(step))


class _LossAt:
    """The mean loss of the first batches with the start of a plan times a factor."""

    def __init__(self, reading: Reading, added: _Added) -> None:
        self.request, self.added, self.seed = reading.request, added, reading.work.config.seed
        self.model = unwrapped(self.request.model)
        kept = list(islice(self.request.batches or (), min(SEARCHED, reading.seen.batches)))
        fewest = len(kept) if alone() else min(gathered(len(kept)))
        self.kept = [to_device(batch, device_of(self.model)) for batch in kept[:fewest]]
        self.batches = fewest if alone() else sum(gathered(fewest))

    def __call__(self, factor: float) -> float:
        self.added.factor = factor
        torch.manual_seed(self.seed)  # a loss that draws noise draws the same each time
        call = self.request.loss or self.request.forward or default_forward
        losses = agreed(
            attempt(lambda: [float(loss_in(call(self.model, batch), index)) for index, batch in enumerate(self.kept)])
        )
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
