"""`compute_plan`: sites → what the method reads → factors and ranks → plan. Changes nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from ..config import InitConfig
from ..data.batches import Forward
from ..data.collect import Seen
from ..data.memory import MaxMemory
from ..data.padding import TokenMask
from ..messages import warn_caller
from ..methods.estimator import GradientReader
from ..model.checks import check_any_left, leave_silent, report_missing
from ..model.lora_layers import lora_layers
from ..model.sharded import is_split
from ..model.sites import Site
from ..model.ties import Tied
from ..plan import FAR, InitPlan, SitePlan, weight_sketch
from ..report import far_cure
from ..version import VERSION
from .assemble import Alone, Share, Work, plan_sites
from .passes import Again, Passes
from .reading import Loss, Reading, Request, read
from .sizing import sized


def compute_plan(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    config: InitConfig | None = None,
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
    token_mask: TokenMask = None,
    adapter_name: str = "default",
    on_missing: str = "raise",
    progress: bool = True,
    max_memory: MaxMemory = None,
    weights: str | os.PathLike[str] | None = None,
) -> InitPlan:
    """Reads the weights and the first `config.num_batches` batches and works out the factors; changes nothing.

    Args:
        model: carries LoRA layers with the adapter `adapter_name`, freshly made (B = 0).
        batches: iterable of mappings, tuples or tensors, of any batch size; only its first batches are read. May be
            None for the methods that read the weights alone (lora, pissa, olora), which never look at it.
        config: the choices; None for the defaults.
        forward: how to call the model, `forward(model, batch)`; None for model(**batch), (*batch) or (batch).
        loss: for the methods that read gradients (descent, lora_ga, lora_one): `loss(model, batch)`, a scalar; None for
            the loss in the model's own output, which transformers models give when the batch has labels.
        token_mask: which tokens count. None for the masks in the batch, each for its own stream of tokens; without one,
            the decoder of an encoder-decoder model counts tokens with a label other than −100. "labels" for those with
            a label besides, "none" for all. Or a function of the batch that returns a (batch, tokens) mask, or a
            mapping from streams ("text", "decoder", "encoder", "frames") or site names to masks (None: all count).
            For methods that read gradients, tokens that the loss does not reach do not count either, where the labels
            tell them: with the model's own loss, not with `loss`, where the masks alone decide.
        adapter_name: of the adapter, where the model has several.
        on_missing: "raise" if a target cannot be initialised, or "warn" and leave it plain LoRA. With methods that
            read gradients, sites without one stay plain LoRA with a warning in either case, unless they are most.
        progress: show a bar on a terminal.
        max_memory: bound on what the statistics take beside the model and its forward pass: bytes or "6GiB" on the
            model's device, or {"device": …, "cpu": …, "disk": …}. What does not fit on the device goes to the
            processor's memory, then into a temporary file (only if "disk" is named), and else waits for another pass
            over the same batches, which are kept for that. The plan is the same: every sum has the same terms in the
            same order. None for no bound.
        weights: a safetensors file, or a folder of them, that W is read from, one layer at a time, in place of the
            model: that of the unquantised model where this one is quantised. None to take the model's own.

    Raises:
        ValueError, TypeError: with the site or batch, what was expected, what came and what to change.
    """
    if is_split(model):
        raise ValueError(
            "the model's weights are split over several processes, which have to make the plan together: call "
            "initialize on all of them, or compute_plan on the model before it is sharded"
        )
    request = Request(
        model, batches, config, forward, loss, token_mask, adapter_name, on_missing, progress, max_memory,
        weights=weights,
    )  # fmt: skip
    found = read(request)
    return complete(sized(plan_from(found), found), found)


def complete(plan: InitPlan, reading: Reading) -> InitPlan:
    """The plan with the sites that share the factors of others; warns of starts that are far out.

    A collective where the weights of those sites are sharded.
    """
    request = reading.request
    order = [name for name, _ in lora_layers(request.model, request.adapter_name)]
    return _warn_of_far_starts(_with_followers(plan, reading.tied, order) if reading.tied else plan)


def plan_from(reading: Reading, share: Share | None = None, again: Again | None = None) -> InitPlan:
    """The second half of `compute_plan`: estimates, factors and ranks from what was read.

    Args:
        share: how the sites are shared with other processes; the plan then holds those of this process alone.
        again: reads the batches again for the sites that waited; by default `reading.again`.
    """
    share = share or Alone()
    try:
        missing = reading.request.on_missing
        starved = _starved(reading.sites, reading.seen, reading.work)
        report_missing(starved, missing)
        silent = _silent([s for s in reading.sites if s.name not in starved], reading.work, share)
        heard = len(reading.sites) - len(starved) - len(silent)
        starved |= leave_silent(silent, heard, reading.seen.batches, missing)
        fed = [site for site in reading.sites if site.name not in starved]
        check_any_left(fed, starved)
        if reading.work.config.method.reads != "weights":
            share = Passes(share, reading.budget, again or reading.again)
        sites = plan_sites(fed, reading.work, reading.seen, share)
    finally:
        reading.budget.close()
    return InitPlan(
        sites=sites,
        config=reading.work.config,
        skipped={**reading.skipped, **starved},
        batches=reading.seen.batches,
        seconds=time.perf_counter() - reading.started,
        forward_seconds=reading.seconds,
        versions={"cntlora": VERSION, "torch": torch.__version__},
        memory=asdict(reading.budget.held),
        unreached=[name for name in reading.unreached if name in sites],
    )


def _starved(sites: list[Site], seen: Seen, work: Work) -> dict[str, str]:
    """Sites that the data did not reach, with the reason."""
    if work.config.method.reads == "weights":
        return {}
    return {s.name: _starved_reason(s.name, seen) for s in sites if not seen.site_batches.get(s.name)}


def _silent(sites: list[Site], work: Work, share: Share) -> list[str]:
    """Sites without a gradient, for the methods that read them."""
    estimator = work.estimator
    if not isinstance(estimator, GradientReader):
        return []
    heard = share.everyone({s.name: estimator.has_gradient(s.name) for s in share.mine(sites)})
    return [s.name for s in sites if not heard[s.name]]


def _starved_reason(name: str, seen: Seen) -> str:
    if name not in seen.tokens:
        return f"its layer was not called in any of {seen.batches} batches; does this data reach it?"
    return f"it saw no token that counts in {seen.batches} batches; read more batches or check the masks"


def _with_followers(plan: InitPlan, tied: Sequence[Tied], order: Sequence[str]) -> InitPlan:
    """The plan with the sites that follow others: the same factors, crossed where they are."""
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


def _warn_of_far_starts(plan: InitPlan) -> InitPlan:
    """Warns of starts whose ‖s·B·A‖/‖W‖ is far beyond what trained adapters reach; returns the plan."""
    far = plan.far_starts()
    if far:
        name, size = next(iter(far.items()))
        others = f" (and {len(far) - 1} more, see the report)" if len(far) > 1 else ""
        warn_caller(
            f"site {name}{others}: ‖s·B·A‖/‖W‖ of its start is {size:.3g}, expected at most {FAR:g}; trained adapters "
            f"stay far below, and such starts train badly; {far_cure(plan.config)}"
        )
    return plan
