"""`save_adapter`: an ordinary LoRA folder for the pristine base, whatever `base` was."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import SUBTRACTED, anchored, whole
from .agreement import agreed, alone, attempt
from .plan import InitPlan
from .sharded import full, reshard, shards
from .sites import base_name, config_holder, find_sites, lora_paths, uses_rslora

PREFIX = "base_model.model."


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    fold_alpha: bool = True,
    plan: InitPlan | None = None,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` that plain PEFT loads on the untouched base.

    For base "subtract" the base weights in memory have s·B₀·A₀ taken off, so the file holds [A; A₀] and [B, −B₀], of
    rank 2r: on the pristine base the same function. The other policies are written at the rank they have.

    Where the model is sharded by `fully_shard`, all processes have to call it, and the first one writes.

    Args:
        model: a PeftModel, a model with `add_adapter`, or a module that PEFT injected LoRA layers into.
        path: the folder; each file is written under a temporary name first, so that it is whole or not there.
        adapter_name: of the adapter.
        fold_alpha: rewrite the factors so that alpha = rank everywhere (scaling 1, no rsLoRA), right also for readers
            that ignore `alpha_pattern`.
        plan: for base "subtract" where the model in memory is not the very object that was initialised (resumed in
            another process, or copied): the plan that was applied then.

    Raises:
        ValueError: if the model has no such adapter, or no PEFT configuration for it.
    """
    from peft import get_peft_model_state_dict

    reshard(model)
    sharded = shards(model)
    find_sites(model, adapter_name)  # says which adapters there are, if not this one
    holder = config_holder(model, adapter_name)
    if holder is None:
        raise ValueError(
            f"the model has LoRA layers but no PEFT configuration for adapter {adapter_name!r}, so there is none to "
            "save; put the LoRA in with get_peft_model, add_adapter or inject_adapter_in_model"
        )
    owner: Any = _state_owner(model, adapter_name) or holder[1]
    state = {_file_key(k): v for k, v in get_peft_model_state_dict(owner, adapter_name=adapter_name).items()}
    state = {key: full(value).cpu().contiguous().clone() for key, value in state.items()}
    held = {key.partition(".lora_")[0] for key in state}
    shapes = {}
    config: Any = holder[1].peft_config[adapter_name]  # type: ignore[index,union-attr]
    for inner, layer in lora_paths(model, adapter_name):
        name = base_name(inner, layer)
        if PREFIX + inner not in held:
            raise ValueError(f"site {name}: PEFT gives no weights for it, only for {', '.join(sorted(held)[:5])}")
        # by alpha, so that a passing `set_scale` does not get into the file
        r, alpha = layer.r[adapter_name], layer.lora_alpha[adapter_name]
        rank = r + _for_pristine_base(state, f"{PREFIX}{inner}.", _start(name, layer, adapter_name, plan))
        scaling = alpha / (r**0.5 if uses_rslora(layer, adapter_name) else r)
        if fold_alpha:
            _fold(state, f"{PREFIX}{inner}.", scaling)
        plain_alpha = whole(scaling * (rank**0.5 if config.use_rslora else rank))
        shapes[name] = (rank, rank if fold_alpha else plain_alpha)
    config = _file_config(config, shapes, fold_alpha)
    if not sharded:
        _write_folder(Path(path), state, config)
    else:
        first = alone() or dist.get_rank() == 0
        agreed(attempt(lambda: _write_folder(Path(path), state, config)) if first else None)


def _state_owner(model: nn.Module, adapter: str) -> nn.Module | None:
    """The outermost module with the adapter's config: a PeftModel there knows `modules_to_save` too."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and adapter in configs:
            return module
    return None


def _file_key(key: str) -> str:
    """Keys of an adapter file start with PEFT's prefix, also where the model in memory has none."""
    return key if key.startswith(PREFIX) else PREFIX + key


def _start(name: str, layer: Any, adapter: str, plan: InitPlan | None) -> tuple[Tensor, Tensor] | None:
    """A₀ and B₀ that base "subtract" took off the weight of a site, or None where it took nothing."""
    if plan is not None and plan.config.effective_base == "subtract" and name in plan.sites:
        return plan.sites[name].A, plan.sites[name].B
    known: tuple[Tensor, Tensor] | None = SUBTRACTED.get(layer, {}).get(adapter)
    return known


def _for_pristine_base(state: dict[str, Tensor], site: str, start: tuple[Tensor, Tensor] | None) -> int:
    """Appends what base "subtract" took off the weight of a site to its factors in `state`; returns its rank."""
    if start is None:
        return 0
    A, B = state[f"{site}lora_A.weight"], state[f"{site}lora_B.weight"]
    A0, B0 = start
    state[f"{site}lora_A.weight"] = torch.cat([A, A0.to(A)], dim=0)
    state[f"{site}lora_B.weight"] = torch.cat([B, -B0.to(B)], dim=1)
    return A0.shape[0]


def _fold(state: dict[str, Tensor], site: str, scaling: float) -> None:
    """Multiplies the scaling of a site into all that it scales: B and its bias, or the B of an embedding."""
    for key in (f"{site}lora_B.weight", f"{site}lora_B.bias", f"{site}lora_embedding_B"):
        if key in state and scaling != 1.0:
            state[key] = state[key] * scaling


def _file_config(config: Any, shapes: dict[str, tuple[int, float]], fold_alpha: bool) -> dict[str, Any]:
    """The adapter's own configuration with the ranks and alphas of the file."""
    config = copy.deepcopy(config)
    pairs = list(shapes.values())
    config.r, config.lora_alpha = max(pairs, key=lambda pair: (pairs.count(pair), pair))
    config.rank_pattern = {anchored(n): r for n, (r, _) in shapes.items() if r != config.r}
    config.alpha_pattern = {anchored(n): a for n, (_, a) in shapes.items() if a != config.lora_alpha}
    config.use_rslora = config.use_rslora and not fold_alpha
    config.inference_mode = True
    values: dict[str, Any] = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    name = values.get("base_model_name_or_path")
    if name and Path(name).is_absolute():
        values["base_model_name_or_path"] = Path(name).name  # no path of this machine in a file that travels
    return values


def _write_folder(path: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """All files into a temporary folder beside `path`, then each renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        save_file(state, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True, default=str)
        (temporary / "adapter_config.json").write_text(text)
        path.mkdir(exist_ok=True)
        for file in temporary.iterdir():
            file.chmod(0o644)
            file.replace(path / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
