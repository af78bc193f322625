"""`export_adapter`: the adapter of a text-to-image model as one file for diffusers, or for kohya's tools.

Both files have scaling 1 or say their alpha, and hold plain LoRA for the pristine base.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..atomic import write_atomically
from ..messages import unknown_name
from .export_parts import DIFFUSERS_HEAD, Parts, SiteFactors, read_parts

File = tuple[dict[str, Tensor], dict[str, str]]
_KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
_KOHYA_SITES = {
    "unet": re.compile(r"(.*\.)?(attentions|resnets|downsamplers|upsamplers)\.\d+\..+"),
    "text_encoder": re.compile(r"text_model\.encoder\.layers\.\d+\.(self_attn|mlp)\..+"),
}
FORMATS = ("diffusers", "kohya")
_CLIP = re.compile(r"encoder\.layers\.\d+\.")


def export_adapter(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str = "diffusers",
    *,
    component: str | None = None,
    uniform_rank: bool | None = None,
    sdxl: bool | None = None,
    metadata: bool = True,
) -> dict[str, int]:
    """Write one safetensors file.

    Args:
        adapter: a folder with `adapter_config.json` (PEFT, `save_adapter`), one with
            `pytorch_lora_weights.safetensors`, or such a file, in any spelling of diffusers or of kohya's tools.
        out: the file; it is replaced whole.
        format: "diffusers", for a pipeline's `load_lora_weights`: alpha = rank at every site. "kohya", for sd-scripts,
            ComfyUI and the web UIs: one alpha for all sites, to which B is scaled, since diffusers misreads several.
        component: the part of the pipeline that the adapter is of, where the names of its layers do not tell.
        uniform_rank: fill A and B up with zeros to the largest rank of a part. None: for diffusers, of which older
            versions (0.31 is one) give sites of different ranks a wrong scaling; not for kohya.
        sdxl: whether the first text encoder is one of two; None to tell by the UNet and the second one.
        metadata: diffusers: whether the file says its configuration too.

    Returns:
        The number of sites of each part.

    Raises:
        ValueError: if it is no LoRA that the format can hold; names the site.
        OSError: if the file cannot be written; what was there is as it was.
    """
    if format not in FORMATS:
        raise ValueError(unknown_name("format", format, FORMATS))
    if Path(out).suffix != ".safetensors":
        raise ValueError(f"out {out}: expected the name of a file that ends with .safetensors")
    parts = {part: _clip_names(part, sites) for part, sites in read_parts(Path(adapter), component).items()}
    if format == "diffusers" if uniform_rank is None else uniform_rank:
        parts = {part: _padded(sites) for part, sites in parts.items()}
    tensors, head = _kohya(parts, sdxl) if format == "kohya" else _diffusers(parts, metadata)
    whole = {key: value.contiguous().clone() for key, value in tensors.items()}
    write_atomically(Path(out), save(whole, metadata=head))
    return {part: len(sites) for part, sites in parts.items()}


def _clip_names(part: str, sites: dict[str, SiteFactors]) -> dict[str, SiteFactors]:
    """CLIP's layers under `text_model`, where the files have them; recent transformers have left that level out."""
    if not part.startswith("text_encoder"):
        return sites
    return {f"text_model.{name}" if _CLIP.match(name) else name: value for name, value in sites.items()}


def _padded(sites: dict[str, SiteFactors]) -> dict[str, SiteFactors]:
    """All of the largest rank, by zeros."""
    rank = max(site.rank for site in sites.values())
    return {name: _filled(site, rank) for name, site in sites.items()}


def _filled(site: SiteFactors, rank: int) -> SiteFactors:
    missing = rank - site.rank
    A = torch.cat([site.A, site.A.new_zeros(missing, *site.A.shape[1:])], dim=0)
    B = torch.cat([site.B, site.B.new_zeros(site.B.shape[0], missing, *site.B.shape[2:])], dim=1)
    return SiteFactors(A, B, site.bias, site.magnitude)


def _common_rank(sites: dict[str, SiteFactors]) -> int:
    counts = Counter(site.rank for site in sites.values())
    return max(counts, key=lambda rank: (counts[rank], rank))


# --- diffusers ----------------------------------------------------------------------------------------------


def _diffusers(parts: Parts, metadata: bool) -> File:
    tensors: dict[str, Tensor] = {}
    head: dict[str, Any] = {}
    for part, sites in parts.items():
        for name, site in sites.items():
            tensors[f"{part}.{name}.lora_A.weight"], tensors[f"{part}.{name}.lora_B.weight"] = site.A, site.B
            if site.bias is not None:
                tensors[f"{part}.{name}.lora_B.bias"] = site.bias
            if site.magnitude is not None:
                tensors[f"{part}.{name}.lora_magnitude_vector"] = site.magnitude
        head |= {f"{part}.{key}": value for key, value in _configuration(sites).items()}
    told = {DIFFUSERS_HEAD: json.dumps(head, indent=2, sort_keys=True)} if metadata else {}
    return tensors, {"format": "pt", **told}


def _configuration(sites: dict[str, SiteFactors]) -> dict[str, Any]:
    """The arguments of PEFT's LoraConfig that give the sites of one part their ranks, and scaling 1.

    A name without `text_model` is right for transformers with and without that level: PEFT takes it for an ending.
    """
    rank = _common_rank(sites)
    ranks = {name.removeprefix("text_model."): site.rank for name, site in sites.items()}
    anchor = "" if any(name.startswith("text_model.") for name in sites) else "^"
    pattern = {f"{anchor}{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    return {
        "r": rank, "lora_alpha": rank, "rank_pattern": pattern, "alpha_pattern": pattern,
        "target_modules": sorted(ranks), "use_rslora": False,
        "use_dora": any(site.magnitude is not None for site in sites.values()),
        "lora_bias": any(site.bias is not None for site in sites.values()),
    }  # fmt: skip


# --- kohya --------------------------------------------------------------------------------------------------


def _kohya(parts: Parts, sdxl: bool | None) -> File:
    """One alpha for all sites: sd-scripts reads one of each site, but diffusers takes a single one for a part."""
    two = _has_two_encoders(parts) if sdxl is None else sdxl
    alpha = _common_rank({f"{part}.{name}": site for part, sites in parts.items() for name, site in sites.items()})
    tensors: dict[str, Tensor] = {}
    for part, sites in parts.items():
        for name, site in sites.items():
            key = f"{_kohya_prefix(part, two)}_{_kohya_name(part, name, site)}"
            if f"{key}.alpha" in tensors:
                raise ValueError(f"site {name}: another one has the same name in kohya's files, {key}")
            scaled = site.scaled(site.rank / alpha)
            tensors |= {f"{key}.lora_down.weight": scaled.A, f"{key}.lora_up.weight": scaled.B}
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    ranks = {site.rank for sites in parts.values() for site in sites.values()}
    head = {"ss_network_module": "networks.lora", "ss_network_alpha": str(float(alpha))}
    return tensors, {**head, "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic"}


def _has_two_encoders(parts: Parts) -> bool:
    """SDXL has a second text encoder, and several transformer layers in a block where SD 1 and 2 have one."""
    return "text_encoder_2" in parts or any("transformer_blocks.1." in name for name in parts.get("unet", ()))


def _kohya_prefix(part: str, two: bool) -> str:
    if part not in _KOHYA:
        raise ValueError(
            f"part {part}: only {', '.join(_KOHYA)} have names in kohya's networks.lora; use format diffusers, which "
            "kohya's and ComfyUI's own converters read"
        )
    return "lora_te1" if part == "text_encoder" and two else _KOHYA[part]


def _kohya_name(part: str, name: str, site: SiteFactors) -> str:
    if not _KOHYA_SITES[part.removesuffix("_2")].fullmatch(name):
        raise ValueError(
            f"site {part}.{name}: kohya's networks.lora does not adapt this layer, and would leave it out; use format "
            "diffusers"
        )
    for kind, value in (("DoRA", site.magnitude), ("a bias in its LoRA", site.bias)):
        if value is not None:
            raise ValueError(f"site {part}.{name} has {kind}, which kohya's networks.lora cannot hold")
    return name.replace(".", "_")
