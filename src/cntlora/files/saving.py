"""`save_adapter`: an ordinary LoRA folder for the pristine base, whatever `base` was."""

from __future__ import annotations

import copy
import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..execution.processes import on_first_process
from ..messages import warn_caller
from ..model.layouts import shaped_like
from ..model.lora_layers import base_name, config_holder, lora_paths, uses_rslora
from ..model.peft_config import anchored, as_integer, selecting
from ..model.provenance import Start, start_of, subtracted_from
from ..model.sharded import full, reshard, shards
from ..model.sites import Site, find_sites
from ..model.ties import Tied, asked_to_tie, groups, tied_embedding
from ..version import VERSION
from .adapter_folder import PREFIX, AdapterFiles, factor_keys, file_key, write_folder
from .class_names import class_names
from .model_card import SavedSites, card_section
from .public_names import public_name, public_values

if TYPE_CHECKING:
    from ..plan import InitPlan


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    fold_alpha: bool = True,
    plan: InitPlan | None = None,
    model_card: bool = True,
) -> None:
    """Save the adapter as an ordinary LoRA that plain PEFT loads on the untouched base model.

    The folder gets `adapter_config.json`, `adapter_model.safetensors` and a README.md that says how the adapter was
    initialised and which ranks it has; in an existing README.md only our own section, between two marks, is replaced.
    If a head is saved with the adapter and the model's configuration names its classes (`id2label`), id2label.json
    holds the names, for which PEFT's files have no place. No file holds a path of this machine. Of a base model from a
    local folder the configuration holds only the folder's name: load that model yourself.

    For base "subtract" the base weights in memory have s·B₀·A₀ subtracted, so the file holds [A; A₀] and [B, −B₀] of
    rank 2r, which is the same function on the pristine base. Adapters of other policies keep their rank.

    If the model is sharded by `fully_shard`, all processes have to call this, and the first one writes.

    Args:
        model: a PeftModel, a model with `add_adapter`, or a module that PEFT injected LoRA layers into.
        path: the folder. A new one appears complete or not at all; in an existing one each file is replaced at once.
        adapter_name: of the adapter.
        fold_alpha: rewrite the factors so that alpha = rank everywhere (scaling 1, no rsLoRA), which is right also for
            readers that ignore `alpha_pattern`. Of an adapter that is not trained yet this changes what a learning rate
            means in a training from the file, and a warning says so where every product B·A is still zero.
        plan: for base "subtract", if the model in memory is not the object that was initialised (resumed in another
            process, or copied): the plan that was applied then. The model card describes it too.
        model_card: whether README.md is written.

    Raises:
        ValueError: if the model has no such adapter, or no PEFT configuration for it.
        OSError: if the folder cannot be written, such as on a full disk; existing files stay as they were.
    """
    reshard(model)
    sharded = shards(model)
    files = _files(model, adapter_name, fold_alpha, plan, model_card)
    if sharded:
        on_first_process(lambda: write_folder(Path(path), files))
    else:
        write_folder(Path(path), files)


def _files(model: nn.Module, adapter: str, fold_alpha: bool, plan: InitPlan | None, card: bool) -> AdapterFiles:
    """Weights, configuration and section of the model card; a collective where the model is sharded."""
    sites, _ = find_sites(model, adapter)  # says which adapters there are, if not this one
    holder = config_holder(model, adapter)
    if holder is None:
        raise ValueError(
            f"the model has LoRA layers but no PEFT configuration for adapter {adapter!r}, so there is none to "
            "save; put the LoRA in with get_peft_model, add_adapter or inject_adapter_in_model"
        )
    state = _state(model, holder[1], adapter)
    held = {key.partition(".lora_")[0] for key in state}
    paths = {base_name(inner, layer): f"{PREFIX}{inner}." for inner, layer in lora_paths(model, adapter)}
    pairs = [t for g in groups(model, sites, adapter) if not g.unfit for t in g.led_by(g.sites[0].name)]
    pairs = [t for t in pairs if _as_one(state, paths, t)]
    shapes = {}
    folded = 1.0
    config: Any = holder[1].peft_config[adapter]  # type: ignore[index,union-attr]
    for inner, layer in lora_paths(model, adapter):
        name = base_name(inner, layer)
        if PREFIX + inner not in held:
            raise ValueError(f"site {name}: PEFT gives no weights for it, only for {', '.join(sorted(held)[:5])}")
        # by alpha, so that a passing `set_scale` does not get into the file
        r, alpha = layer.r[adapter], layer.lora_alpha[adapter]
        rank = r + _for_pristine_base(state, f"{PREFIX}{inner}.", _start(name, layer, adapter, plan))
        scaling = alpha / (r**0.5 if uses_rslora(layer, adapter) else r)
        if fold_alpha:
            folded = max(folded, scaling)
            _fold(state, f"{PREFIX}{inner}.", scaling)
        plain_alpha = as_integer(scaling * (rank**0.5 if config.use_rslora else rank))
        shapes[name] = (rank, rank if fold_alpha else plain_alpha)
    if folded > 1.0:
        _warn_if_untrained(state, paths, folded)
    for tied in pairs:  # what was appended or folded, at one of the two: a reload may keep the other's
        _follow(state, paths, tied)
    values = _file_config(config, shapes, fold_alpha)
    if not all(_as_one(state, paths, tied) for tied in _ties_on_reload(model, sites, adapter)):
        values |= {"ensure_weight_tying": False, "target_modules": _plain(selecting(model, adapter, None))}
    start = start_of(model, adapter) if plan is None else Start.of(plan)
    names = class_names(_state_owner(model, adapter) or holder[1], state)
    section = card_section(start, SavedSites(shapes, values["use_rslora"], names), _versions())
    return AdapterFiles(state, values, section if card else None, config.base_model_name_or_path, names)


def _state(model: nn.Module, holder: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The adapter's weights by the keys of its file, on the CPU, whole and sharing nothing."""
    from peft import get_peft_model_state_dict

    owner: Any = _state_owner(model, adapter) or holder
    state = {file_key(k): v for k, v in get_peft_model_state_dict(owner, adapter_name=adapter).items()}
    return {key: full(value).cpu().contiguous().clone() for key, value in state.items()}


def _versions() -> dict[str, str]:
    """Versions of what writes the file."""
    found = {"cntlora": VERSION, "torch": torch.__version__}
    with suppress(PackageNotFoundError):
        found["peft"] = version("peft")
    return found


def _state_owner(model: nn.Module, adapter: str) -> nn.Module | None:
    """The outermost module with the adapter's config: a PeftModel there knows `modules_to_save` too."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        compiled = "_orig_mod" in module._modules  # torch.compile's wrapper shows the config of what it wraps
        if isinstance(configs, dict) and adapter in configs and not compiled:
            return module
    return None


def _start(name: str, layer: Any, adapter: str, plan: InitPlan | None) -> tuple[Tensor, Tensor] | None:
    """A₀ and B₀ that base "subtract" took off the weight of a site, or None where it took nothing."""
    if plan is not None and plan.config.effective_base == "subtract" and name in plan.sites:
        return plan.sites[name].A, plan.sites[name].B
    return subtracted_from(layer, adapter)


def _for_pristine_base(state: dict[str, Tensor], site: str, start: tuple[Tensor, Tensor] | None) -> int:
    """Append what base "subtract" took off the weight of a site to its factors in `state`; return its rank."""
    if start is None:
        return 0
    down, up = factor_keys(state, site)
    A, B = state[down], state[up]
    A0, B0 = start
    state[down] = torch.cat([A, shaped_like(A, A0.to(A))], dim=0)
    state[up] = torch.cat([B, shaped_like(B, -B0.to(B))], dim=1)
    return A0.shape[0]


def _fold(state: dict[str, Tensor], site: str, scaling: float) -> None:
    """Multiply the scaling of a site into all that it scales: B and its bias, or the B of an embedding."""
    for key in (f"{site}lora_B.weight", f"{site}lora_B.bias", f"{site}lora_embedding_B"):
        if key in state and scaling != 1.0:
            state[key] = state[key] * scaling


def _warn_if_untrained(state: dict[str, Tensor], paths: dict[str, str], scaling: float) -> None:
    """Warn of an adapter whose A or B is zero at every site: it is saved to be trained, at another scaling."""
    if not any(all(bool(state[key].any()) for key in factor_keys(state, site)) for site in paths.values()):
        warn_caller(
            f"the adapter is not trained yet (every B·A is zero), and its scaling of {scaling:g} is 1 in the file, "
            "so that a training from it is that much slower at the same learning rate; save it with fold_alpha=False, "
            "or initialise it with InitConfig(fold_alpha=True), whose start is made for scaling 1"
        )


def _pair(state: dict[str, Tensor], paths: dict[str, str], tied: Tied) -> list[tuple[str, Tensor]]:
    """The key of each factor of a site that follows, and what its leader has for it; nothing where PEFT gives none."""
    found = factor_keys(state, paths[tied.leader.name])
    if not all(key in state for key in (*found, *factor_keys(state, paths[tied.site.name]))):
        return []
    A, B = (state[key] for key in found)
    values = (B.mT, A.mT) if tied.crossed else (A, B)
    return list(zip(factor_keys(state, paths[tied.site.name]), values, strict=True))


def _as_one(state: dict[str, Tensor], paths: dict[str, str], tied: Tied) -> bool:
    return all(torch.equal(state[key], value) for key, value in _pair(state, paths, tied))


def _follow(state: dict[str, Tensor], paths: dict[str, str], tied: Tied) -> None:
    state.update({key: value.contiguous().clone() for key, value in _pair(state, paths, tied)})


def _ties_on_reload(model: nn.Module, sites: list[Site], adapter: str) -> list[Tied]:
    """The pairs of which PEFT would keep one, where it reads the file with `ensure_weight_tying`."""
    embedding = tied_embedding(model, sites, adapter)
    heads = set(asked_to_tie(model, sites, adapter))
    return [Tied(site, embedding, True) for site in sites if embedding is not None and site.name in heads]


def _plain(targets: Any) -> Any:
    return sorted(targets) if isinstance(targets, set) else targets


def _file_config(config: Any, shapes: dict[str, tuple[int, float]], fold_alpha: bool) -> dict[str, Any]:
    """The adapter's own configuration with the ranks and alphas of the file."""
    config = copy.deepcopy(config)
    pairs = list(shapes.values())
    config.r, config.lora_alpha = max(pairs, key=lambda pair: (pairs.count(pair), pair))
    config.rank_pattern = {anchored(n): r for n, (r, _) in shapes.items() if r != config.r}
    config.alpha_pattern = {anchored(n): a for n, (_, a) in shapes.items() if a != config.lora_alpha}
    config.use_rslora = config.use_rslora and not fold_alpha
    config.inference_mode = True
    values: dict[str, Any] = config.to_dict()
    name = public_name(values.get("base_model_name_or_path"))
    return {**public_values(values), "base_model_name_or_path": name}
