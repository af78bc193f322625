"""Rows of tokens that are looked at in another way: a view, copies that a router picked, ids that a model changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cntlora.data.rows import Rows, found_by_value, same_ids, seen_as_view

KEEP = torch.tensor([[True, True, False], [True, False, False]])


def rows_of(kind: str) -> Rows:
    return Rows(kind, KEEP, "attention_mask")


@pytest.mark.parametrize(
    ("look", "expected"),
    [
        (lambda x: x.transpose(0, 1), KEEP.mT),
        (lambda x: x.reshape(-1, 4), KEEP.flatten()),
        (lambda x: x[:, 0], KEEP[:, 0]),
        (lambda x: x[:, 1:], KEEP[:, 1:]),
        (lambda x: x[1:].reshape(3, 4), KEEP[1]),
        (lambda x: x.flip(0), None),  # a copy
        (lambda x: x.reshape(2, 6, 2), None),  # parts of rows
        (lambda x: x[..., 1:], None),
    ],
)
def test_a_look_at_the_same_memory_has_the_rows_that_it_looks_at(look: Any, expected: Tensor | None) -> None:
    base = torch.randn(2, 3, 4)
    x = look(base)
    if x.untyped_storage().data_ptr() != base.untyped_storage().data_ptr():
        assert expected is None
        return
    found = seen_as_view(x, base, rows_of("text"))
    assert (found is None) if expected is None else (found is not None and torch.equal(found.keep, expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_a_router_picked_are_found_by_their_bits(dtype: torch.dtype) -> None:
    base = torch.randn(2, 3, 4).to(dtype)
    base[1, 2] = base[0, 0]  # a token that counts and one that does not, of equal bits
    flat, places = base.reshape(-1, 4), torch.tensor([5, 1, 0, 3])
    found = found_by_value(flat[places], base, rows_of("text"))
    assert found is not None and found.keep is not None
    assert found.keep.tolist() == [True, True, False, True]  # the first of two equal rows is the first of them
    twice = found_by_value(flat[[1, 1, 2, 2]], base, rows_of("text"))
    assert twice is not None and twice.keep is not None and twice.keep.tolist() == [True, True, False, False]
    assert found_by_value(flat[places] + 1, base, rows_of("text")) is None  # control: no row of it
    empty = found_by_value(flat[:0], base, rows_of("text"))
    assert empty is not None and empty.keep is not None and empty.keep.shape == (0,)


def test_ids_are_known_padded_and_transposed_and_no_others() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 4]])
    padded = torch.cat([ids, torch.ones(2, 2, dtype=torch.long)], dim=1)
    for other, expected in ((ids.clone(), KEEP), (ids.mT.contiguous(), KEEP.mT), (padded, F.pad(KEEP, (0, 2)))):
        found = same_ids(other, ids, rows_of("text"))
        assert found is not None and torch.equal(found.keep, expected)
    for stranger in (ids + 1, padded.flip(1), ids[:, :2], ids[0]):
        assert same_ids(stranger, ids, rows_of("text")) is None
