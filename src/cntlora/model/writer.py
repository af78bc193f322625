"""The only writer into a model: factors, ranks, scalings, DoRA magnitudes, base weights, and PEFT's own config.

All checks come before the first write. PEFT's layers are handled by their attributes, so that no PEFT version's
signatures matter; `peft_config` is brought in line with what the layers hold, so that PEFT saves and reloads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..interrupts import interrupts_deferred
from .checks import check_fresh, check_writable
from .freezing import freeze_sites, unmask
from .heads import check_head, write_head
from .holders import check_alone, check_holders
from .layouts import shaped_like, weight_matrix, write_matrix
from .lora_layers import adapters_of, factor_of, factor_slots
from .peft_config import as_integer, sync_config
from .provenance import remember, remember_subtracted, start_of, subtracted_from
from .sharded import address, full, is_partitioned, reshard, write
from .sites import Site, find_sites
from .ties import Tied, groups, tie_factors, tied_as_planned

if TYPE_CHECKING:
    from ..plan import InitPlan
    from ..site_plan import SitePlan


def write_plan(model: nn.Module, plan: InitPlan, adapter_name: str = "default") -> None:
    """Write a plan into the adapter of a model (`cntlora.apply_plan`)."""
    reshard(model)
    sites, _ = find_sites(model, adapter_name)
    usable = [s for s in sites if s.name not in plan.skipped]
    plan.check(usable)
    for site in usable:
        check_fresh(site)
        check_writable(site, plan.config)
    tied = {t.site.name: t for t in tied_as_planned(groups(model, usable, adapter_name), plan)}
    check_holders(usable, plan, {name for name, t in tied.items() if not t.shares_memory})
    if plan.config.effective_base == "subtract":
        check_alone(model, usable)
    if plan.head is not None:
        check_head(model, plan.head, adapter_name)
    with interrupts_deferred():  # Ctrl-C waits until the model is whole again
        with torch.no_grad():
            for site in sorted(usable, key=lambda site: site.name in tied):  # those that others follow come first
                _write(site, plan.sites[site.name], plan.config.effective_base, tied.get(site.name))
        if plan.head is not None:
            write_head(model, plan.head, adapter_name)
        _remove_empty(model, adapter_name, [s for s in usable if plan.sites[s.name].rank == 0])
        sync_config(model, adapter_name)
        if plan.config.effective_base == "offset":
            freeze_sites([s for s in usable if plan.sites[s.name].rank > 0])
    remember(model, plan, adapter_name)


def change_rate(model: nn.Module, factor: float, adapter_name: str = "default") -> None:
    """Put an adapter into the units in which AdamW at a rate does what it did at `factor` times that rate.

    A and B are divided by the factor and the scaling multiplied by its square (`cntlora.fit_learning_rate`).

    Raises:
        ValueError: if the base weights had the start taken off (base "subtract"): saving needs it as it was.
    """
    sites, _ = find_sites(model, adapter_name)
    for site in sites:
        if subtracted_from(site.layer, adapter_name) is not None:
            raise ValueError(
                f"site {site.name}: base 'subtract' took its start off the weight, and a saved adapter is worked out "
                "from the factors of that start; use base='offset'"
            )
        for parameter in (site.A, site.B):
            if parameter.device.type == "meta" or is_partitioned(parameter):
                raise ValueError(
                    f"site {site.name}: its adapter is offloaded or partitioned; fit it before the model is dispatched"
                )
    with interrupts_deferred(), torch.no_grad():
        for parameter in {address(p): p for site in sites for p in (site.A, site.B)}.values():  # tied ones once
            parameter.div_(factor)
        for site in sites:
            site.layer.scaling[adapter_name] *= factor**2
            site.layer.lora_alpha[adapter_name] = as_integer(site.layer.lora_alpha[adapter_name] * factor**2)
        sync_config(model, adapter_name)


def freeze_offset(model: nn.Module, adapter_name: str = "default") -> int:
    """Freeze the negative half of an adapter of base "offset": its gradients are zero from now on.

    `initialize` and `apply_plan` do this themselves, and loading a checkpoint into such a model keeps it. Call it

    - if the adapter is loaded from a file into a new model (`PeftModel.from_pretrained(..., is_trainable=True)`),
      because a file of an ordinary LoRA cannot say that half of it is frozen;
    - after `copy.deepcopy(model)` or `load_state_dict(..., assign=True)`, which make new parameters.

    Calling it twice does no harm. After `fully_shard` (FSDP2) it is not needed: the sharded parameters take the mask.

    Gradients are masked before they are accumulated, so gradient accumulation, clipping and DDP see the masked ones.
    Decoupled weight decay (AdamW) shrinks both halves alike, so that the directions that did not train keep cancelling.

    Call it for adapters of base "offset" only: a file does not distinguish them from those of "paired", whose halves
    both train.

    Returns:
        The number of sites.

    Raises:
        ValueError: if a site has an odd rank, so that it has no two halves, or a second half of B that is zero, if the
            halves of A are unrelated at every site, or the adapter was initialised in this process with another base.
    """
    reshard(model)
    sites, _ = find_sites(model, adapter_name)
    for site in sites:
        if site.A.shape[0] % 2:
            raise ValueError(
                f"site {site.name}: rank {site.A.shape[0]} is odd; base 'offset' writes 2r. Is it another base?"
            )
        if not bool(full(site.B)[:, site.A.shape[0] // 2 :].any()):
            raise ValueError(
                f"site {site.name}: the second half of its lora_B is zero, where base 'offset' writes −B; an adapter "
                "that starts at B = 0 (plain LoRA, eva) has no half to freeze"
            )
    start = start_of(model, adapter_name)
    if start is not None and start.base != "offset":
        how = "starts at B = 0" if start.base == "zero" else f"was initialised with base {start.base!r}"
        raise ValueError(
            f"adapter {adapter_name!r} {how}, where all of the rank trains; freeze_offset is for base 'offset' alone"
        )
    if start is None and sites and all(_halves_unrelated(site) for site in sites):
        raise ValueError(
            f"site {sites[0].name}: the halves of its A are unrelated, where base 'offset' writes one twice; is "
            f"adapter {adapter_name!r} of base 'keep', all of which trains? freeze_offset is for base 'offset' alone"
        )
    freeze_sites(sites)
    return len(sites)


def _halves_unrelated(site: Site) -> bool:
    """Return whether the cosine of the halves of A is below what training leaves of two equal ones."""
    first, second = full(site.A).detach().double().chunk(2)
    return bool((first * second).sum().abs() < 0.1 * first.norm() * second.norm())


def _write(site: Site, planned: SitePlan, base: str, tied: Tied | None) -> None:
    if planned.rank == 0:
        return
    layer, adapter = site.layer, site.adapter
    A, B = (M.to(device=site.A.device, dtype=site.A.dtype, copy=True) for M in (planned.A, planned.B))
    if tied is None:
        _put(*factor_slots(layer, adapter)[0], A)
        _put(*factor_slots(layer, adapter)[1], B)
    else:
        unmask(site.A)
        unmask(site.B)
        tie_factors(tied)
    layer.r[adapter] = planned.file_rank
    if adapter in layer.lora_A:
        kind = "channels" if hasattr(layer.lora_A[adapter], "out_channels") else "features"
        setattr(layer.lora_A[adapter], f"out_{kind}", planned.file_rank)
        setattr(layer.lora_B[adapter], f"in_{kind}", planned.file_rank)
    layer.lora_alpha[adapter] = as_integer(planned.alpha)
    layer.scaling[adapter] = planned.scaling
    if hasattr(layer, "use_rslora"):
        layer.use_rslora[adapter] = planned.use_rslora
    added = planned.scaling * (B.double() @ A.double())
    if base == "subtract":
        write_matrix(site.base, weight_matrix(site.base).double() - added)
        remember_subtracted(layer, adapter, A, B)
    if site.magnitude is not None:
        # DoRA divides by ‖W + s·B·A‖ per output: with m equal to it, its function starts as that of W + s·B·A
        total = site.weight()
        if base in ("subtract", "keep"):
            total += added
        write(site.magnitude, torch.linalg.vector_norm(total, dim=1).reshape(site.magnitude.shape))


def _put(owner: Any, name: str, value: Tensor) -> None:
    """Write a factor; the parameter stays the same object where the shape allows, else a new one takes its place."""
    old = factor_of(owner, name)
    unmask(old)
    if old.numel() == value.numel():
        write(old, value.reshape(old.shape))
    else:
        value = shaped_like(old, value)
        setattr(owner, name, nn.Parameter(value.clone(), requires_grad=old.requires_grad))


def _remove_empty(model: nn.Module, adapter: str, sites: list[Site]) -> None:
    """Take the adapter off the sites that won no rank; a layer without any adapter becomes its base layer again."""
    layers = {id(site.layer) for site in sites}
    for site in sites:
        names = (*site.layer.adapter_layer_names, *site.layer.other_param_names, "lora_variant")
        for name in names:
            held = getattr(site.layer, name, None)
            if held is not None and adapter in held:
                del held[adapter]
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if id(child) in layers and not adapters_of(child):
                setattr(parent, key, child.get_base_layer())  # type: ignore[operator]
