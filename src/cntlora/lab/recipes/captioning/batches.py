"""Batches of images, prompts and captions for vision-language models, and the prompts to generate from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..text.tables import IGNORED
from .data import CaptionRow


def full_prompt(processor: Any, prompt: str) -> str:
    """Return what the processor reads: a prompt that places the image itself as it is, any other as a turn of a chat.

    Raises:
        ValueError: if the prompt has no place for the image and the model has no chat template that makes one.
    """
    token = image_token(processor)
    if token and token in prompt:
        return prompt
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if not template:
        raise ValueError(
            f"task.prompt: expected a place for the image, {token or 'the image token'!r}, since the model has no chat "
            f"template; got {prompt!r}"
        )
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    return str(processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False))


def image_token(processor: Any) -> str:
    """The text that stands for the image in a prompt; "" if the processor does not say."""
    return str(getattr(processor, "image_token", "") or "")


@dataclass
class CaptionBatches:
    """Batches that are made while they are read, in another order at every pass; the loss is of the caption alone.

    Each is a dict of what the model's processor gives (pixel_values and the like), input_ids and attention_mask
    (batch, tokens), padded on the right, and labels: −100 but for the caption and the end of text behind it.

    Attributes:
        processor: of the model.
        rows: what to show.
        batch_size: rows a batch; the last one may have fewer.
        max_caption: tokens of a caption, the end of text included; longer ones are cut.
        seed: of the order; None for the rows as they come.
        epoch: of the next pass.
    """

    processor: Any
    rows: Sequence[CaptionRow]
    batch_size: int
    max_caption: int
    seed: int | None = None
    epoch: int = field(default=0)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """The pass, 0 for the first, that the next reading is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = list(range(len(self.rows)))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        self.epoch += 1
        for start in range(0, len(order), self.batch_size):
            yield self._batch([self.rows[i] for i in order[start : start + self.batch_size]])

    def _batch(self, rows: Sequence[CaptionRow]) -> dict[str, Tensor]:
        tokenizer = self.processor.tokenizer
        asked = self.processor(
            images=[row.open() for row in rows],
            text=[full_prompt(self.processor, row.prompt) for row in rows],
            padding=True,
            return_tensors="pt",
        )
        captions = []
        for row in rows:
            ids = tokenizer(row.caption, add_special_tokens=False)["input_ids"]
            captions.append(torch.tensor([*ids[: self.max_caption - 1], tokenizer.eos_token_id]))
        return with_captions(dict(asked), captions, pad=padding_id(tokenizer))


def padding_id(tokenizer: Any) -> int:
    """The id that fills up; the end of text if the tokenizer has no padding token."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def with_captions(asked: Mapping[str, Tensor], captions: Sequence[Tensor], pad: int) -> dict[str, Tensor]:
    """Prompts, padded on either side, with captions behind them: the batch that a model is trained on.

    Args:
        asked: of the processor: input_ids and attention_mask (n, t), and anything else; what else is of shape (n, t),
            such as token_type_ids, is lengthened by zeros.
        captions: ids of each caption.
        pad: the id of padding.
    """
    mask = asked["attention_mask"].bool()
    shape = asked["input_ids"].shape
    fill = {"input_ids": pad}
    batch: dict[str, Tensor] = {}
    for name, values in asked.items():
        if values.shape != shape:
            batch[name] = values
            continue
        tails = (
            captions if name == "input_ids" else [torch.full_like(c, int(name == "attention_mask")) for c in captions]
        )
        joined = [torch.cat([row[kept], tail.to(row)]) for row, kept, tail in zip(values, mask, tails, strict=True)]
        batch[name] = _padded(joined, fill.get(name, 0), left=False)
    labels = [torch.cat([torch.full((int(kept.sum()),), IGNORED), c]) for kept, c in zip(mask, captions, strict=True)]
    batch["labels"] = _padded(labels, IGNORED, left=False)
    return batch


def prompts_of(batch: Mapping[str, Tensor], pad: int) -> dict[str, Tensor]:
    """Return what to generate from: the batch without captions and labels, padded on the left."""
    labels, mask = batch["labels"], batch["attention_mask"].bool()
    kept = mask & (labels == IGNORED)
    asked: dict[str, Tensor] = {}
    for name, values in batch.items():
        if name == "labels":
            continue
        same = values.shape == labels.shape
        fill = pad if name == "input_ids" else 0
        asked[name] = (
            _padded([row[k] for row, k in zip(values, kept, strict=True)], fill, left=True) if same else values
        )
    return asked


def captions_of(batch: Mapping[str, Tensor], tokenizer: Any) -> list[str]:
    """The captions to learn, as text."""
    return [str(tokenizer.decode(row[row != IGNORED], skip_special_tokens=True)).strip() for row in batch["labels"]]


def _padded(rows: Sequence[Tensor], value: int, *, left: bool) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        list(rows), batch_first=True, padding_value=value, padding_side="left" if left else "right"
    )
