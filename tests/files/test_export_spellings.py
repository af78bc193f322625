"""Every spelling of LoRA files in use gives the same export as the one that PEFT writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import load_file, save_file
from tests.export_cases import NEAR, Saved, pair, read_by_pipeline, uneven
from torch import Tensor

from cntlora.files.export import export_adapter
from cntlora.files.export_parts import read_parts
from cntlora.files.spellings import kohya_site, split_key

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and diffusers
State = dict[str, Tensor]
PROCESSOR = {"to_out.0": "to_out", "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return uneven(tmp_path_factory.mktemp("saved") / "adapter")


@pytest.fixture(scope="module")
def plain(saved: Saved) -> State:
    """The adapter as PEFT names it, scaling 1."""
    file = saved.folder.parent / "plain.safetensors"
    export_adapter(saved.folder, file, metadata=False)
    return load_file(file)


def as_diffusers_saves(state: State) -> State:
    """`save_lora_weights` of what diffusers' own converter makes of each part."""
    whole: State = {}
    for part in ("unet", "text_encoder"):
        own = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}
        whole |= {f"{part}.{key}": value for key, value in convert_state_dict_to_diffusers(own).items()}
    return whole


def as_attention_processors(state: State) -> State:
    """Names of before diffusers 0.22, where processors held the LoRA of attention, and nothing else had one."""

    def respelled(key: str) -> str:
        site, half = key.removesuffix(".weight").rsplit(".lora_", 1)
        end = "down" if half == "A" else "up"
        found = re.fullmatch(r"(.+\.(?:attn\d|self_attn))\.(to_out\.0|to_[qkv]|[qkv]_proj|out_proj)", site)
        if found is None:
            return f"{site}.lora.{end}.weight"
        level = ".processor" if ".attn" in site else ""
        return f"{found[1]}{level}.{PROCESSOR.get(found[2], found[2])}_lora.{end}.weight"

    return {respelled(key): value for key, value in state.items()}


def with_named_adapter(state: State) -> State:
    return {key.replace(".weight", ".default.weight"): value for key, value in state.items()}


def as_kohya(state: State, folder: Path) -> State:
    save_file(state, folder / "in.safetensors")
    export_adapter(folder / "in.safetensors", folder / "kohya.safetensors", "kohya")
    return load_file(folder / "kohya.safetensors")


SPELLINGS: dict[str, tuple[Callable[[State], State], set[str]]] = {
    "diffusers": (as_diffusers_saves, {".lora.down.weight", ".lora_linear_layer.up.weight", ".lora_A.weight"}),
    "processors": (as_attention_processors, {".processor.to_q_lora.down.weight", ".self_attn.to_out_lora.up.weight"}),
    "adapter's name": (with_named_adapter, {".lora_B.default.weight"}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_diffusers_is_read(spelling: str, plain: State, tmp_path: Path) -> None:
    respell, wanted = SPELLINGS[spelling]
    state = respell(plain)
    assert all(any(key.endswith(end) for key in state) for end in wanted)  # control: it is another spelling
    for name, tensors in (("plain", plain), ("respelled", state)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        for format in ("diffusers", "kohya"):
            export_adapter(tmp_path / f"{name}.safetensors", tmp_path / f"{name}.{format}.safetensors", format)
    for format in ("diffusers", "kohya"):
        found, expected = (load_file(tmp_path / f"{name}.{format}.safetensors") for name in ("respelled", "plain"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("spelling", ["plain", "diffusers"])
def test_diffusers_reads_the_spelling_too(spelling: str, plain: State, saved: Saved) -> None:
    """That the spelling of the test above is diffusers' own."""
    state = plain if spelling == "plain" else as_diffusers_saves(plain)
    torch.testing.assert_close(read_by_pipeline(dict(state)), saved.wanted, **NEAR)


def test_kohya_files_are_read_with_their_alphas(saved: Saved, plain: State, tmp_path: Path) -> None:
    """From kohya to diffusers, to kohya again; each site by its own alpha, where they differ."""
    state = as_kohya(plain, tmp_path)
    for number, name in enumerate(sorted({key.partition(".")[0] for key in state})):
        state[f"{name}.lora_up.weight"] *= 2.0 ** (number % 3)  # powers of two: bit-identical
        state[f"{name}.alpha"] = state[f"{name}.alpha"] / 2.0 ** (number % 3)
    assert len({float(value) for key, value in state.items() if key.endswith("alpha")}) == 3
    save_file(state, tmp_path / "several.safetensors")
    export_adapter(tmp_path / "several.safetensors", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == plain.keys()
    assert all(torch.allclose(back[key], plain[key], rtol=1e-6) for key in plain)
    torch.testing.assert_close(read_by_pipeline(tmp_path / "back.safetensors"), saved.wanted, **NEAR)
    without = {key: value for key, value in state.items() if not key.endswith("alpha")}
    save_file(without, tmp_path / "without.safetensors")  # control: alpha decides
    export_adapter(tmp_path / "without.safetensors", tmp_path / "back.safetensors")
    assert (read_by_pipeline(tmp_path / "back.safetensors") - saved.wanted).abs().max() > 1e-3


def test_every_name_of_kohya_is_that_of_a_layer() -> None:
    """Of the whole UNet of Stable Diffusion 1.5 and CLIP-L: dots come back where the model has them."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        clip = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12))
    blocks = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
    names = {
        f"{outer}.{inner}"
        for outer, block in unet.named_modules()
        if type(block).__name__ in blocks
        for inner, layer in block.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
    }
    assert len(names) > 250
    for name in names:
        assert kohya_site("lora_unet_" + name.replace(".", "_")) == ("unet", name)
    layers = [
        f"text_model.{n.removeprefix('text_model.')}" for n, m in clip.named_modules() if hasattr(m, "in_features")
    ]
    assert len(layers) == 12 * 6
    for name in layers:
        for prefix, part in (("lora_te", "text_encoder"), ("lora_te1", "text_encoder"), ("lora_te2", "text_encoder_2")):
            assert kohya_site(f"{prefix}_" + name.replace(".", "_")) == (part, name)
    assert kohya_site("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q") is None  # the original names
    assert split_key("unet.mid_block.classifier.weight") is None


def test_parts_that_a_file_does_not_name(tmp_path: Path) -> None:
    """`save_attn_procs` writes a UNet alone, without a prefix; other names need --component."""
    save_file(pair("down_blocks.0.attentions.0.proj_in"), tmp_path / "unet.safetensors")
    assert list(read_parts(tmp_path / "unet.safetensors")) == ["unet"]
    save_file(pair("layers.0.attention.to_q"), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="--component"):
        read_parts(tmp_path / "other.safetensors")
    assert list(read_parts(tmp_path / "other.safetensors", "transformer")) == ["transformer"]
    save_file(pair("text_encoder.encoder.layers.0.mlp.fc1"), tmp_path / "named.safetensors")
    assert list(read_parts(tmp_path / "named.safetensors", "unet")) == ["text_encoder"]  # the file's own word
