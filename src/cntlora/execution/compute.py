"""From the statistics to the plan of a model: which sites have what they need, their plans, and those that follow."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch

from ..messages import warn_caller
from ..methods.estimator import GradientReader
from ..model.checks import check_any_left, plain_without_gradient, report_missing
from ..model.lora_layers import lora_layers
from ..plan import FAR, InitPlan, SitePlan, weight_sketch
from ..report import far_cure
from ..version import VERSION
from .choice import with_method
from .reading import Statistics, read_statistics
from .site_plans import plan_sites
from .step_size import with_step_size

if TYPE_CHECKING:
    from ..model.sites import Site
    from ..model.ties import Tied
    from .arguments import Request
    from .executor import Executor


def make_plan(request: Request, executor: Executor) -> InitPlan:
    """Reads the data and works out the plan of all sites; changes nothing.

    Where there are several processes, all have to call it, and get the same plan.
    """
    with with_method(request, executor) as (request, choice):
        statistics = read_statistics(request, executor)
    part = plan_from(statistics)
    plan = executor.join(part, [site.name for site in statistics.sites])
    plan = replace(with_step_size(plan, statistics), choice=choice)
    if statistics.tied:
        order = [name for name, _ in lora_layers(request.model, request.adapter_name)]
        plan = _with_followers(plan, statistics.tied, order)
    _warn_of_far_starts(plan)
    return plan


def plan_from(statistics: Statistics) -> InitPlan:
    """Estimates, factors and ranks of the sites of this process, from what was read."""
    try:
        missing = statistics.request.on_missing
        left_plain = _without_tokens(statistics)
        report_missing(left_plain, missing)
        rest = [site for site in statistics.sites if site.name not in left_plain]
        without = _without_gradient(rest, statistics)
        left_plain |= plain_without_gradient(without, len(rest) - len(without), statistics.facts.batches, missing)
        rest = [site for site in rest if site.name not in left_plain]
        check_any_left(rest, left_plain)
        sites = plan_sites(rest, statistics)
    finally:
        statistics.budget.close()
    return InitPlan(
        sites=sites,
        config=statistics.config,
        skipped={**statistics.skipped, **left_plain},
        batches=statistics.facts.batches,
        seconds=time.perf_counter() - statistics.started,
        forward_seconds=statistics.seconds,
        versions={"cntlora": VERSION, "torch": torch.__version__},
        memory=asdict(statistics.budget.use),
        unreached=[name for name in statistics.unreached or () if name in sites],
    )


def _without_tokens(statistics: Statistics) -> dict[str, str]:
    """Sites that the data did not reach, with the reason."""
    if statistics.config.chosen.reads == "weights":
        return {}
    found, facts = {}, statistics.facts
    for site in statistics.sites:
        if not facts[site.name].calls:
            found[site.name] = f"its layer was not called in any of {facts.batches} batches; does this data reach it?"
        elif not facts[site.name].batches:
            found[site.name] = (
                f"it saw no token that counts in {facts.batches} batches; read more batches or check the masks"
            )
    return found


def _without_gradient(sites: list[Site], statistics: Statistics) -> list[str]:
    """Sites without a gradient, for the methods that read them."""
    estimator = statistics.estimator
    if not isinstance(estimator, GradientReader):
        return []
    own = statistics.executor.own(sites)
    has_gradient = statistics.merged({site.name: estimator.has_gradient(site.name) for site in own})
    return [site.name for site in sites if not has_gradient[site.name]]


def _with_followers(plan: InitPlan, tied: Sequence[Tied], order: Sequence[str]) -> InitPlan:
    """The plan with the sites that follow others: the same factors, crossed where they are.

    A collective where the weights of those sites are sharded.
    """
    sites, skipped, shared = dict(plan.sites), dict(plan.skipped), {}
    for follower in tied:
        name, leader = follower.site.name, follower.leader.name
        if leader in sites:
            sites[name] = _follower_plan(sites[leader], follower)
            shared[name] = leader
        else:
            skipped[name] = f"it shares its factors with {leader}: {skipped[leader]}"
    return replace(plan, sites={n: sites[n] for n in order if n in sites}, skipped=skipped, shared=shared)


def _follower_plan(leader: SitePlan, tied: Tied) -> SitePlan:
    A, B = (leader.B.mT, leader.A.mT) if tied.crossed else (leader.A, leader.B)
    W = tied.site.weight()
    return replace(
        leader,
        A=A.contiguous(),
        B=B.contiguous(),
        weight_norm=float(W.norm()),
        sketch=weight_sketch(W),
        seconds=0.0,
    )


def _warn_of_far_starts(plan: InitPlan) -> None:
    """Warns of starts whose ‖s·B·A‖/‖W‖ is far beyond what trained adapters reach."""
    far = plan.far_starts()
    if far:
        name, size = next(iter(far.items()))
        others = f" (and {len(far) - 1} more, see the report)" if len(far) > 1 else ""
        warn_caller(
            f"site {name}{others}: ‖s·B·A‖/‖W‖ of its start is {size:.3g}, expected at most {FAR:g}; trained adapters "
            f"stay far below, and such starts train badly; {far_cure(plan.config)}"
        )
