"""Reads the adapter of a pipeline for export: the factors of every site by part (unet, text_encoder, …), scaling 1."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from ..messages import unknown_name
from .adapter_folder import CONFIG, DIFFUSERS_FILE, PREFIX, WEIGHTS
from .inspection import AdapterSite, SavedFactors, by_pattern, measured, read_folder
from .spellings import READABLE, kohya_site, split_key

DIFFUSERS_HEAD = "lora_adapter_metadata"
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
_BY_NAME = {
    "unet": re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b"),
    "transformer": re.compile(r"(transformer_blocks|single_transformer_blocks)\."),
    "text_encoder": re.compile(r"(text_model\.|encoder\.layers\.\d+\.(self_attn|mlp)\.)"),
}
_CLIP_OR_T5 = re.compile(
    r"((text_model\.)?encoder\.layers\.\d+\.(self_attn|mlp)\.|text_model\.|(encoder\.)?block\.\d+\.layer\.)"
)
_OF_PART = {
    "unet": _BY_NAME["unet"],
    "transformer": re.compile(r"((\w+_)?(blocks|refiner|refiner_blocks)\.|layers\.\d+\.(attn|attention)\.to_)"),
    "text_encoder": _CLIP_OR_T5,
    "text_encoder_2": _CLIP_OR_T5,
    "text_encoder_3": _CLIP_OR_T5,
    "prior": re.compile(r"(\w+_)?blocks\."),
}
"""What names of layers of each part begin with; a part that is named has at least one of them."""


@dataclass(frozen=True)
class SiteFactors:
    """One site: W + B·A is its adapted weight, with DoRA before its rows are scaled to the magnitude.

    Attributes:
        A: (rank, d) or (rank, channels, *kernel). B: (k, rank) or (k, rank, 1, …).
        bias: added to the layer's own, or None. magnitude: of DoRA, or None.
    """

    A: Tensor
    B: Tensor
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    def scaled(self, factor: float) -> SiteFactors:
        """Return it with B and its bias times a factor, computed in float32 and in the old dtype again."""
        if factor == 1.0:
            return self
        bias = None if self.bias is None else (self.bias.float() * factor).to(self.bias.dtype)
        return SiteFactors(self.A, (self.B.float() * factor).to(self.B.dtype), bias, self.magnitude)


Parts = dict[str, dict[str, SiteFactors]]
"""Part → name of a site in it → factors."""


def read_parts(source: Path, component: str | None = None) -> Parts:
    """Every part with its sites.

    Raises:
        ValueError: if there is no such adapter, it holds more than LoRA of linear layers and convolutions, or the part
            cannot be told and is not named, or none of the names are of the part that is; names what it met.
    """
    if component is not None and component not in PARTS:
        raise ValueError(unknown_name("component", component, PARTS))
    if (file := _pipeline_file(source)) is not None:
        return _read_file(file, component)
    if not (source / CONFIG).is_file():
        raise ValueError(f"{source}: no adapter is there; expected {READABLE}")
    config, state = read_folder(source)
    named = {key.removeprefix(PREFIX): value for key, value in state.items()}
    parts: Parts = {}
    for name, halves in sorted(_halves(named, source / WEIGHTS).items()):
        part, inner = _part_of(name, component)
        parts.setdefault(part, {})[inner] = _factors(name, halves, config, source / WEIGHTS)
    if component is not None and not any(_OF_PART[component].match(name) for name in parts[component]):
        raise ValueError(
            f"{source}: this is no adapter of a text-to-image model: no site is named like a layer of a {component}, "
            f"such as {next(iter(parts[component]))}; was another --component meant?"
        )
    return parts


def inspect_parts(source: Path) -> list[AdapterSite]:
    """Return the sites of a file of diffusers or kohya, or of a folder with one, named by part; B holds their scaling.

    Raises:
        ValueError: as `read_parts`.
    """
    parts = read_parts(source)
    sites = [(f"{part}.{name}", site) for part, of_part in parts.items() for name, site in of_part.items()]
    return [
        measured(SavedFactors(name, s.A.double().flatten(1), s.B.double().flatten(1), float(s.rank), 1.0))
        for name, s in sites
    ]


def is_pipeline_file(source: Path) -> bool:
    """Return whether a path is a file, or a folder with that of diffusers, and no adapter of PEFT."""
    return not (source / CONFIG).is_file() and _pipeline_file(source) is not None


def _pipeline_file(source: Path) -> Path | None:
    """The file of diffusers or kohya that a path means; None for another folder."""
    if source.suffix == ".safetensors":
        return source
    file = source / DIFFUSERS_FILE
    return file if file.is_file() else None


def _read_file(file: Path, component: str | None) -> Parts:
    """A file of diffusers, in any of its spellings, or of kohya."""
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    try:
        with safetensors.safe_open(file, "pt") as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            head = json.loads((opened.metadata() or {}).get(DIFFUSERS_HEAD, "{}"))
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); is it cut short?") from error
    parts: Parts = {}
    for name, halves in sorted(_halves(state, file).items()):
        part, inner = kohya_site(name) or _part_in_file(name, component, file)
        config = {key.removeprefix(f"{part}."): value for key, value in head.items() if key.startswith(f"{part}.")}
        parts.setdefault(part, {})[inner] = _factors(inner, halves, config, file)
    return parts


def _part_in_file(name: str, component: str | None, file: Path) -> tuple[str, str]:
    """Part and name within it; the file's own word counts before `component`."""
    if name.startswith("lora_") and "." not in name:
        raise ValueError(
            f"{file}: site {name} is named as in kohya's tools, but as no layer that diffusers has in a Stable "
            "Diffusion UNet or a CLIP text encoder; such a file is one for kohya's tools already"
        )
    return _part_of(name, None if name.partition(".")[0] in PARTS else component)


def _halves(state: Mapping[str, Tensor], file: Path) -> dict[str, dict[str, Tensor]]:
    """Site → A, B and what else the file has of it."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        split = split_key(key)
        if split is None:
            raise ValueError(
                f"{file}: it holds {key}, which files of diffusers and kohya have no place for; expected LoRA of "
                "linear layers and convolutions alone, without modules_to_save"
            )
        found.setdefault(split[0], {})[split[1]] = value
    if not found:
        raise ValueError(f"{file}: there is no LoRA in it")
    return found


def _factors(name: str, halves: dict[str, Tensor], config: Mapping[str, Any], file: Path) -> SiteFactors:
    A, B = halves.get("A"), halves.get("B")
    if A is None or B is None or B.dim() < 2 or A.shape[0] != B.shape[1]:
        shapes = {half: tuple(value.shape) for half, value in halves.items()}
        raise ValueError(f"{file}: site {name} has {shapes}; expected A (rank, …) and B (…, rank) of the same rank")
    rank = int(A.shape[0])
    alpha = halves.get("alpha")  # of kohya's files, for this site, as nothing else tells
    scaling = _scaling(name, rank, config) if alpha is None else float(alpha) / rank
    return SiteFactors(A, B, halves.get("bias"), halves.get("magnitude")).scaled(scaling)


def _scaling(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha/rank, or alpha/√rank; 1 where no configuration tells."""
    alpha = by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _part_of(name: str, component: str | None) -> tuple[str, str]:
    """Part and name within it of a site."""
    first, _, rest = name.partition(".")
    if first in PARTS and component is None:
        return first, rest
    if component is not None:
        return component, name.removeprefix(f"{component}.")
    for part, pattern in _BY_NAME.items():
        if pattern.match(name):
            return part, name
    raise ValueError(
        f"site {name}: its name does not tell which part of a text-to-image pipeline it is of; if the adapter is of "
        f"one, name the part with --component (component= in Python): {', '.join(PARTS)}; the adapter of another model "
        "needs no export, its folder loads with PeftModel.from_pretrained"
    )
