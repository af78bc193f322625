"""What is looked at before any data is read: which sites can be initialised, and whether their adapters can hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .config import InitConfig
from .core.family import METHODS
from .notices import warn_caller
from .sharded import check_rank
from .sites import Site, config_holder, find_sites


def usable_sites(
    model: nn.Module, adapter: str, config: InitConfig, on_missing: str
) -> tuple[list[Site], dict[str, str]]:
    sites, refused = find_sites(model, adapter)
    holder = config_holder(model, adapter)
    lora: Any = None if holder is None else holder[1].peft_config[adapter]  # type: ignore[index,union-attr]
    started_by = getattr(lora, "init_lora_weights", True)
    if started_by not in (True, False, "gaussian"):
        raise ValueError(
            f"adapter {adapter!r} was made with init_lora_weights={started_by!r}; expected True, so that the base is "
            "untouched and no other initialisation is on top. Make the adapter again with init_lora_weights=True"
        )
    method = METHODS[config.method]
    factors_weight = method.reads != "gradients" and not method.zero_start
    for site in sites:
        check_fresh(site)
        if factors_weight and not bool(site.base.weight.detach().any()):
            refused[site.name] = "its pretrained weight is all zeros, so every estimate is zero; leave it out"
    report_missing(refused, on_missing)
    return [site for site in sites if site.name not in refused], refused


def check_fresh(site: Site) -> None:
    """Raises ValueError if the adapter has been trained, initialised before, or merged: nothing may be lost."""
    if site.adapter in getattr(site.layer, "merged_adapters", ()):
        raise ValueError(
            f"site {site.name}: adapter {site.adapter!r} is merged into the base; call unmerge_adapter() first"
        )
    if bool((site.B.detach() != 0).any()):
        raise ValueError(
            f"site {site.name}: adapter {site.adapter!r} is not fresh (its lora_B is not zero), and initialising would "
            "overwrite it; make a new adapter with init_lora_weights=True"
        )


def check_adapter(site: Site, config: InitConfig) -> None:
    """Raises ValueError where the rank or the scaling that the adapter has cannot hold the factors."""
    if config.effective_base == "offset" and not config.adaptive_ranks:
        check_rank(site.name, site.A, 2 * site.rank)
    width = METHODS[config.method].width
    most = min(site.in_features, site.out_features) // width
    if site.rank > most and not config.adaptive_ranks:
        limit = "min(in, out)" if width == 1 else f"min(in, out)/{width}, which {config.method} needs"
        raise ValueError(f"site {site.name}: rank {site.rank} is above {limit} = {most}; lower r")
    if (site.scaling <= 0 and not config.fold_alpha) or config.strength_at(site.scaling) <= 0:
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
