"""Symmetric matrices by one triangle, alone and as sums over batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cntlora.linalg.pseudo_inverse import numerical_rank, rank_with_gap
from cntlora.linalg.sums import SharedSums
from cntlora.linalg.symmetric import Symmetric, held_numbers


def gram(seed: int, d: int, n: int = 400) -> Tensor:
    X = torch.randn(d, n, generator=torch.Generator().manual_seed(seed))
    M = X @ X.mT
    return torch.triu(M) + torch.triu(M, 1).mT


@pytest.mark.parametrize("d", [1, 2, 3, 128, 129, 300])
def test_it_is_the_matrix(d: int) -> None:
    M, more = gram(0, d), gram(1, d)
    below = torch.full((d, d), 7.0).tril(-1)  # which is not read
    held = Symmetric.of(M + below)
    assert torch.equal(held.dense(), M)
    assert torch.equal(held.add_(more + below, 0.5).dense(), torch.add(M, more, alpha=0.5))
    assert torch.equal(M + below, M) == (d == 1)  # the control
    assert held.flat.numel() == held_numbers(d) <= d * d


def test_no_number_is_held_twice() -> None:
    for d in (1, 2, 7, 8):
        M = torch.arange(1, d * d + 1).float().view(d, d)
        above = M[torch.ones(d, d).triu().bool()]
        assert sorted(Symmetric.of(M).flat.tolist()) == sorted(above.tolist())
        assert sorted(Symmetric.of(M.mT).flat.tolist()) != sorted(above.tolist()) or d == 1  # the control


def test_sums_that_others_hold_are_not_edited() -> None:
    sums, terms = SharedSums(symmetric=True), [gram(seed, 150) for seed in range(3)]
    sums.add(["a", "b"], terms[0])
    sums.add(["a"], terms[1], 2.0)
    sums.add(["a", "b"], terms[2])
    one, other = sums.get("a"), sums.get("b")
    assert one is not None and other is not None and not sums.same("a", "b")
    assert torch.allclose(one, terms[0] + 2 * terms[1] + terms[2], rtol=1e-5)
    assert torch.allclose(other, terms[0] + terms[2], rtol=1e-5) and not torch.allclose(one, other, rtol=1e-2)


def test_the_place_of_a_sum_does_not_show_in_its_bits() -> None:
    plain, moved = SharedSums(symmetric=True), SharedSums(symmetric=True)
    places: list[Tensor] = []
    moved.place = lambda total: (places.append(total.clone()), places[-1])[1]
    for seed in range(3):
        for sums in (plain, moved):
            sums.add(["a"], gram(seed, 150), 0.3)
    assert torch.equal(plain.get("a"), moved.get("a")) and len(places) == 1  # type: ignore[arg-type]
    assert places[0].numel() == held_numbers(150)
    ((names, formed),) = plain.groups()  # as several processes add them up
    assert names == ["a"] and torch.equal(formed, moved.get("a"))  # type: ignore[arg-type]


def test_a_rank_is_told_only_where_rounding_does_not_hide_it() -> None:
    Q = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    eps, rtol = torch.finfo(torch.float32).eps, 60 * torch.finfo(torch.float32).eps

    def rounded(values: Tensor) -> Tensor:
        return ((Q * values) @ Q.mT).float()

    full, poor = torch.linspace(1, 0.1, 60).double(), torch.ones(60).double()
    poor[12:] = 0
    smooth = torch.logspace(0, -7, 60).double()
    assert rank_with_gap(rounded(full), rtol) == 60 and rank_with_gap(rounded(poor), rtol) == 12
    assert rank_with_gap(rounded(smooth), rtol) is None
    assert (
        0 < numerical_rank(rounded(smooth), rtol) < 60 and float(smooth[-1]) < eps
    )  # the control: a count that is low
