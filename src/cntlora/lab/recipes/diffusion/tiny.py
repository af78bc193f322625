"""Tiny random pipelines and scoring models of the real classes, for tests and `--smoke`: they draw noise, offline."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    ViTConfig,
    ViTModel,
)

from ....messages import quiet_transformers
from .pixel_pipeline import PixelPipeline
from .settings import DreamboothSettings

WIDTH = 16
LENGTH = 16
_BYTES = [chr(i) for i in range(33, 127)]


def clip_tokenizer(folder: Path) -> Any:
    """A tokenizer of CLIP's kind that knows single letters."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [*_BYTES, *(letter + "</w>" for letter in _BYTES), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _text_config(vocabulary: int, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=LENGTH, bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1, projection_dim=WIDTH, **more,
    )  # fmt: skip


def _unet(channels: int, size: int, width: int, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width, attention_head_dim=2, norm_num_groups=4, **more,
    )  # fmt: skip


def _scheduler(**more: Any) -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1, **more
    )


def _vae() -> AutoencoderKL:
    blocks = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return AutoencoderKL(
        down_block_types=blocks[0], up_block_types=blocks[1], block_out_channels=(8, 8), norm_num_groups=4,
        latent_channels=4, sample_size=16,
    )  # fmt: skip


def stable_diffusion(folder: Path) -> None:
    """Stable Diffusion's classes at 16 × 16 pixels."""
    tokenizer = clip_tokenizer(folder / "tokenizer")
    text = CLIPTextModel(_text_config(len(tokenizer)))
    StableDiffusionPipeline(
        vae=_vae(), text_encoder=text, tokenizer=tokenizer, unet=_unet(4, 8, WIDTH), scheduler=_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def stable_diffusion_xl(folder: Path) -> None:
    """SDXL's classes at 16 × 16 pixels: two text encoders, pooled embeddings, sizes as a condition."""
    tokenizer = clip_tokenizer(folder / "tokenizer")
    first = CLIPTextModel(_text_config(len(tokenizer)))
    second = CLIPTextModelWithProjection(_text_config(len(tokenizer)))
    unet = _unet(
        4, 8, 2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8, use_linear_projection=True,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=first, text_encoder_2=second, tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet,
        scheduler=_scheduler(), add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip


def pixel(folder: Path) -> None:
    """The pixel-space pipeline, with a BERT, at 16 × 16 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_BYTES, *(f"##{letter}" for letter in _BYTES)]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer.from_pretrained(str(folder))
    config = BertConfig(
        vocab_size=len(words), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * WIDTH, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    scheduler = _scheduler(prediction_type="v_prediction")
    PixelPipeline(_unet(12, 8, WIDTH), scheduler, BertModel(config), tokenizer, LENGTH).save_pretrained(folder)


def scoring_models(dino: Path, clip: Path) -> None:
    """A vision transformer and a CLIP for images of 224 × 224."""
    shape: dict[str, Any] = {
        "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": WIDTH,
        "image_size": 224,
    }  # fmt: skip
    ViTModel(ViTConfig(**shape, patch_size=112), add_pooling_layer=False).save_pretrained(dino)
    tokenizer = clip_tokenizer(clip)
    text = _text_config(len(tokenizer)).to_dict()
    config = CLIPConfig(text_config=text, vision_config={**shape, "patch_size": 112}, projection_dim=WIDTH)
    CLIPModel(config).save_pretrained(clip)


def noise_photos(folder: Path, count: int, size: int = 24) -> None:
    """Write images of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def tiny_settings(settings: DreamboothSettings, folder: Path) -> DreamboothSettings:
    """The same task on a tiny random pipeline of the same family and four photos of noise, written in `folder`."""
    name = settings.model.lower()
    made = pixel if name.startswith("sample:") else stable_diffusion_xl if "xl" in name else stable_diffusion
    dino, clip = folder / "dino", folder / "clip"
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        made(folder / "model")
        scoring_models(dino, clip)
    noise_photos(folder / "photos", 4)
    return dataclasses.replace(
        settings, model=str(folder / "model"), data=str(folder / "photos"), class_pictures=2,
        class_folder=str(folder / "class"), seeds=1, prompt_count=2, prompts=(), sampling_steps=2, stand_ins=(),
        dino=str(dino) if settings.dino or settings.stand_ins else "", clip=str(clip) if settings.clip else "",
    )  # fmt: skip
