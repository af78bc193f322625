"""Keys that ComfyUI and the web UI of AUTOMATIC1111 read: their rules, written down here, applied to our files.

ComfyUI: `comfy/lora.py` and `comfy/weight_adapter/lora.py` at commit 0323d874. AUTOMATIC1111, and forks of it:
`load_network` and `convert_diffusers_name_to_compvis` of `extensions-builtin/Lora/networks.py` at commit 873edba4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.export_cases import NEAR, Both, Saved, output, pair, uneven
from torch import Tensor, nn

from cntlora.files.export import export_adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and diffusers
UP_OF_COMFYUI = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
)
CLIP_LAYERS = [f"{part}.{layer}" for part, layers in (
    ("self_attn", ("q_proj", "k_proj", "v_proj", "out_proj")), ("mlp", ("fc1", "fc2")),
) for layer in layers]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return uneven(tmp_path_factory.mktemp("saved") / "adapter")


@pytest.fixture(scope="module")
def files(saved: Saved) -> dict[str, dict[str, Tensor]]:
    made = {}
    for format in ("kohya", "diffusers"):
        file = saved.folder.parent / f"{format}.safetensors"
        export_adapter(saved.folder, file, format, metadata=False)
        made[format] = load_file(file)
    return made


# --- ComfyUI ------------------------------------------------------------------------------------------------------


def names_of_comfyui(model: Both) -> dict[str, nn.Module]:
    """Every name that it looks for, with its layer."""
    known: dict[str, nn.Module] = {}
    for name, layer in model.unet.named_modules():
        known["lora_unet_" + name.replace(".", "_")] = layer
        for prefix in ("", "unet."):
            processor = (prefix + name).replace(".to_", ".processor.to_")
            known[processor.removesuffix(".0") if processor.endswith(".to_out.0") else processor] = layer
    layers = dict(model.text_encoder.named_modules())
    start = "text_model." if any(name.startswith("text_model.") for name in layers) else ""
    for block in range(32):
        for inner in CLIP_LAYERS:
            layer = layers.get(f"{start}encoder.layers.{block}.{inner}")
            if layer is not None:
                name = f"text_model.encoder.layers.{block}.{inner}"
                known |= {f"text_encoder.{name}": layer, "lora_te_" + name.replace(".", "_"): layer}
    return known


def read_by_comfyui(state: dict[str, Tensor]) -> tuple[Both, set[str]]:
    """The patched parts, and the keys that nothing asked for ("lora key not loaded")."""
    model, read = Both(), set()
    for name, layer in names_of_comfyui(model).items():
        alpha = state.get(f"{name}.alpha")
        for up_end, down_end in UP_OF_COMFYUI:
            up, down = state.get(name + up_end), state.get(name + down_end)
            if up is not None and down is not None:
                scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
                add(layer, up, down, scale)
                read |= {name + up_end, name + down_end, f"{name}.alpha"}
                break
    return model, set(state) - read


def add(layer: Any, up: Tensor, down: Tensor, scale: float) -> None:
    layer.weight.data += (scale * up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)


def test_comfyui_reads_all_of_a_kohya_file(saved: Saved, files: dict[str, dict[str, Tensor]]) -> None:
    model, unread = read_by_comfyui(files["kohya"])
    assert unread == set()
    torch.testing.assert_close(output(model), saved.wanted, **NEAR)


def test_comfyui_reads_no_unet_of_a_diffusers_file(files: dict[str, dict[str, Tensor]]) -> None:
    """The docs name kohya's format, since attention is looked for under `.processor.`, which nobody writes now."""
    _, unread = read_by_comfyui(files["diffusers"])
    assert unread and all(key.startswith("unet.") for key in unread)
    assert any(".to_q." in key for key in unread)


# --- AUTOMATIC1111 --------------------------------------------------------------------------------------------------

BLOCK = re.compile(r"lora_unet_(down|up|mid)_blocks?(?:_(\d+))?_(attentions|resnets)_(\d+)_(.+)")
SAMPLER = re.compile(r"lora_unet_(?:down|up)_blocks_(\d+)_(down|up)samplers_0_conv")
INNER = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def name_of_the_webui(name: str) -> str | None:
    """The module that it looks for, in the names of Stable Diffusion's own code, every dot an underscore."""
    block, sampler = BLOCK.fullmatch(name), SAMPLER.fullmatch(name)
    if block:
        side, number, kind, index, rest = block.groups()
        inner = INNER[rest] if kind == "resnets" else rest
        place = 1 if kind == "attentions" else 0
        if side == "mid":
            return f"diffusion_model_middle_block_{1 if place else 2 * int(index)}_{inner}"
        first = {
            "down": f"input_blocks_{1 + 3 * int(number) + int(index)}",
            "up": f"output_blocks_{3 * int(number) + int(index)}",
        }
        return f"diffusion_model_{first[side]}_{place}_{inner}"
    if sampler and sampler[2] == "down":
        return f"diffusion_model_input_blocks_{3 + 3 * int(sampler[1])}_0_op"
    if sampler:
        return f"diffusion_model_output_blocks_{2 + 3 * int(sampler[1])}_{2 if int(sampler[1]) > 0 else 1}_conv"
    clip = re.fullmatch(r"lora_te_text_model_encoder_layers_(\d+)_(.+)", name)
    return f"transformer_text_model_encoder_layers_{clip[1]}_{clip[2]}" if clip else None


def own_names() -> Iterator[str]:
    """The layers with weights of the UNet of Stable Diffusion 1.5, in the names of its own code."""
    yield from (f"time_embed.{i}" for i in (0, 2))
    yield from ("input_blocks.0.0", "out.0", "out.2")
    for i in range(1, 12):
        if i % 3:
            yield from unit(f"input_blocks.{i}", attention=i < 9, skip=i in (4, 7))
        else:
            yield f"input_blocks.{i}.0.op"
    for i in (0, 2):
        yield from unit("middle_block", attention=False, skip=False, place=i)
    yield from transformer("middle_block.1")
    for i in range(12):
        yield from unit(f"output_blocks.{i}", attention=i > 2, skip=True)
        if i in (2, 5, 8):
            yield f"output_blocks.{i}.{1 if i == 2 else 2}.conv"


def unit(name: str, attention: bool, skip: bool, place: int = 0) -> Iterator[str]:
    inner = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
    yield from (f"{name}.{place}.{layer}" for layer in inner + ["skip_connection"] * skip)
    if attention:
        yield from transformer(f"{name}.1")


def transformer(name: str) -> Iterator[str]:
    yield from (f"{name}.{layer}" for layer in ("norm", "proj_in", "proj_out"))
    block = f"{name}.transformer_blocks.0"
    yield from (f"{block}.attn{i}.{layer}" for i in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0"))
    yield from (f"{block}.{layer}" for layer in ("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"))


def test_the_webui_finds_every_layer_of_a_unet_by_our_names(tmp_path: Path) -> None:
    """Of Stable Diffusion 1.5. diffusers' own converter of checkpoints says which of the names are the same layer."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    names = list(own_names())
    ends = ("weight", "bias")
    checkpoint = {f"model.diffusion_model.{n}.{end}": torch.tensor([i]) for i, n in enumerate(names) for end in ends}
    same = convert_ldm_unet_checkpoint(
        checkpoint, {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}
    )
    layers = {k.removesuffix(".weight"): names[int(i)] for k, i in same.items() if k.endswith(".weight")}
    adapted = [name for name in layers if re.search(r"attn|ff\.|proj|conv\d|conv_shortcut|samplers", name)]
    assert len(adapted) > 200
    save_file({k: v for name in adapted for k, v in pair(f"unet.{name}").items()}, tmp_path / "in.safetensors")
    export_adapter(tmp_path / "in.safetensors", tmp_path / "kohya.safetensors", "kohya")
    found = {key.split(".", 1)[0] for key in load_file(tmp_path / "kohya.safetensors")}
    expected = {"diffusion_model_" + layers[name].replace(".", "_") for name in adapted}
    assert {name_of_the_webui(name) for name in found} == expected
    assert name_of_the_webui("lora_unet_input_blocks_1_1_proj_in") is None  # control


def test_the_webui_reads_every_key_of_a_kohya_file(files: dict[str, dict[str, Tensor]]) -> None:
    for key in files["kohya"]:
        name, part = key.split(".", 1)
        assert name_of_the_webui(name) and part in ("lora_down.weight", "lora_up.weight", "alpha")
