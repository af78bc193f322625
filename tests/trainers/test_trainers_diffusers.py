"""The pattern of diffusers' scripts: add_adapter on the UNet and the text encoder, files of save_lora_weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tests.trainer_cases import copies, factors
from torch import Tensor, nn

from cntlora import InitConfig, initialize
from cntlora.lab.recipes.diffusion import tiny

UNET = ["to_k", "to_q", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny.stable_diffusion(path)
    return path


def pipeline(folder: Path, adapted: bool = False, alpha: int = 4) -> Any:
    """Make a pipeline with adapters as `train_dreambooth_lora.py` adds them; alpha above the rank, as users set it."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.text_encoder):
        part.requires_grad_(False)
        part.eval()
    if adapted:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            options: dict[str, Any] = {"r": 4, "lora_alpha": alpha, "init_lora_weights": "gaussian"}
            pipe.unet.add_adapter(LoraConfig(**options, target_modules=UNET))
            pipe.text_encoder.add_adapter(LoraConfig(**options, target_modules=TEXT))
    return pipe


def batches(pipe: Any, count: int = 3, rows: int = 4) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    prompts = pipe.tokenizer(["sks", "a dog", "cat", "b"], padding="max_length", return_tensors="pt").input_ids
    return [
        {
            "latents": torch.randn(rows, 4, 8, 8, generator=g),
            "noise": torch.randn(rows, 4, 8, 8, generator=g),
            "timesteps": torch.randint(0, 1000, (rows,), generator=g),
            "input_ids": prompts,
        }
        for _ in range(count)
    ]


def predict(pipe: Any, batch: dict[str, Tensor]) -> Tensor:
    """The noise that the pair of models predicts."""
    noisy = pipe.scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    hidden = pipe.text_encoder(batch["input_ids"])[0]
    return pipe.unet(noisy, batch["timesteps"], hidden).sample


def initialized(folder: Path, alpha: int = 8, **options: Any) -> Any:
    pipe = pipeline(folder, adapted=True, alpha=alpha)
    data, config = batches(pipe), InitConfig.from_dict({"method": "self", "num_batches": 2, **options})
    initialize(pipe.unet, data, config, forward=lambda unet, batch: predict(pipe, batch))
    initialize(pipe.text_encoder, data, config, forward=lambda encoder, batch: encoder(batch["input_ids"]))
    return pipe


def trained(pipe: Any) -> Any:
    """Three steps of the script's loop on both models; checks that every factor moved."""
    parameters = [p for part in (pipe.unet, pipe.text_encoder) for p in part.parameters() if p.requires_grad]
    start = [copies(part) for part in (pipe.unet, pipe.text_encoder)]
    held = {id(p) for p in parameters}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for batch in batches(pipe):
        torch.nn.functional.mse_loss(predict(pipe, batch), batch["noise"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for part, before in zip((pipe.unet, pipe.text_encoder), start, strict=True):
        now = factors(part)
        assert len(now) > 10 and all(id(factor) in held for factor in now.values())
        assert not [name for name in now if torch.equal(now[name].detach(), before[name])]
    return pipe


def lora_state(part: nn.Module) -> dict[str, Tensor]:
    return convert_state_dict_to_diffusers(get_peft_model_state_dict(part))


def saved(pipe: Any, out: Path, metadata: bool) -> Path:
    """Save as the scripts do; older ones write no metadata."""
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    StableDiffusionPipeline.save_lora_weights(
        out, unet_lora_layers=lora_state(pipe.unet), text_encoder_lora_layers=lora_state(pipe.text_encoder),
        **(_collate_lora_metadata(parts) if metadata else {}),
    )  # fmt: skip
    return out


def difference(pipe: Any, other: Any) -> float:
    with torch.no_grad():
        return max(float((predict(pipe, b) - predict(other, b)).abs().max()) for b in batches(pipe))


@pytest.mark.parametrize("base", ["offset", pytest.param("paired", marks=pytest.mark.slow)])
def test_the_scripts_pattern(base: str, folder: Path, tmp_path: Path) -> None:
    pipe = initialized(folder, base=base)
    assert difference(pipe, pipeline(folder)) < 1e-4  # the loss at step 0 is the base's
    trained(pipe)
    assert difference(pipe, pipeline(folder)) > 1e-3
    loaded = pipeline(folder)
    loaded.load_lora_weights(saved(pipe, tmp_path, metadata=True))
    assert difference(pipe, loaded) < 1e-4


@pytest.mark.slow
def test_without_metadata_the_scaling_has_to_be_one(folder: Path, tmp_path: Path) -> None:
    """A file of an older script has no alphas, and diffusers takes alpha = rank for all of it."""
    errors = {}
    for fold in (True, False):
        pipe = trained(initialized(folder, fold_alpha=fold))
        loaded = pipeline(folder)
        loaded.load_lora_weights(saved(pipe, tmp_path / str(fold), metadata=False))
        errors[fold] = difference(pipe, loaded)
    assert errors[True] < 1e-4
    assert errors[False] > 1e-3  # the control


@pytest.mark.slow
def test_adaptive_ranks_load_with_and_without_metadata(folder: Path, tmp_path: Path) -> None:
    pipe = trained(initialized(folder, adaptive_ranks=True, min_rank=1, fold_alpha=True))
    assert pipe.unet.peft_config["default"].rank_pattern
    for metadata in (True, False):
        loaded = pipeline(folder)
        loaded.load_lora_weights(saved(pipe, tmp_path / str(metadata), metadata=metadata))
        assert difference(pipe, loaded) < 1e-4
