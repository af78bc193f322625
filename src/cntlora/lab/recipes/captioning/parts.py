"""Two pretrained models as one vision-language model of transformers: the parts of `small_vlm`.

The class is `AyaVisionForConditionalGeneration`: it takes any vision tower and any causal language model, and lays
2 × 2 patches of the image into one token before its two-layer projector, which makes images a quarter as long.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ..samples.models import dinov2_folder, smollm2

IMAGE_TOKEN = "<image>"
PROMPT = f"{IMAGE_TOKEN}\nDescribe the image.\n"
PATCH = 14
MERGED = 2  # patches in a row that become one token
VISION_LAYERS = 11  # of 12: as features the 11th's are better than the last's


def make_processor(size: int, tokenizer: Any = None) -> Any:
    """A processor for images of `size` × `size` pixels, (size / 28)² tokens each; SmolLM2's tokenizer unless given."""
    from transformers import BitImageProcessorPil, LlavaProcessor

    if tokenizer is None:
        _, tokenizer = smollm2()
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.chat_template = None  # of texts alone; prompts place the image themselves
    images = BitImageProcessorPil(
        size={"height": size, "width": size}, do_center_crop=False, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    # the processor counts a token for each patch of its patch size, here of merged patches; "full": no CLS token
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH * MERGED, vision_feature_select_strategy="full"
    )


def join_models(processor: Any, seed: int) -> Any:
    """DINOv2-S without its last layer and SmolLM2-135M as one model; the projector is drawn under the seed."""
    from transformers import Dinov2Model

    vision = Dinov2Model.from_pretrained(dinov2_folder())
    vision.encoder.layer = vision.encoder.layer[:VISION_LAYERS]
    vision.config = _shorter(vision.config, VISION_LAYERS)
    language, _ = smollm2()
    model = joined(vision.config, language.config, processor.tokenizer, seed)
    _copy(vision, model.model.vision_tower)
    _copy(cast(Any, language).model, model.model.language_model)
    return model.eval()


def _shorter(config: Any, layers: int) -> Any:
    """The configuration of a DINOv2 with fewer layers; the names of its stages follow from their number."""
    values = {k: v for k, v in config.to_dict().items() if k not in ("out_features", "out_indices", "stage_names")}
    return type(config)(**{**values, "num_hidden_layers": layers})


def joined(vision: Any, language: Any, tokenizer: Any, seed: int) -> Any:
    """A model with random weights of two configurations, with room for the image token of the tokenizer."""
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration

    language.vocab_size = len(tokenizer)
    config = AyaVisionConfig(
        vision_config=vision, text_config=language, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        downsample_factor=MERGED, vision_feature_select_strategy="default", vision_feature_layer=-1,
        alignment_intermediate_size=2 * language.hidden_size, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = AyaVisionForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _copy(source: nn.Module, target: nn.Module) -> None:
    """Copy all weights; the rows that a longer vocabulary adds become the mean of the others, never the likeliest."""
    state = source.state_dict()
    for name, there in target.state_dict().items():
        given = state.pop(name)
        if given.shape != there.shape:
            rows = given.mean(0, keepdim=True).expand(len(there) - len(given), -1)
            given = torch.cat([given, rows])
        there.copy_(given)
    if state:
        raise RuntimeError(f"weights without a place in {type(target).__name__}: {', '.join(sorted(state))}")
