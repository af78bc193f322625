"""Checks before any data is read: which sites can be initialised, and whether their adapters can hold the factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..messages import quoted, warn_caller
from .layouts import INSIDE_ATTENTION
from .lora_layers import config_holder, factor_of, factor_slots
from .offloaded import fetched
from .sharded import check_rank
from .ties import Group, Tied, groups, leader_of, owners_of

if TYPE_CHECKING:
    from ..config import InitConfig
    from .sites import Site

FoundSites = tuple[list["Site"], dict[str, str]]
"""The sites of a model, and the layers that cannot be one with the reason (`sites.find_sites`)."""


def usable_sites(
    model: nn.Module, found: FoundSites, adapter: str, config: InitConfig, on_missing: str
) -> tuple[list[Site], list[Tied], dict[str, str]]:
    """The sites to be initialised, those that share the factors of one of them, and those that cannot be, with why."""
    sites, refused = found[0], dict(found[1])
    shared = groups(model, sites, adapter)
    holder = config_holder(model, adapter)
    lora: Any = None if holder is None else holder[1].peft_config[adapter]  # type: ignore[index,union-attr]
    started_by = getattr(lora, "init_lora_weights", True)
    if started_by not in (True, False, "gaussian"):
        raise ValueError(
            f"adapter {adapter!r} was made with init_lora_weights={quoted(started_by)}; expected True, so that the "
            "base is untouched and nothing else below. Make the adapter again with init_lora_weights=True"
        )
    method = config.chosen
    factors_weight = method.reads != "gradients" and not method.zero_start
    tied = {t.site.name: t for group in shared for t in group.led_by(leader_of(group, method.reads))}
    refused |= _unfit(shared, config)
    owners = owners_of(model)
    for site in sites:
        check_fresh(site)
        if site.name in refused or site.name in tied:
            continue
        reason = _out_of_reach(owners, site, config)
        if reason is not None:
            refused[site.name] = reason
        elif factors_weight and not _has_values(site):
            refused[site.name] = "its pretrained weight is all zeros, so every estimate is zero; leave it out"
    refused |= {
        name: f"it shares its factors with {t.leader.name}: {refused[t.leader.name]}"
        for name, t in tied.items()
        if t.leader.name in refused and name not in refused
    }
    report_missing(refused, on_missing)
    own = [site for site in sites if site.name not in refused and site.name not in tied]
    check_any_left(own, refused)
    return own, [t for name, t in tied.items() if name not in refused], refused


def gradient_refusal(
    model: nn.Module, found: FoundSites, adapter: str, gradients: InitConfig, inputs: InitConfig
) -> str | None:
    """Return why a method that reads gradients lacks a site that one that reads inputs has; None if it lacks none."""
    sites, refused = found
    shared = groups(model, sites, adapter)
    either = refused | _unfit(shared, inputs)
    for name, reason in _unfit(shared, gradients).items():
        if name not in either:
            return f"site {name}: {reason}"
    owners = owners_of(model)
    for site in sites:
        refusal = _out_of_reach(owners, site, gradients)
        if refusal is not None and site.name not in either and _out_of_reach(owners, site, inputs) is None:
            return f"site {site.name}: {refusal}"
    return None


def _unfit(found: Iterable[Group], config: InitConfig) -> dict[str, str]:
    """The sites that share factors and cannot be initialised as one, with the reason."""
    refused = {}
    for group in found:
        reason = group.unfit
        if reason is None and config.chosen.reads == "gradients":
            reason = (
                f"{' and '.join(site.name for site in group.sites)} share one set of factors, whose gradient is that "
                f"of all of them together, which method {config.chosen.name!r} does not read; take a method that reads "
                "the inputs or the weights, or give each layer its own"
            )
        if reason is not None:
            refused.update({site.name: reason for site in group.sites})
    return refused


def _out_of_reach(owners: Mapping[int, list[str]], site: Site, config: InitConfig) -> str | None:
    """Return why a method cannot read what it needs of a site, or its adapter not hold what it gives, or None.

    Args:
        owners: from `owners_of`.
    """
    if config.adaptive_ranks and site.unseen == INSIDE_ATTENTION:
        return (
            "PEFT's files have one rank for both projections of an nn.MultiheadAttention, and adaptive_ranks gives "
            "each its own; leave it out of target_modules, or take the same rank everywhere"
        )
    reads = config.chosen.reads
    if reads == "weights":
        return None
    if site.unseen is not None:
        return f"method {config.chosen.name!r} reads {reads}, and {site.unseen}"
    if reads == "inputs":
        return None
    if site.fixed is not None:
        return f"method {config.chosen.name!r} reads the gradient by its weight, and {site.fixed}; take another method"
    tied = owners.get(id(site.stored), [])
    if len(tied) > 1:
        return (
            f"method {config.chosen.name!r} reads the gradient by its weight, which is tied ({', '.join(tied)}), so "
            "that the gradient is that of all of them; untie it, take another method or leave it out of target_modules"
        )
    return None


def _has_values(site: Site) -> bool:
    """Return whether a weight is not all zeros; one that is not plain values on a device is read for that."""
    return bool((site.stored.detach() if site.fixed is None else site.weight(site.dtype)).any())


def check_writable(site: Site, config: InitConfig) -> None:
    """Raise ValueError where what would have to be written cannot be."""
    if site.A.device.type == "meta":
        raise ValueError(
            f"site {site.name}: its adapter is offloaded (accelerate), in memory during a call only; make the plan "
            "with compute_plan here, save it, and apply it to the model before it is dispatched"
        )
    check_base(site, config)


def check_base(site: Site, config: InitConfig) -> None:
    """Raise ValueError where a site cannot have the base policy: what it would write, or what PEFT makes of it."""
    base = config.effective_base
    if site.unseen == INSIDE_ATTENTION and base in ("subtract", "keep") and not config.chosen.zero_start:
        raise ValueError(
            f"site {site.name}: PEFT adds the LoRA of the output projection of an nn.MultiheadAttention twice, so that "
            f"base {base!r} would not start where it should; use base='offset' or 'paired'"
        )
    if base == "subtract" and site.fixed is not None:
        raise ValueError(
            f"site {site.name}: {site.fixed}, and base 'subtract' would have to write into it; use base='offset', "
            "which leaves it alone"
        )


def check_fresh(site: Site) -> None:
    """Raise ValueError if the adapter has been trained, initialised before, or merged: nothing may be lost."""
    if site.adapter in getattr(site.layer, "merged_adapters", ()):
        raise ValueError(
            f"site {site.name}: adapter {site.adapter!r} is merged into the base; call unmerge_adapter() first"
        )
    # PEFT starts an embedding with A = 0, everything else with B = 0
    plain = site.adapter in site.layer.lora_A
    half = "lora_B" if plain else "lora_embedding_A"
    owner, name = factor_slots(site.layer, site.adapter)[1 if plain else 0]
    with fetched(owner):
        fresh = not bool((factor_of(owner, name).detach() != 0).any())
    if not fresh:
        raise ValueError(
            f"site {site.name}: adapter {site.adapter!r} is not fresh (its {half} is not zero), and initialising would "
            "overwrite it; make a new adapter with init_lora_weights=True"
        )


def check_adapter(site: Site, config: InitConfig) -> None:
    """Raise ValueError where the rank or the scaling that the adapter has cannot hold the factors."""
    check_base(site, config)
    if config.effective_base == "offset" and not config.adaptive_ranks:
        check_rank(site.name, site.A, 2 * site.rank)
    width = config.chosen.width
    most = min(site.in_features, site.out_features) // width
    if site.rank > most and not config.adaptive_ranks:
        limit = "min(in, out)" if width == 1 else f"min(in, out)/{width}, which {config.chosen.name} needs"
        raise ValueError(f"site {site.name}: rank {site.rank} is above {limit} = {most}; lower r")
    if (site.scaling <= 0 and not config.fold_alpha) or config.chosen.strength_at(site.scaling) <= 0:
        raise ValueError(
            f"site {site.name}: scaling {site.scaling:g} cannot carry strength·[ΔW]_r; expected lora_alpha above 0 "
            "(or fold_alpha=True, which sets the scaling to 1, with a strength)"
        )


def report_missing(problems: Mapping[str, str], on_missing: str) -> None:
    if not problems:
        return
    name, reason = next(iter(problems.items()))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    message = f"site {name} cannot be initialised: {reason}{more}"
    if on_missing == "raise":
        raise ValueError(f"{message}. Or leave such sites as plain LoRA with on_missing='warn'")
    warn_caller(f"{message}; left as plain LoRA")


def check_any_left(sites: Sequence[Site], problems: Mapping[str, str]) -> None:
    """Raise ValueError where nothing is left: a call that initialises nothing must not look like one that worked."""
    if not sites:
        name, reason = next(iter(problems.items()))
        raise ValueError(
            f"none of the {len(problems)} adapted layers can be initialised, on_missing='warn' leaves nothing to do; "
            f"the first is site {name}: {reason}"
        )
