"""Scores of captions: SentSim, Recall of concepts, and the captions themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....data.batches import to_device
from ..scoring import modes
from ..text.tables import IGNORED
from .batches import captions_of, padding_id, prompts_of


@dataclass(frozen=True)
class Sentences:
    """Sentence embeddings: a transformer's states, averaged over the tokens, of unit length.

    Attributes:
        model: hub name or folder, or "sample:minilm".
    """

    model: str

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import AutoModel

        from ....messages import quiet_transformers
        from ..loading import load_tokenizer, resolve_model

        _, tokenizer = load_tokenizer(self.model)
        with quiet_transformers(), torch.random.fork_rng():  # what the file lacks, such as a pooler, is drawn
            return tokenizer, AutoModel.from_pretrained(resolve_model(self.model)).eval()

    def check(self) -> None:
        """Find the model, whose first use is after a training.

        Raises:
            ValueError: if it cannot be found; names what to set instead.
        """
        from ..loading import load_tokenizer

        try:
            load_tokenizer(self.model)
        except ValueError as error:
            raise ValueError(
                f'task.sentences, which scores captions: {error}; "" leaves this score out, "sample:minilm" is a model '
                "that comes in a package"
            ) from error

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (n, hidden), each of length 1."""
        tokenizer, model = self._parts
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def similarity(self, said: Sequence[str], truth: Sequence[str]) -> float:
        """SentSim: the mean cosine of captions and references, in [−1, 1]."""
        return float((self.embed(said) * self.embed(truth)).sum(-1).mean())


def recall(said: Sequence[str], truth: Sequence[str], concepts: Sequence[str]) -> tuple[float, float]:
    """Return how often a caption names the concept that its reference names, and how often another one.

    Args:
        said: captions of a model.
        truth: their references.
        concepts: all of them; each row has those that its reference contains.

    Returns:
        The share of the rows with a concept whose caption contains it (Recall; nan without such rows), and the share
        of all rows whose caption contains a concept that the reference does not.
    """
    found, of, wrong = 0, 0, 0
    for caption, reference in zip(said, truth, strict=True):
        own = [concept for concept in concepts if concept in reference]
        of += len(own) > 0
        found += any(concept in caption for concept in own)
        wrong += any(concept in caption for concept in concepts if concept not in own)
    return found / of if of else float("nan"), wrong / len(said)


def generate(model: nn.Module, batch: Mapping[str, Tensor], tokenizer: Any, max_tokens: int) -> list[str]:
    """The most probable captions, token by token; no random numbers are drawn."""
    inputs = to_device(prompts_of(batch, padding_id(tokenizer)), next(model.parameters()).device)
    made: Any = model
    with modes(model, training=False), torch.no_grad():
        output = made.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, num_beams=1, pad_token_id=padding_id(tokenizer)
        )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def score_captions(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    tokenizer: Any,
    *,
    sentences: Sentences | None,
    concepts: Sequence[str],
    max_tokens: int,
) -> dict[str, float]:
    """Loss (nats a token), sentsim if there is a model for it and, if there are concepts, recall and wrong_concept.

    Raises:
        ValueError: if there is no batch.
    """
    total, tokens = 0.0, 0
    said: list[str] = []
    truth: list[str] = []
    device = next(model.parameters()).device
    for batch in batches:
        count = int((batch["labels"] != IGNORED).sum())
        with modes(model, training=False), torch.no_grad():
            total += float(model(**to_device(batch, device)).loss) * count
        tokens += count
        said += generate(model, batch, tokenizer, max_tokens)
        truth += captions_of(batch, tokenizer)
    if not truth:
        raise ValueError("batches: expected at least one batch, got none")
    scores = {"loss": total / tokens}
    if sentences:
        scores["sentsim"] = sentences.similarity(said, truth)
    if concepts:
        scores["recall"], scores["wrong_concept"] = recall(said, truth, concepts)
    return scores
