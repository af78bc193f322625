"""Scores of generated images, likeness to the subject and to the prompt: DINO, CLIP-I, CLIP-T, and stand-ins.

All are cosines in [−1, 1]; the paper gives them times 100. A similarity is the mean over all pairs of a generated
image and a photo of the subject.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import normalize

from ....messages import first_line, quiet_transformers
from ..vision.pixels import IMAGENET_MEAN, IMAGENET_STD

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDE = 224
STAND_INS = ("sample:dinov2", "sample:efficientnet")
Features = Callable[[Sequence[Image.Image]], Tensor]


def pixels(pictures: Sequence[Image.Image], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images (n, 3, 224, 224): the largest square from the middle, bicubic, normalised."""
    fitted = [ImageOps.fit(picture.convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC) for picture in pictures]
    values = torch.tensor(np.stack([np.asarray(one) for one in fitted])).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@lru_cache(maxsize=4)
def _loaded(model: str) -> Any:
    """A model for scoring, in float32 and evaluation mode, on the GPU if there is one.

    Raises:
        ValueError: if there is no such model.
    """
    from transformers import AutoModel

    if model == "sample:dinov2":
        from ..samples.models import dinov2_folder

        folder = str(dinov2_folder())
    else:
        folder = model
    try:
        with quiet_transformers():
            found = AutoModel.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"metric model {model!r}: cannot be loaded ({first_line(error)}); give a folder or a hub name, "
            "or '' to leave it out"
        ) from error
    return found.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def class_tokens(model: str, pictures: Sequence[Image.Image]) -> Tensor:
    """Unit vectors (n, width): the class token of a vision transformer after its last norm, as in DINO's measure."""
    network = _loaded(model)
    outputs = network(pixel_values=pixels(pictures, IMAGENET_MEAN, IMAGENET_STD).to(network.device))
    return normalize(outputs.last_hidden_state[:, 0].float().cpu(), dim=-1)


@torch.no_grad()
def clip_pictures(model: str, pictures: Sequence[Image.Image]) -> Tensor:
    """Unit vectors (n, width) of CLIP's image side."""
    network = _loaded(model)
    values = pixels(pictures, CLIP_MEAN, CLIP_STD).to(network.device)
    pooled = network.vision_model(pixel_values=values).pooler_output
    return normalize(network.visual_projection(pooled).float().cpu(), dim=-1)


@torch.no_grad()
def clip_texts(model: str, texts: Sequence[str]) -> Tensor:
    """Unit vectors (n, width) of CLIP's text side."""
    from transformers import AutoTokenizer

    network = _loaded(model)
    tokens = AutoTokenizer.from_pretrained(model)(list(texts), padding=True, truncation=True, return_tensors="pt")
    pooled = network.text_model(**tokens.to(network.device)).pooler_output
    return normalize(network.text_projection(pooled).float().cpu(), dim=-1)


def efficientnet(pictures: Sequence[Image.Image]) -> Tensor:
    """Unit vectors (n, 1280): pooled features of EfficientNet-lite0."""
    from ..samples.efficientnet import efficientnet_features

    return normalize(efficientnet_features([picture.convert("RGB") for picture in pictures]), dim=-1)


def measures(dino: str, clip: str, stand_ins: Sequence[str]) -> dict[str, Features]:
    """The similarities to the subject, by the name of the metric.

    Args:
        dino: vision transformer for "dino", "" for none.
        clip: CLIP model for "clip_i", "" for none.
        stand_ins: of `STAND_INS`, where neither can be had: "dinov2" and "efficientnet".
    """
    found: dict[str, Features] = {}
    if dino:
        found["dino"] = lambda pictures: class_tokens(dino, pictures)
    if clip:
        found["clip_i"] = lambda pictures: clip_pictures(clip, pictures)
    if "sample:dinov2" in stand_ins:
        found["dinov2"] = lambda pictures: class_tokens("sample:dinov2", pictures)
    if "sample:efficientnet" in stand_ins:
        found["efficientnet"] = efficientnet
    return found


def similarity(features: Features, made: Sequence[Image.Image], photos: Tensor) -> float:
    """Mean cosine of all pairs of an image and a row of `photos`, unit vectors (m, width)."""
    return float((features(made) @ photos.T).mean())


def text_fidelity(clip: str, made: Sequence[Image.Image], texts: Sequence[str]) -> float:
    """CLIP-T: mean cosine of each image and its own text."""
    return float((clip_pictures(clip, made) * clip_texts(clip, texts)).sum(dim=-1).mean())
