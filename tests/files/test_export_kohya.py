"""Files for kohya's tools: the names of sd-scripts, its rule of scaling, and the same output through diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.export_cases import NEAR, Both, Saved, level_of_names, output, pair, read_by_pipeline, text_encoder, uneven
from tests.tiny import unet
from torch import Tensor, nn

from cntlora.files.export import export_adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and diffusers


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return uneven(tmp_path_factory.mktemp("saved") / "adapter")


def kohya_names(prefix: str, root: nn.Module, kinds: tuple[str, ...], level: str = "") -> set[str]:
    """The names that sd-scripts' networks/lora.py gives: prefix, place of the adapted block, place of the layer in it,
    every dot an underscore; linear layers and convolutions only."""
    return {
        f"{prefix}.{level}{outer}.{inner}".replace(".", "_")
        for outer, block in root.named_modules()
        if type(block).__name__ in kinds
        for inner, layer in block.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }


def test_kohya_names_are_those_of_sd_scripts(saved: Saved, tmp_path: Path) -> None:
    file = tmp_path / "kohya.safetensors"
    export_adapter(saved.folder, file, "kohya")
    found = load_file(file)
    blocks = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
    known = kohya_names("lora_unet", unet(), blocks)
    known |= kohya_names("lora_te", text_encoder(), ("CLIPAttention", "CLIPMLP"), level_of_names())
    names = {key.partition(".")[0] for key in found}
    assert names <= known and {name[:8] for name in names} == {"lora_une", "lora_te_"}
    assert not {"lora_unet_conv_in", "lora_te_encoder_layers_0_mlp_fc1"} & known  # the control
    for name in names:
        down, up, alpha = (found.pop(f"{name}.{end}") for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert down.shape[0] == up.shape[1] and alpha.shape == () and alpha > 0
    assert found == {}
    with safe_open(file, "pt") as opened:
        head = opened.metadata()
    assert head["ss_network_module"] == "networks.lora" and head["ss_network_dim"] == "Dynamic"
    assert {float(head["ss_network_alpha"])} == {float(v) for k, v in load_file(file).items() if k.endswith("alpha")}


def kohya_merged(file: Path, part: str, root: Any, level: str = "") -> Any:
    """W + alpha/rank · up · down at every named layer, as sd-scripts merges them."""
    state = load_file(file)
    for path, layer in root.named_modules():
        name = f"{part}_{level}{path}".replace(".", "_")
        if f"{name}.alpha" in state:
            down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
            delta = up.flatten(1) @ down.flatten(1) * (float(state[f"{name}.alpha"]) / down.shape[0])
            layer.weight.data += delta.reshape(layer.weight.shape)
    return root


@pytest.mark.parametrize("uniform", [False, True])
def test_kohya_files_give_the_same_output(saved: Saved, tmp_path: Path, uniform: bool) -> None:
    """By kohya's rule of scaling, and through the conversion in diffusers."""
    file = tmp_path / "kohya.safetensors"
    export_adapter(saved.folder, file, "kohya", uniform_rank=uniform)
    parts = Both()
    kohya_merged(file, "lora_unet", parts.unet)
    kohya_merged(file, "lora_te", parts.text_encoder, level_of_names())
    torch.testing.assert_close(output(parts), saved.wanted, **NEAR)
    torch.testing.assert_close(read_by_pipeline(file), saved.wanted, **NEAR)


def test_diffusers_misreads_kohya_files_of_several_alphas(saved: Saved, tmp_path: Path) -> None:
    """One alpha is needed: with alpha = rank at each site, as right by kohya's rule, the conversion is off."""
    file = tmp_path / "kohya.safetensors"
    export_adapter(saved.folder, file, "kohya")
    state = load_file(file)
    for name in {key.partition(".")[0] for key in state}:
        rank = state[f"{name}.lora_down.weight"].shape[0]
        state[f"{name}.lora_up.weight"] *= float(state[f"{name}.alpha"]) / rank
        state[f"{name}.alpha"] = torch.tensor(float(rank))
    save_file(state, file)
    parts = Both()
    kohya_merged(file, "lora_unet", parts.unet)
    kohya_merged(file, "lora_te", parts.text_encoder, level_of_names())
    torch.testing.assert_close(output(parts), saved.wanted, **NEAR)
    assert (read_by_pipeline(file) - saved.wanted).abs().max() > 1e-3


def test_convolutions_keep_their_kernel(tmp_path: Path) -> None:
    """PEFT's own LoRA of convolutions, whoever initialised it: 3×3 in the residual blocks, in both formats."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(Both(), LoraConfig(r=2, lora_alpha=8, target_modules=r".*resnets.*\.(conv1|conv2)"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
    model.eval().save_pretrained(tmp_path / "adapter")
    assert (output(model) - output(Both())).abs().max() > 1e-2
    for format in ("diffusers", "kohya"):
        for uniform in (False, True):
            file = tmp_path / f"{format}{uniform}.safetensors"
            export_adapter(tmp_path / "adapter", file, format, uniform_rank=uniform)
            torch.testing.assert_close(read_by_pipeline(file), output(model), **NEAR)
    assert load_file(file)["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"].shape[2:] == (3, 3)


def test_sdxl_has_two_text_encoders(tmp_path: Path) -> None:
    one, two = (pair(f"{part}.encoder.layers.0.mlp.fc1") for part in ("text_encoder", "text_encoder_2"))
    deep = pair("unet.mid_block.attentions.0.transformer_blocks.1.ff.net.2")
    for name, state in (("one", one), ("two", one | two), ("deep", one | deep)):
        save_file(state, tmp_path / f"{name}.safetensors")
    for name, sdxl, wanted in (
        ("one", None, {"lora_te_"}),
        ("one", True, {"lora_te1"}),
        ("two", None, {"lora_te1", "lora_te2"}),
        ("deep", None, {"lora_te1", "lora_une"}),
        ("deep", False, {"lora_te_", "lora_une"}),
    ):
        export_adapter(tmp_path / f"{name}.safetensors", tmp_path / "out.safetensors", "kohya", sdxl=sdxl)
        assert {key[:8] for key in load_file(tmp_path / "out.safetensors")} == wanted


def test_a_diffusers_file_is_read_again(saved: Saved, tmp_path: Path) -> None:
    """The folder that the recipes write, with or without metadata, becomes a kohya file too."""
    (tmp_path / "folder").mkdir()
    for metadata in (False, True):
        file = tmp_path / "folder" / "pytorch_lora_weights.safetensors"
        export_adapter(saved.folder, file, metadata=metadata, uniform_rank=False)
        export_adapter(tmp_path / "folder", tmp_path / "kohya.safetensors", "kohya")
        torch.testing.assert_close(read_by_pipeline(tmp_path / "kohya.safetensors"), saved.wanted, **NEAR)


def refused(tmp_path: Path, state: dict[str, Tensor], format: str = "kohya", **options: Any) -> str:
    save_file(state, tmp_path / "in.safetensors")
    with pytest.raises(ValueError) as caught:
        export_adapter(tmp_path / "in.safetensors", tmp_path / "out.safetensors", format, **options)
    assert not (tmp_path / "out.safetensors").exists()
    return str(caught.value)


def test_what_kohya_cannot_hold_is_named(tmp_path: Path) -> None:
    good = "unet.mid_block.attentions.0.proj_in"
    assert "unet.conv_in" in refused(tmp_path, pair("unet.conv_in"))
    assert "transformer" in refused(tmp_path, pair("transformer.transformer_blocks.0.attn.to_q"))
    assert "text_projection" in refused(tmp_path, pair("text_encoder_2.text_projection"))
    assert "DoRA" in refused(tmp_path, pair(good) | {f"{good}.lora_magnitude_vector": torch.ones(2)})
    assert "bias" in refused(tmp_path, pair(good) | {f"{good}.lora_B.bias": torch.ones(2)})
    assert "vae" in refused(tmp_path, pair("vae.decoder.conv_in"))
    assert "classifier" in refused(tmp_path, pair(good) | {"unet.classifier.weight": torch.ones(2)})
    assert "same rank" in refused(tmp_path, {f"{good}.lora_A.weight": torch.ones(2, 2)})
    assert "lora_unet" in refused(tmp_path, {"lora_unet_mid.lora_down.weight": torch.ones(2, 2)})
    save_file(pair(good), tmp_path / "in.safetensors")
    assert export_adapter(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "kohya") == {"unet": 1}
