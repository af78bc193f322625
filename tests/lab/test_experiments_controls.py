"""Controls of an initialisation: other content in the same shape, and the batches left as found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cntlora.lab.experiments.controls import altered, read


class _Tokenizer:
    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [500 + ord(c) % 50 for c in text]}


class _Task:
    tokenizer = _Tokenizer()


def _batches() -> list[dict[str, torch.Tensor]]:
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[1, 4:] = 0
    ids = torch.arange(24).view(4, 6) + 10
    return [{"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 3])}]


def test_shuffled_keeps_what_occurs_and_loses_what_stands_together() -> None:
    before = _batches()
    (batch,) = altered(before, _Task(), 0, content="shuffled")  # type: ignore[arg-type]
    assert torch.equal(before[0]["input_ids"], _batches()[0]["input_ids"])
    real = batch["attention_mask"].bool()
    assert torch.equal(batch["input_ids"][~real], torch.zeros(2, dtype=torch.long))
    assert batch["input_ids"][real].sort().values.equal(before[0]["input_ids"][real].sort().values)
    assert not torch.equal(batch["input_ids"], before[0]["input_ids"])
    assert sorted(batch["labels"].tolist()) == [0, 1, 2, 3]


def test_pixels_move_together_in_all_channels() -> None:
    pixels = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    (batch,) = altered([{"pixel_values": pixels, "labels": torch.tensor([0, 1])}], _Task(), 1, content="shuffled")  # type: ignore[arg-type]
    moved = batch["pixel_values"].flatten(-2)
    assert not torch.equal(moved, pixels.flatten(-2))
    assert torch.equal(moved[0, 1] - moved[0, 0], torch.full((16,), 16.0))


def test_foreign_text_keeps_first_and_last_tokens() -> None:
    before = _batches()[0]
    (batch,) = altered([before], _Task(), 0, content="foreign")  # type: ignore[arg-type]
    changed = batch["input_ids"] != before["input_ids"]
    last = before["attention_mask"].sum(1) - 1
    assert not changed[:, 0].any() and not changed[torch.arange(4), last].any()
    assert int(changed.sum()) == int(before["attention_mask"].sum()) - 8
    assert (batch["input_ids"][changed] >= 500).all()
    with pytest.raises(ValueError, match="no tokenizer"):
        altered([before], object(), 0, content="foreign")  # type: ignore[arg-type]


def test_parts_hold_all_rows_once() -> None:
    parts = altered(_batches(), _Task(), 0, parts=3)  # type: ignore[arg-type]
    assert [len(part["labels"]) for part in parts] == [2, 1, 1]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), _batches()[0]["input_ids"])
    assert len(altered(_batches(), _Task(), 0, parts=9)) == 4  # type: ignore[arg-type]


def test_unseen_batches_lie_behind_those_of_the_training() -> None:
    batches = [{"labels": torch.tensor([i, i])} for i in range(9)]

    def numbers(**options: Any) -> list[int]:
        found = read(iter(batches), 3, 5, _Task(), 0, **options)  # type: ignore[arg-type]
        return [int(batch["labels"][0]) for batch in found]

    assert numbers() == [0, 1, 2] and numbers(unseen=True) == [5, 6, 7]
    assert numbers(unseen=True, parts=2) == [5, 5, 6, 6, 7, 7]
    with pytest.raises(ValueError, match=r"\+unseen: expected 3 batches behind the 7 .* got 2"):
        read(batches, 3, 7, _Task(), 0, unseen=True)  # type: ignore[arg-type]
