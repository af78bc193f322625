"""The only writer into a model: factors, ranks, scalings, DoRA magnitudes, base weights, and PEFT's own config.

All checks come before the first write. PEFT's layers are handled by their attributes, so that no PEFT version's
signatures matter; `peft_config` is brought in line with what the layers hold, so that PEFT saves and reloads it.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..interrupts import held_back
from ..plan import InitPlan, SitePlan
from ..report import InitReport
from .checks import check_fresh, check_writable
from .freezing import freeze_sites, unmask
from .holders import check_holders
from .layouts import weight_matrix, write_matrix
from .provenance import remember
from .sharded import address, reshard, write
from .sites import (
    Site,
    adapters_of,
    base_name,
    config_holder,
    factor_of,
    factor_slots,
    find_sites,
    lora_layers,
    naming_root,
    uses_rslora,
)
from .ties import Tied, groups, share, tied_as_planned

SUBTRACTED: Any = WeakIdKeyDictionary()
"""LoRA layer → {adapter: (A, B)} at step 0, where the base weight had s·B·A taken off."""


def apply_plan(model: nn.Module, plan: InitPlan, *, adapter_name: str = "default") -> InitReport:
    """Writes a plan into the adapter of a model: call it before the optimizer is made.

    Where the model is sharded by `fully_shard`, all processes have to call it, with the same plan.

    Raises:
        ValueError: if the plan is not for this model (names the site), the adapter is not fresh, a weight that would
            be changed is shared with another module or adapter, an optimizer or DistributedDataParallel already holds
            the parameters, or they are sharded and would change their rank; nothing is written then.
    """
    reshard(model)
    sites, _ = find_sites(model, adapter_name)
    usable = [s for s in sites if s.name not in plan.skipped]
    plan.check(usable)
    for site in usable:
        check_fresh(site)
        check_writable(site, plan.config)
    tied = {t.site.name: t for t in tied_as_planned(groups(model, usable, adapter_name), plan)}
    check_holders(usable, plan, {name for name, t in tied.items() if not t.whole})
    if plan.config.effective_base == "subtract":
        _check_alone(usable)
        _check_untied(model, usable)
    with held_back():  # Ctrl-C waits until the model is whole again
        with torch.no_grad():
            for site in sorted(usable, key=lambda site: site.name in tied):  # those that others follow come first
                _write(site, plan.sites[site.name], plan.config.effective_base, tied.get(site.name))
        _remove_empty(model, adapter_name, [s for s in usable if plan.sites[s.name].rank == 0])
        sync_config(model, adapter_name)
        if plan.config.effective_base == "offset":
            freeze_sites([s for s in usable if plan.sites[s.name].rank > 0])
    remember(model, plan, adapter_name)
    return InitReport.of(plan)


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
        share(tied)
    layer.r[adapter] = planned.file_rank
    if adapter in layer.lora_A:
        kind = "channels" if hasattr(layer.lora_A[adapter], "out_channels") else "features"
        setattr(layer.lora_A[adapter], f"out_{kind}", planned.file_rank)
        setattr(layer.lora_B[adapter], f"in_{kind}", planned.file_rank)
    layer.lora_alpha[adapter] = whole(planned.alpha)
    layer.scaling[adapter] = planned.scaling
    if hasattr(layer, "use_rslora"):
        layer.use_rslora[adapter] = planned.use_rslora
    added = planned.scaling * (B.double() @ A.double())
    if base == "subtract":
        write_matrix(site.base, weight_matrix(site.base).double() - added)
        SUBTRACTED.setdefault(layer, {})[adapter] = (A, B)
    if site.magnitude is not None:
        # DoRA divides by ‖W + s·B·A‖ per output: with m equal to it, its function starts as that of W + s·B·A
        total = site.weight()
        if base in ("subtract", "keep"):
            total += added
        write(site.magnitude, torch.linalg.vector_norm(total, dim=1).reshape(site.magnitude.shape))


def _put(owner: Any, name: str, value: Tensor) -> None:
    """Writes a factor; the parameter stays the same object where the shape allows, else a new one takes its place."""
    old = factor_of(owner, name)
    unmask(old)
    if old.numel() == value.numel():
        write(old, value.reshape(old.shape))
    else:
        value = shaped_like(old, value)
        setattr(owner, name, nn.Parameter(value.clone(), requires_grad=old.requires_grad))


def shaped_like(factor: Tensor, value: Tensor) -> Tensor:
    """A (rank, d) or B (k, rank), of any rank, in the shape of a factor: (rank, channels, *kernel), or (k, rank, 1, …).

    The kernel of B has one position, so that its shape after the second dimension is all ones.
    """
    rest = factor.shape[1:] if factor.shape[1:].numel() == value.shape[1] else (value.shape[1], *factor.shape[2:])
    return value.reshape(value.shape[0], *rest)


def whole(value: float) -> int | float:
    """2.0 as 2: `lora_alpha` is a whole number wherever it can be."""
    return round(value) if abs(value - round(value)) < 1e-9 else value


def _check_alone(sites: list[Site]) -> None:
    for site in sites:
        others = sorted(adapters_of(site.layer) - {site.adapter})
        if others:
            raise ValueError(
                f"site {site.name}: it also has adapter {others[0]!r}, and base 'subtract' changes the weight that "
                "both stand on; use base='offset', which leaves it alone"
            )


def _check_untied(model: nn.Module, sites: list[Site]) -> None:
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(address(parameter), []).append(path)
    for site in sites:
        shared = owners.get(address(site.stored), [])
        if len(shared) > 1:
            raise ValueError(
                f"site {site.name}: its weight is shared with another module ({', '.join(shared)}), so base "
                "'subtract' would change that too; use base='offset' or leave it out of target_modules"
            )


def _remove_empty(model: nn.Module, adapter: str, sites: list[Site]) -> None:
    """Takes the adapter off the sites that won no rank; a layer without any adapter becomes its base layer again."""
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


def sync_config(model: nn.Module, adapter: str) -> None:
    """Brings `peft_config[adapter]` in line with the layers, so that saving and reloading gives the same model.

    The commonest rank and its alpha become `r` and `lora_alpha`; every other site gets a pattern with its anchored full
    name (PEFT matches patterns by suffix, and `foo` would also catch `bar.foo`). `target_modules` becomes the list of
    the sites where some lost their adapter. A bare module without a config is left alone.
    """
    holder = config_holder(model, adapter)
    if holder is None:
        return
    _own_config(model, adapter)
    config: Any = holder[1].peft_config[adapter]  # type: ignore[index,union-attr]
    layers = dict(lora_layers(model, adapter))
    config.use_rslora = all(uses_rslora(layer, adapter) for layer in layers.values())
    shapes = {n: (int(x.r[adapter]), _alpha(x, adapter, config.use_rslora)) for n, x in layers.items()}
    config.r, config.lora_alpha = Counter(shapes.values()).most_common(1)[0][0]
    config.rank_pattern = {anchored(n): r for n, (r, _) in shapes.items() if r != config.r}
    config.alpha_pattern = {anchored(n): a for n, (_, a) in shapes.items() if a != config.lora_alpha}
    config.target_modules = selecting(model, adapter, config.target_modules)
    if isinstance(config.target_modules, str):
        config.layers_to_transform = config.layers_pattern = None  # PEFT takes them with a list only


def _own_config(model: nn.Module, adapter: str) -> None:
    """A copy in place of the config, which the caller may use again, and which TRL's adapter "ref" shares."""
    dicts = {id(c): c for c in (getattr(m, "peft_config", None) for m in model.modules()) if isinstance(c, dict)}
    copies: dict[int, Any] = {}
    for configs in dicts.values():
        if adapter in configs:
            old = configs[adapter]
            configs[adapter] = copies[id(old)] = copies.get(id(old)) or copy.deepcopy(old)


def _alpha(layer: Any, adapter: str, use_rslora: bool) -> int | float:
    """The alpha that gives a layer its scaling by the rule of the config, where some layers use rsLoRA and some not."""
    alpha, rank = float(layer.lora_alpha[adapter]), int(layer.r[adapter])
    own = uses_rslora(layer, adapter)
    return whole(alpha if own == use_rslora else alpha * (rank**0.5 if own else rank**-0.5))


def anchored(name: str) -> str:
    """A pattern that matches this module and no other."""
    return f"^{re.escape(name)}"


def selecting(model: nn.Module, adapter: str, targets: Any) -> Any:
    """`target_modules` that selects exactly the layers that have the adapter: the old value if it still does, else
    their names, else one regex."""
    layers = dict(lora_layers(model, adapter))
    # bare parameters have a list of their own, and the projection inside an attention layer comes with that layer
    inside = {name for name in layers if name.rpartition(".")[0] in layers}
    names = [n for n, layer in layers.items() if n not in inside and not hasattr(layer, "parameter_name")]
    root = naming_root(model, adapter)
    paths = {path.removeprefix(root) for path, _ in model.named_modules() if path.startswith(root)}
    candidates = {base_name(path) for path in paths if ".lora_" not in path} - {""}
    if _selected(targets, candidates) == set(names):
        return targets
    if _selected(set(names), candidates) == set(names):
        return set(names)
    return "|".join(re.escape(name) for name in names)


def _selected(targets: Any, candidates: set[str]) -> set[str]:
    """The modules that PEFT would adapt for a value of `target_modules`."""
    if isinstance(targets, str):
        return set() if targets == "all-linear" else {c for c in candidates if re.fullmatch(targets, c)}
    endings = tuple(f".{t}" for t in targets or ())
    return {c for c in candidates if c in (targets or ()) or c.endswith(endings)} if endings else set()
