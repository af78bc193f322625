"""Files for diffusers are read by a real pipeline: what comes out is the PEFT model's output. And the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.export_cases import (
    ATTENTION,
    NEAR,
    Both,
    Saved,
    batches,
    output,
    read_by_pipeline,
    text_encoder,
    trained,
    uneven,
)
from tests.tiny import adapted, lora_config, text_batches, unet
from tests.versions import cli_runner
from torch import nn

from cntlora import InitConfig, initialize, save_adapter
from cntlora.cli.app import app
from cntlora.files.export import export_adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and diffusers


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return uneven(tmp_path_factory.mktemp("saved") / "adapter")


def scales_by_own_rank() -> bool:
    """Return whether diffusers takes alpha = rank at each site where a file names no alpha; 0.37 takes one alpha."""
    from diffusers.utils.peft_utils import get_peft_kwargs

    ranks = {"a.lora_B.weight": 2, "b.lora_B.weight": 4, "c.lora_B.weight": 4}
    return bool(get_peft_kwargs(ranks, None, dict.fromkeys(ranks, torch.zeros(1)))["alpha_pattern"])


@pytest.mark.parametrize(
    ("metadata", "uniform"),
    [(True, False), (False, False), (True, True), pytest.param(False, True, marks=pytest.mark.slow)],
)
def test_diffusers_reads_it_with_and_without_metadata(
    saved: Saved, tmp_path: Path, metadata: bool, uniform: bool
) -> None:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    counts = export_adapter(saved.folder, file, "diffusers", metadata=metadata, uniform_rank=uniform)
    assert set(counts) == {"unet", "text_encoder"} and counts["text_encoder"] == 12
    for given, told in ((tmp_path, metadata), (load_file(file), False)):  # a folder, and tensors, without metadata
        found = read_by_pipeline(given)
        if told or uniform or scales_by_own_rank():
            torch.testing.assert_close(found, saved.wanted, **NEAR)
        else:
            assert (found - saved.wanted).abs().max() > 1e-3


def test_uniform_rank_leaves_nothing_for_patterns(saved: Saved, tmp_path: Path) -> None:
    """A reader that ignores `rank_pattern` builds every site at the rank of the configuration: the shapes fit."""
    for uniform, given in ((True, None), (True, True), (False, False)):
        file = tmp_path / f"{given}.safetensors"
        export_adapter(saved.folder, file, uniform_rank=given)
        head = metadata_of(file)
        assert bool(head["unet.rank_pattern"]) is not uniform
        fits = [
            value.shape[0] == head[f"{key.partition('.')[0]}.r"]
            for key, value in load_file(file).items()
            if "lora_A" in key
        ]
        assert all(fits) is uniform


def metadata_of(file: Path) -> Any:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["lora_adapter_metadata"])


def test_names_of_the_text_encoder_serve_old_and_new_transformers(saved: Saved, tmp_path: Path) -> None:
    """CLIP had a level `text_model` until transformers 5: keys have it, and patterns fit names with and without."""
    file = tmp_path / "a.safetensors"
    export_adapter(saved.folder, file, uniform_rank=False)
    keys = [key for key in load_file(file) if key.startswith("text_encoder.")]
    assert keys and all(key.startswith("text_encoder.text_model.encoder.layers.") for key in keys)
    head = metadata_of(file)
    assert head["text_encoder.rank_pattern"]
    for level in ("", "text_model."):
        old, clip = nn.Module(), text_encoder()
        clip = getattr(clip, "text_model", clip)
        setattr(old, level.rstrip(".") or "encoder", clip if level else clip.encoder)
        config = LoraConfig(**{k.removeprefix("text_encoder."): v for k, v in head.items() if k.startswith("text_")})
        model = inject_adapter_in_model(config, old)
        for key, value in load_file(file).items():
            if key.startswith("text_encoder.") and "lora_A" in key:
                name = key.removeprefix("text_encoder.text_model.").removesuffix(".lora_A.weight")
                assert model.get_submodule(level + name).r["default"] == value.shape[0]  # type: ignore[index]


@pytest.mark.parametrize(
    "base", ["subtract", *(pytest.param(base, marks=pytest.mark.slow) for base in ("paired", "keep"))]
)
def test_every_base_policy_is_for_the_pristine_pipeline(tmp_path: Path, base: str) -> None:
    saved = Saved(tmp_path / "adapter", trained(base=base))
    for format in ("diffusers", "kohya"):
        export_adapter(saved.folder, tmp_path / f"{format}.safetensors", format)
        torch.testing.assert_close(read_by_pipeline(tmp_path / f"{format}.safetensors"), saved.wanted, **NEAR)


VARIANTS = [
    {"use_rslora": True},
    pytest.param({"use_dora": True}, marks=pytest.mark.slow),
    pytest.param({"lora_bias": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("lora", VARIANTS, ids=str)
def test_alpha_that_was_not_folded_and_variants(tmp_path: Path, lora: dict[str, Any]) -> None:
    """`save_pretrained` keeps alpha 12 of rank 3 (or rsLoRA); the export folds it."""
    model = trained({"target_modules": rf"(unet\.)?({ATTENTION})", **lora}, base="paired")
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 12
    for metadata in (False, True):
        export_adapter(tmp_path / "adapter", tmp_path / "a.safetensors", metadata=metadata)
        torch.testing.assert_close(read_by_pipeline(tmp_path / "a.safetensors"), output(model), **NEAR)


def test_a_unet_alone_is_recognised_by_its_names(tmp_path: Path) -> None:
    model = unet()
    model.add_adapter(lora_config(target_modules=["to_q", "to_v"], r=2, lora_alpha=6))
    whole = Both()
    whole.unet = model
    initialize(model, batches(), InitConfig(method="self", base="keep"), forward=lambda m, b: whole(*b), progress=False)
    save_adapter(model, tmp_path / "adapter")
    assert export_adapter(tmp_path / "adapter", tmp_path / "a.safetensors") == {"unet": 16}
    torch.testing.assert_close(read_by_pipeline(tmp_path / "a.safetensors"), output(whole.eval()), **NEAR)
    assert (output(whole) - output(Both())).abs().max() > 1e-3


def test_a_text_model_is_no_part_of_a_pipeline(tmp_path: Path) -> None:
    model = adapted()
    initialize(model, text_batches(), progress=False, config=InitConfig(method="self"))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"the part with --component .*: unet, transformer, .*needs no export"):
        export_adapter(tmp_path / "adapter", tmp_path / "a.safetensors")
    for part in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior"):
        with pytest.raises(ValueError, match="this is no adapter of a text-to-image model"):
            export_adapter(tmp_path / "adapter", tmp_path / "a.safetensors", component=part)
    with pytest.raises(ValueError, match=r"component: 'unett' is not known \(did you mean 'unet'\?\)"):
        export_adapter(tmp_path / "adapter", tmp_path / "a.safetensors", component="unett")
    assert not (tmp_path / "a.safetensors").exists()


NAMES = {
    "unet": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "transformer": "single_transformer_blocks.3.attn.to_q blocks.0.attn1.to_q layers.2.attention.to_q",
    "text_encoder": "encoder.layers.0.self_attn.q_proj text_model.encoder.layers.0.mlp.fc1",
    "text_encoder_2": "text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder_3": "encoder.block.0.layer.0.SelfAttention.q",
    "prior": "transformer_blocks.0.attn1.to_q down_blocks.0.1.attention.to_q",
}
OTHERS = (
    "model.layers.0.self_attn.q_proj layers.0.self_attn.q_proj transformer.h.0.attn.c_attn "
    "encoder.layer.0.attention.self.query layers.0.attention.query_key_value"
)


@pytest.mark.parametrize(("part", "name"), [(part, n) for part, names in NAMES.items() for n in names.split()])
def test_a_named_part_takes_the_layers_it_has(tmp_path: Path, part: str, name: str) -> None:
    assert export_adapter(folder_with(tmp_path, name), tmp_path / "a.safetensors", component=part) == {part: 1}


@pytest.mark.parametrize("name", OTHERS.split())
def test_a_language_model_is_no_named_part(tmp_path: Path, name: str) -> None:
    for part in NAMES:
        with pytest.raises(ValueError, match="this is no adapter of a text-to-image model"):
            export_adapter(folder_with(tmp_path, name), tmp_path / "a.safetensors", component=part)


def folder_with(folder: Path, name: str) -> Path:
    """An adapter of one site."""
    state = {f"base_model.model.{name}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(state, folder / "adapter_model.safetensors")
    text = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    (folder / "adapter_config.json").write_text(text)
    return folder


# --- the command --------------------------------------------------------------------------------------------


def cntlora(*arguments: object) -> tuple[int, str, str]:
    result = cli_runner().invoke(app, ["export", *(str(a) for a in arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_the_command_writes_the_file(saved: Saved, tmp_path: Path, format: str) -> None:
    file = tmp_path / "deep" / "a.safetensors"
    code, out, err = cntlora(saved.folder, "--format", format, "--out", file)
    assert code == 0 and "text_encoder 12" in out and not err
    torch.testing.assert_close(read_by_pipeline(file), saved.wanted, **NEAR)
    assert [path.name for path in file.parent.iterdir()] == ["a.safetensors"]
    code, out, _ = cntlora(saved.folder, "--format", format, "--out", file, "--overwrite", "--json")
    assert code == 0 and json.loads(out)["sites"]["text_encoder"] == 12


def test_mistakes_are_one_line_and_write_nothing(saved: Saved, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    for arguments, word in (
        ((tmp_path / "nothing", "--out", file), "one with pytorch_lora_weights.safetensors (diffusers)"),
        ((saved.folder, "--out", file, "--component", "text-encoder"), "did you mean 'text_encoder'"),
        ((tmp_path / "nothing.safetensors", "--out", file), "no such file"),
        ((saved.folder, "--out", file, "--format", "kohja"), "kohya"),
        ((saved.folder, "--out", tmp_path / "folder"), ".safetensors"),
        ((saved.folder / "adapter_model.safetensors", "--out", file), "base_model"),
    ):
        code, out, err = cntlora(*arguments)
        assert code == 1 and not out and err.count("\n") == 1 and word in err, err
    assert list(tmp_path.iterdir()) == []
    file.write_bytes(b"mine")
    code, _, err = cntlora(saved.folder, "--out", file)
    assert code == 1 and "--overwrite" in err and file.read_bytes() == b"mine"


def test_a_full_disk_leaves_the_old_file(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, _, err = cntlora(saved.folder, "--out", file, "--overwrite")
    assert code == 1 and "No space left" in err and file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    monkeypatch.undo()
    assert cntlora(saved.folder, "--out", file, "--overwrite")[0] == 0 and file.read_bytes() != b"old"
