"""Controls of "is it the data?": what an initialisation reads instead of the training data as it is.

The training is the same in any case; only the batches that the initialisation sees are altered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..recipes.task import Task

Batch = Mapping[str, Any]


def read(
    batches: Iterable[Batch],
    count: int,
    used: int,
    task: Task,
    seed: int,
    *,
    unseen: bool = False,
    content: str = "",
    parts: int = 1,
) -> list[Batch]:
    """Return what an initialisation reads: the first `count` batches, with which the training begins too.

    Args:
        batches: of the task, in the order of the training.
        count: batches to read.
        used: batches that the training comes to.
        unseen: those behind the used ones instead, so that no training loss is of what the initialisation has seen.
        task, seed, content, parts: see `altered`.

    Raises:
        ValueError: if there are too few batches for `unseen`, or see `altered`.
    """
    first = used if unseen else 0
    found = list(islice(batches, first, first + count))
    if unseen and len(found) < count:
        raise ValueError(
            f"+unseen: expected {count} batches behind the {used} that the training uses, got {len(found)}; give more "
            "data, or lower init.num_batches or train.steps"
        )
    return altered(found, task, seed, content, parts)


def altered(batches: Sequence[Batch], task: Task, seed: int, content: str = "", parts: int = 1) -> list[Batch]:
    """The batches with other content, or cut into smaller ones.

    Args:
        batches: as the task gives them.
        task: whose tokenizer "foreign" needs.
        seed: of the shuffling.
        content: "" as they are; "shuffled": every batch's tokens (or every image's pixels) in a random order, and
            its labels too; "foreign": the reference manual of Python in the place of its texts, token
            for token.
        parts: every batch is cut into so many of equal size, as far as its rows go.

    Raises:
        ValueError: for content that the task's batches cannot be given.
    """
    generator = torch.Generator().manual_seed(seed)
    if content == "shuffled":
        batches = [_shuffled(batch, generator) for batch in batches]
    if content == "foreign":
        ids = _foreign_ids(task)
        batches = [_foreign(batch, ids, index) for index, batch in enumerate(batches)]
    return [part for batch in batches for part in _cut(batch, parts)]


def _shuffled(batch: Batch, generator: torch.Generator) -> Batch:
    """Keep what occurs and how often, and lose which of it stands together."""
    changed = dict(batch)
    if "input_ids" in batch:
        ids, real = batch["input_ids"].clone(), _real(batch)
        order = torch.randperm(int(real.sum()), generator=generator).to(ids.device)
        ids[real] = ids[real][order]
        changed["input_ids"] = ids
    if "pixel_values" in batch:
        pixels = batch["pixel_values"].flatten(-2)
        order = torch.randperm(pixels.shape[-1], generator=generator).to(pixels.device)
        changed["pixel_values"] = pixels[..., order].view_as(batch["pixel_values"])
    if len(changed["labels"].shape) == 1:
        changed["labels"] = batch["labels"][torch.randperm(len(batch["labels"]), generator=generator)]
    return changed


def _real(batch: Batch) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _foreign_ids(task: Task) -> Tensor:
    from pydoc_data.topics import topics  # of Python itself, so that nothing is downloaded

    tokenizer = getattr(task, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("+foreign: gives the initialisation other texts, and this task has no tokenizer")
    text = "\n".join(topics[name] for name in sorted(topics))[:400_000]
    return torch.tensor(tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"])


def _foreign(batch: Batch, ids: Tensor, index: int) -> Batch:
    """Running text in the place of all tokens but the first and last of a row, so that special ones stay."""
    real = _real(batch).clone()
    real[:, 0] = False
    last = _real(batch).long().sum(dim=1) - 1
    real[torch.arange(len(real)), last] = False
    count = int(real.sum())
    taken = ids[(index * count + torch.arange(count)) % len(ids)]
    changed = batch["input_ids"].clone()
    changed[real] = taken.to(changed)
    return {**batch, "input_ids": changed}


def _cut(batch: Batch, parts: int) -> Iterator[Batch]:
    if parts == 1:
        yield batch
        return
    rows = len(batch["labels"])
    for chosen in torch.arange(rows).tensor_split(min(parts, rows)):
        yield {
            key: value[chosen] if isinstance(value, Tensor) and len(value) == rows else value
            for key, value in batch.items()
        }
