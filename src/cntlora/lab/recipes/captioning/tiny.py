"""Tiny random vision-language models with a processor, made offline in a second: what `--smoke` runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ....messages import quiet_transformers
from ..text.tiny import write_rows

CAPTIONS = tuple(f"A {kind} on a {colour} background." for kind in ("dog", "cat") for colour in ("red", "blue"))
_SIZE, _PATCH = 28, 14


def tiny_vlm(model: str, folder: Path) -> str:
    """A folder with a random model of the architecture that a name stands for.

    Names with "llava": LLaVA of CLIP and Llama. Names with "glm": a LLaVA of SigLIP and GLM, the parts of GLM-Edge-V,
    which transformers does not have. Others: DINOv2 and Llama as in the small vision-language model.

    Args:
        model: name or folder of the real model.
        folder: new; configuration, weights and processor are written into it.

    Returns:
        The folder, for `from_pretrained`.
    """
    from ..text.tiny import tiny_language_model

    text = Path(tiny_language_model(folder / "text", CAPTIONS))
    kind = _kind(model)
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        made, processor = _joined(text) if kind == "aya_vision" else _llava(text, kind)
        made.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _kind(model: str) -> str:
    config = Path(model) / "config.json"
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type", "") if config.is_file() else ""
    name = f"{model} {kind}".lower()
    return "llava" if "llava" in name else "glm" if "glm" in name else "aya_vision"


def _joined(text: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, Dinov2Config, LlamaConfig

    from .parts import joined, make_processor

    processor = make_processor(2 * _SIZE, AutoTokenizer.from_pretrained(text))
    vision = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=_PATCH, image_size=2 * _SIZE
    )
    return joined(vision, LlamaConfig.from_pretrained(text), processor.tokenizer, 0), processor


def _llava(text: Path, kind: str) -> tuple[Any, Any]:
    from transformers import (
        AutoTokenizer,
        CLIPVisionConfig,
        GlmConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    from .parts import IMAGE_TOKEN

    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.chat_template = None
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    }  # fmt: skip
    ids = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    glm = kind == "glm"
    vision = (SiglipVisionConfig if glm else CLIPVisionConfig)(image_size=_SIZE, patch_size=_PATCH, **sizes)
    language: Any = (
        GlmConfig(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=16, **sizes, **ids)
        if glm
        else LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes, **ids)
    )
    strategy = "full" if glm else "default"  # SigLIP has no CLS token to leave out
    config = LlavaConfig(
        vision_config=vision, text_config=language, vision_feature_select_strategy=strategy,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), vision_feature_layer=-1 if glm else -2,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), _llava_processor(tokenizer, strategy)


def _llava_processor(tokenizer: Any, strategy: str) -> Any:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    images = CLIPImageProcessorPil(size={"height": _SIZE, "width": _SIZE}, crop_size={"height": _SIZE, "width": _SIZE})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"),
    )


def write_captions(path: Path, concept: str, fields: Mapping[str, str], keys: Mapping[str, str]) -> str:
    """Eight images of noise with captions, as a .jsonl file; its name.

    Args:
        path: of the file; the images lie beside it.
        concept: a name that every other caption contains.
        fields: further columns, the same in each row.
        keys: names of the columns "image", "caption" and "concept"; no column where it is "".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(8):
        generator = torch.Generator().manual_seed(i)
        noise = torch.randint(0, 256, (_SIZE, _SIZE, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path.parent / f"{i}.png")
        own = concept if i % 2 == 0 else ""
        caption = f"{own or 'A'} dog on a {('red', 'blue')[i // 2 % 2]} background."
        row = {"image": f"{i}.png", "caption": caption, "concept": own}
        rows.append({**fields, **{keys[key]: value for key, value in row.items() if keys[key]}})
    return write_rows(path, rows)
