"""Contents of an adapter folder, without its base model: ranks, scalings, sizes and spectra of s·B·A per site."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from ..linalg.factors import halves_cancel, product_spectrum
from .adapter_folder import DIFFUSERS_FILE, PREFIX


@dataclass(frozen=True)
class AdapterSite:
    """One site of a saved adapter.

    Attributes:
        rank: rows of A. alpha, scaling: as its configuration says for this site.
        norm: ‖s·B·A‖_F; spectral_norm: its largest singular value.
        stable_rank: ‖s·B·A‖_F² / σ_max², how many directions carry it; 0 for a zero product.
        halves: "cancel" if B·A is zero by [B, −B] and [A; A] (an offset or paired start), else "".
    """

    name: str
    rank: int
    alpha: float
    scaling: float
    norm: float
    spectral_norm: float
    stable_rank: float
    halves: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class SavedFactors:
    """The factors of one site in an adapter folder: A (rank, d) and B (k, rank) in float64."""

    name: str
    A: Tensor
    B: Tensor
    alpha: float
    scaling: float


def read_adapter(path: str | os.PathLike[str]) -> list[SavedFactors]:
    """Read a LoRA folder as PEFT writes it.

    Raises:
        ValueError: if it is no adapter folder, no LoRA, cut short, or its ranks contradict its configuration.
    """
    folder = Path(path)
    config, state = read_folder(folder)
    found = (key.removesuffix(end) for key in state for end in _ENDS if key.endswith(end))
    names = sorted(found, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(6), name))  # 2 before 10
    if not names:
        raise ValueError(f"{folder}: the file has no lora_A weight; expected an adapter of PEFT's type LORA")
    return [_site(name.removeprefix(PREFIX), state, name, config, folder) for name in names]


def inspect_adapter(path: str | os.PathLike[str]) -> list[AdapterSite]:
    """Ranks, scalings and sizes of a LoRA folder, site by site; errors are those of `read_adapter`."""
    return [measured(site) for site in read_adapter(path)]


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of a LoRA folder.

    Raises:
        ValueError: if a file is missing or cut short, or the configuration is not that of a LoRA.
    """
    config_file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not folder.exists():
        raise ValueError(f"{folder}: there is no such folder; expected that of a PEFT adapter")
    if folder.suffix == ".safetensors" or ((folder / DIFFUSERS_FILE).is_file() and not config_file.is_file()):
        raise ValueError(
            f"{folder}: a file of diffusers has no {config_file.name}; expected the folder of a PEFT adapter. `cntlora "
            "export` reads diffusers' files, and writes them for diffusers or kohya's tools"
        )
    for file in (config_file, weights):
        if not file.is_file():
            raise ValueError(
                f"{folder}: no {file.name}; expected a folder written by save_pretrained or `cntlora init`"
            )
    try:
        config, state = json.loads(config_file.read_text(encoding="utf-8")), load_file(weights)
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{folder}: cannot be read ({error}); is it cut short?") from error
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if kind != "LORA":
        raise ValueError(f"{config_file}: peft_type is {kind!r}; expected an adapter of PEFT's type LORA")
    missing = [key for key in ("r", "lora_alpha") if not isinstance(config.get(key), (int, float))]
    if missing:
        raise ValueError(f"{config_file}: {missing[0]} is no number; was the file changed?")
    return config, state


_ENDS = (".lora_A.weight", ".lora_embedding_A")


def _site(name: str, state: Mapping[str, Tensor], key: str, config: Mapping[str, Any], folder: Path) -> SavedFactors:
    plain = f"{key}.lora_A.weight" in state
    both = [f"{key}.lora_{half}.weight" if plain else f"{key}.lora_embedding_{half}" for half in "AB"]
    if both[1] not in state:
        raise ValueError(f"{folder}: site {name} has no factor B ({both[1]}); was the file changed?")
    A, B = (state[half].double().flatten(1) for half in both)  # those of a convolution have a kernel
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(f"{folder}: site {name} has A {tuple(A.shape)} and B {tuple(B.shape)}, which do not fit")
    rank = by_pattern(config.get("rank_pattern"), name, config["r"])
    if rank != A.shape[0]:
        raise ValueError(f"{folder}: site {name} has rank {A.shape[0]}, its configuration says {rank}")
    alpha = float(by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
    return SavedFactors(name, A, B, alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def measured(site: SavedFactors) -> AdapterSite:
    """Measure a site."""
    S = site.scaling * product_spectrum(site.B, site.A)
    rank, cancels = site.A.shape[0], halves_cancel(site.B, site.A)
    norm, top = (0.0, 0.0) if cancels and rank % 2 == 0 else (float(S.norm()), float(S.max()))
    stable_rank = (norm / top) ** 2 if top else 0.0
    return AdapterSite(site.name, rank, site.alpha, site.scaling, norm, top, stable_rank, "cancel" if cancels else "")


def by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that PEFT would match with this module name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
