"""A trained LoRA of a pipeline as diffusers writes it."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from ....files.adapter_folder import PREFIX
from ....files.saving import save_adapter
from .denoisers import denoiser_in


def save_diffusers_lora(model: nn.Module, folder: Path) -> None:
    """Write `pytorch_lora_weights.safetensors` with the configuration of each part in its metadata.

    The factors are those of `save_adapter`, for the pristine base and with alpha = rank, so that readers which ignore
    the metadata get the same function.

    Args:
        model: the adapted `Denoiser`.
        folder: made if it is not there.
    """
    with tempfile.TemporaryDirectory() as temporary:
        save_adapter(model, temporary)
        state = load_file(Path(temporary) / "adapter_model.safetensors")
        config = json.loads((Path(temporary) / "adapter_config.json").read_text())
    denoiser = denoiser_in(model)
    layers: dict[str, Any] = {}
    for part in dict(denoiser.named_children()):
        start = f"{PREFIX}{part}."
        own = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        if own:
            layers[f"{part}_lora_layers"] = own
            layers[f"{part}_lora_adapter_metadata"] = part_config(config, own)
    folder.mkdir(parents=True, exist_ok=True)
    type(denoiser.pipeline).save_lora_weights(str(folder), **layers)


def part_config(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """The configuration of one part: its layers by name, their commonest rank, and a pattern for the other ranks."""
    ranks = {
        key.removesuffix(".lora_A.weight"): int(value.shape[0])
        for key, value in state.items()
        if key.endswith(".lora_A.weight")
    }
    every = sorted(ranks.values())
    rank = max(every, key=lambda r: (every.count(r), r))
    pattern = {f"^{re.escape(name)}$": r for name, r in ranks.items() if r != rank}
    kept: dict[str, Any] = {key: config[key] for key in ("lora_dropout", "bias", "use_dora") if key in config}
    return {
        **kept, "r": rank, "lora_alpha": rank, "target_modules": sorted(ranks), "rank_pattern": pattern,
        "alpha_pattern": pattern, "use_rslora": False,
    }  # fmt: skip
