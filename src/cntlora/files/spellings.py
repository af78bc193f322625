"""The names that LoRA weights have in files: PEFT's, three of diffusers, and kohya's, as site and part of it."""

from __future__ import annotations

import re

READABLE = (
    "a folder with adapter_config.json and adapter_model.safetensors (PEFT, `cntlora init`), one with "
    "pytorch_lora_weights.safetensors (diffusers), or a .safetensors file of diffusers or kohya"
)
"""What holds an adapter that can be exported, for messages."""

_ENDS = (
    (r"\.lora_A(\.default)?\.weight", "A"),
    (r"\.lora_B(\.default)?\.weight", "B"),
    (r"\.lora_B\.bias", "bias"),
    (r"\.lora_magnitude_vector(\.weight)?", "magnitude"),
    # diffusers: a UNet's layers, CLIP's layers, and the attention processors of before 0.22
    (r"(\.lora|\.lora_linear_layer|_lora|\.lora_layer)\.down\.weight|\.lora_down\.weight", "A"),
    (r"(\.lora|\.lora_linear_layer|_lora|\.lora_layer)\.up\.weight|\.lora_up\.weight", "B"),
    (r"\.alpha", "alpha"),
)
_KEY = re.compile("(?P<site>.+?)(" + "|".join(f"(?P<{half}{i}>{end})" for i, (end, half) in enumerate(_ENDS)) + ")")
_PROCESSOR = re.compile(r"\.(processor\.)?to_(q|k|v|out)_lora\.")
_CLIP_ATTENTION = re.compile(r"(.*\.self_attn)\.to_(q|k|v|out)")

KOHYA_PARTS = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}
_KOHYA_KEY = re.compile(r"(lora_unet|lora_te[12]?)_(.+)")
_BLOCK = r"(?:(?:down|up)_blocks_\d+|mid_block)"
_INNER = r"(?:to_(?:q|k|v|add_k|add_v)|to_out_\d+|ff_net_\d+(?:_proj)?|proj_(?:in|out))"
_KOHYA_SITES = (
    re.compile(rf"({_BLOCK})_(attentions_\d+)(_transformer_blocks_\d+)?((?:_attn\d)?)_({_INNER})"),
    re.compile(rf"({_BLOCK})_(resnets_\d+)()()_(conv1|conv2|time_emb_proj|conv_shortcut)"),
    re.compile(rf"({_BLOCK})_((?:down|up)samplers_\d+)()()_(conv)"),
)
_KOHYA_CLIP = re.compile(r"(text_model_)?encoder_layers_(\d+)_(self_attn|mlp)_(\w+)")
_NUMBER = re.compile(r"_(\d+)")


def split_key(key: str) -> tuple[str, str] | None:
    """The name of the site and what it is of it (A, B, bias, magnitude, alpha), or None if it is no weight of LoRA.

    The name has the dots of the model's own, also where a file names an attention processor; kohya's names, which have
    underscores in their places, stay as they are.
    """
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    half = next(name for name, value in found.groupdict().items() if value is not None and name != "site")
    site = found["site"]
    if _PROCESSOR.search(key):
        site = _of_processor(site)
    return site.replace(".processor.", "."), half.rstrip("0123456789")


def _of_processor(site: str) -> str:
    """The layer that an attention processor adapts: to_out is the first layer of a pair, CLIP's are called q_proj, …"""
    clip = _CLIP_ATTENTION.fullmatch(site)
    if clip:
        return f"{clip[1]}.{clip[2]}_proj"
    return f"{site}.0" if site.endswith(".to_out") else site


def kohya_site(name: str) -> tuple[str, str] | None:
    """Part and name with dots of a site that kohya's networks.lora adapts, or None for any other name."""
    head = _KOHYA_KEY.fullmatch(name)
    if head is None:
        return None
    part, rest = KOHYA_PARTS[head[1]], head[2]
    clip = _KOHYA_CLIP.fullmatch(rest)
    if part != "unet":
        return (part, f"text_model.encoder.layers.{clip[2]}.{clip[3]}.{clip[4]}") if clip else None
    for pattern in _KOHYA_SITES:
        found = pattern.fullmatch(rest)
        if found:
            block, inner, transformer, attention, layer = (group or "" for group in found.groups())
            dotted = [re.sub(_NUMBER, r".\1", piece).strip("_") for piece in (block, inner, transformer, attention)]
            return part, ".".join([*filter(None, dotted), _with_dots(layer)])
    return None


def _with_dots(layer: str) -> str:
    """`ff_net_0_proj` → `ff.net.0.proj`, `to_out_0` → `to_out.0`; the others have no dot."""
    if layer.startswith("ff_net_"):
        return layer.replace("_", ".")
    return re.sub(_NUMBER, r".\1", layer)
