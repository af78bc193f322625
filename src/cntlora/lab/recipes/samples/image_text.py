"""A weak stand-in for CLIP's image–text score, where no CLIP can be had, through the names of ImageNet's classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ....messages import quiet_transformers
from .downloads import packaged_file
from .efficientnet import efficientnet, pixels
from .models import minilm_folder


def imagenet_names() -> list[str]:
    """The names of ImageNet's 1,000 classes in the order of the usual logits, synonyms after commas.

    Source: PyPI timm 1.0.31 (Apache-2.0), its tables of WordNet's synsets; 2.8 MB, downloaded once.

    Raises:
        RuntimeError: if it cannot be downloaded; the message says what to do.
    """
    folder = packaged_file(
        "timm",
        "1.0.31",
        "5bd50f7d0fe6d09bf9285ac2523234a1b7e6bf075c0be3e7aed09139fcb617c7",
        "timm/data/_info",
        only=r"imagenet_synsets\.txt|imagenet_synset_to_lemma\.txt",
    )
    lines = (folder / "imagenet_synset_to_lemma.txt").read_text(encoding="utf-8").splitlines()
    names = dict(line.split("\t", 1) for line in lines)
    return [names[synset] for synset in (folder / "imagenet_synsets.txt").read_text(encoding="utf-8").split()]


@lru_cache(maxsize=1)
def _encoder() -> tuple[torch.nn.Module, object]:
    from transformers import AutoModel, AutoTokenizer

    with quiet_transformers():
        return AutoModel.from_pretrained(minilm_folder()).eval().float(), AutoTokenizer.from_pretrained(minilm_folder())


def minilm_embeddings(texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """Sentence embeddings of all-MiniLM-L6-v2: means over the tokens, of norm 1, float32 (texts, 384).

    Raises:
        ValueError: for no text.
        RuntimeError: if the model cannot be downloaded.
    """
    if not texts:
        raise ValueError("texts: expected at least one, got none")
    model, tokenizer = _encoder()
    parts = []
    for i in range(0, len(texts), batch_size):
        batch = tokenizer(  # type: ignore[operator]
            list(texts[i : i + batch_size]), padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        parts.append((hidden * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(parts))


@lru_cache(maxsize=1)
def _class_embeddings() -> Tensor:
    return minilm_embeddings(imagenet_names())


def image_text_score(images: Sequence[Image.Image], captions: Sequence[str], batch_size: int = 32) -> Tensor:
    """Cosine of each image and each caption, float32 (images, captions); a WEAK PROXY of CLIP-T, say so beside it.

    An image is the mean of the embeddings of ImageNet's class names, weighted by EfficientNet-lite0's probabilities;
    a caption is its own embedding. The right one is among the five best captions for 39 % of the 319 stamps of
    animals, food, household, plants and vehicles, 21 % of all 785 stamps and 11 % of 554 emoji of animals, food and
    objects (chance: 1.6, 0.6 and 0.9 %): what ImageNet has no class for, it cannot see.

    Raises:
        ValueError: for no image or no caption.
        RuntimeError: if a model cannot be downloaded; the message says what to do.
    """
    if not images:
        raise ValueError("images: expected at least one, got none")
    model, names = efficientnet(), _class_embeddings()
    parts = []
    for i in range(0, len(images), batch_size):
        with torch.no_grad():
            parts.append(model(pixels(images[i : i + batch_size])).softmax(-1) @ names)
    return F.normalize(torch.cat(parts)) @ minilm_embeddings(captions).T
