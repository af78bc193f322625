"""A tiny pipeline, an adapter of both its parts, and what the pipeline's own reader makes of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import unet
from torch import Tensor, nn

from cntlora import InitConfig, initialize, save_adapter
from cntlora.files.export_parts import read_parts

Batch = tuple[Tensor, Tensor, Tensor]
NEAR = {"rtol": 1e-4, "atol": 5e-5}
"""Of outputs of size 1: moving every weight by eps moves them by up to 9e-6, so much do the layers amplify."""
ATTENTION = r".*attn[12]\.(to_q|to_k|to_v|to_out\.0)"
UNET = rf"(unet\.)?({ATTENTION}|.*ff\.net\.(0\.proj|2)|.*time_emb_proj)"
CLIP = r"text_encoder\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
ADAPTIVE: dict[str, Any] = {"adaptive_ranks": True, "rank_budget": 150, "min_rank": 1}


def text_encoder(seed: int = 1) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=40, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, initializer_range=0.3, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPTextModel(config).eval()


class Both(nn.Module):
    """A UNet and its text encoder as one model, named as the parts of a pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet(), text_encoder()

    def forward(self, latents: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
        return self.unet(latents, steps, encoder_hidden_states=self.text_encoder(ids)[0]).sample


def batches(count: int = 2, seed: int = 0) -> list[Batch]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(3, 2, 8, 8, generator=g), torch.tensor([3, 5, 9]), torch.randint(2, 40, (3, 6), generator=g))
        for _ in range(count)
    ]


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(*batches(1, seed=9)[0])


def trained(lora: dict[str, Any] | None = None, **init: Any) -> Any:
    """A Both with an initialised adapter, moved by noise as training would.

    Some of its inputs have nearly no spread in some directions. Without a tolerance the start is as large as their
    rounding is small, and so is what rounding does to the output.
    """
    init = init if "method" in init else {"rtol": 1e-3, **init}
    options = {"r": 3, "lora_alpha": 12, "target_modules": f"{UNET}|{CLIP}", **(lora or {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = get_peft_model(Both(), LoraConfig(**options)).eval()
        initialize(model, batches(), InitConfig.from_dict({"method": "self", **init}), progress=False)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def level_of_names() -> str:
    """Return the level `text_model.` of CLIP's names where this transformers has none, as from 5 on."""
    return "" if hasattr(text_encoder(), "text_model") else "text_model."


def pipeline() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=None, text_encoder=text_encoder(), tokenizer=None, unet=unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def read_by_pipeline(file: Any) -> Tensor:
    """The output of the pipeline's own UNet and text encoder after `load_lora_weights`."""
    pipe = pipeline()
    if isinstance(file, dict):
        pipe.load_lora_weights(file)
    else:  # diffusers 0.37 asks for the name when it is offline
        folder, name = (file, "pytorch_lora_weights.safetensors") if file.is_dir() else (file.parent, file.name)
        pipe.load_lora_weights(str(folder), weight_name=name)
    parts = Both()
    parts.unet, parts.text_encoder = pipe.unet.eval(), pipe.text_encoder.eval()
    return output(parts)


class Saved:
    """A folder and what its model gives."""

    def __init__(self, folder: Path, model: Any) -> None:
        self.folder, self.wanted, self.pristine = folder, output(model), output(Both())
        save_adapter(model, folder)
        assert (self.wanted - self.pristine).abs().max() > 1e-2  # the control of all that follows


def uneven(folder: Path) -> Saved:
    """A saved adapter whose ranks differ from site to site, in both parts."""
    saved = Saved(folder, trained(base="offset", **ADAPTIVE))
    for sites in read_parts(saved.folder).values():
        assert len({site.rank for site in sites.values()}) > 2
    return saved


def pair(name: str) -> dict[str, Tensor]:
    """Factors of one site, as a file has them."""
    return {f"{name}.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
