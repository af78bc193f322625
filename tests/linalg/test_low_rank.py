"""Matrices that are held by their rows: the same numbers as those that are formed, at every size of a batch."""

from __future__ import annotations

import pytest
import torch
from tests.cases import draw, relative_error
from torch import Tensor

from cntlora.linalg import low_rank as module
from cntlora.linalg import truncated_svd
from cntlora.linalg.low_rank import LowRank, Term, Updated, formed, frobenius, low_rank, updated
from cntlora.linalg.moments import Moments
from cntlora.linalg.spectrum import spectrum
from cntlora.linalg.sums import SharedSums
from cntlora.linalg.truncated_svd import leading_triplets
from cntlora.methods.cross import cross_map, cross_quick
from cntlora.methods.self_mode import self_map, self_quick
from cntlora.methods.statistics import combine, combine_map

D, K = 24, 15


@pytest.fixture(autouse=True)
def small_layers_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 8)


def moments(tokens: int, seed: int = 0) -> Moments:
    X = Moments(D)
    X.update(draw(seed, tokens, D))
    return X


MAPS = {
    "cross": lambda X: cross_map(X, 1e-3)[0],
    "cross quick": lambda X: cross_quick(X, 1e-9)[0],
    "self": lambda X: self_map(X, rtol=1e-6)[0],
    "self symmetric": lambda X: self_map(X, "symmetric", 1e-6)[0],
    "self Cholesky": lambda X: self_map(X, "cholesky", 1e-6)[0],
    "self quick": lambda X: self_quick(X, 1e-9)[0],
}


@pytest.mark.parametrize("initial", ["pretrained", "zero"])
@pytest.mark.parametrize("way", MAPS)
def test_sums_by_rows_give_the_weight_of_sums_that_are_formed(
    way: str, initial: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, held, whole = draw(9, K, D), SharedSums(), SharedSums()
    batches, weights = [moments(5, 1), moments(7, 2)], (1.0, 0.5)
    for X, w in zip(batches, weights, strict=True):
        T = MAPS[way](X)
        assert isinstance(T, LowRank)
        held.add(["site"], T, w)
    monkeypatch.setattr(module, "LARGE", 10**9)
    for X, w in zip(batches, weights, strict=True):
        T = MAPS[way](X)
        assert isinstance(T, Tensor)  # control: the other way was taken
        whole.add(["site"], T, w)
    ours, theirs = held.held("site"), whole.held("site")
    assert isinstance(ours, LowRank) and isinstance(theirs, Tensor)
    plain = ours.terms[0].weights is None  # whose rows are added, of two batches of 5 and 7 tokens
    assert ours.rank == (7 if plain else 12)
    M, expected = combine_map(W, ours, 2, initial), combine(W, W @ theirs, 2, initial)
    assert isinstance(M, Tensor if plain else Updated)
    bound = 1e-10  # float64, and conditions of about 10
    size = relative_error(formed(M), expected)
    assert size < bound and relative_error(held.get("site"), theirs) < bound
    assert frobenius(M) == pytest.approx(float(torch.linalg.matrix_norm(expected)), rel=1e-9)
    block = draw(3, D, 4)
    assert relative_error(M @ block, expected @ block) < bound
    assert relative_error(M.mT @ draw(4, K, 4), expected.mT @ draw(4, K, 4)) < bound
    assert relative_error(formed(combine_map(W, ours, 1, initial)), expected) > 1e-3  # control: another eq. 18


def test_a_sum_is_formed_once_its_rows_do_not_pay() -> None:
    sums = SharedSums()
    total = torch.zeros(D, D, dtype=torch.float64)
    forms = []
    for seed in range(4):
        term = low_rank(draw(seed, 5, D), draw(seed + 10, 1, 5)[0].abs())
        assert isinstance(term, LowRank)
        sums.add(["q", "k"] if seed else ["q", "k", "v"], term, 2.0)
        total += 2.0 * term.dense()
        forms.append(type(sums.held("q")).__name__)
        assert relative_error(sums.get("q"), total) < 1e-12 and sums.same("q", "k")
    assert forms == ["LowRank", "LowRank", "Tensor", "Tensor"]  # 5, 10, then more than half of 24
    assert isinstance(sums.held("v"), LowRank) and not sums.same("q", "v")
    sums.add(["q"], torch.eye(D, dtype=torch.float64))
    assert relative_error(sums.get("q"), total + torch.eye(D)) < 1e-12 and not sums.same("q", "k")
    sums.add(["v"], torch.eye(D, dtype=torch.float64), 3.0)
    assert isinstance(sums.held("v"), Tensor)


def test_sums_are_formed_for_other_processes_and_under_a_limit() -> None:
    term = low_rank(draw(0, 5, D), None)
    assert isinstance(term, LowRank)
    sums = SharedSums()
    sums.add(["q", "k"], term)
    ((names, total),) = sums.groups()
    assert names == ["q", "k"] and torch.equal(total, term.dense()) and isinstance(sums.held("k"), Tensor)
    limited, placed = SharedSums(), []
    limited.forms, limited.place = True, lambda total: (placed.append(total.shape), total)[1]
    limited.add(["q"], term)
    assert isinstance(limited.held("q"), Tensor) and placed == [(D, D)]


def test_a_term_with_zeros_below_is_its_rows_and_zeros() -> None:
    rows = draw(0, 3, D)
    assert torch.equal(LowRank((Term(rows, None),)).dense(), torch.cat([rows, torch.zeros(D - 3, D)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_triplets_come_without_forming_the_matrix(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    k, d = 300, 400
    W = (draw(0, k, d) * torch.logspace(0, -2, d, dtype=torch.float64)).to(dtype)
    T = low_rank((draw(1, 60, d) / 20).to(dtype), torch.linspace(0, 1, 60, dtype=dtype))
    assert isinstance(T, LowRank)
    M = updated(-0.5, W, T, 0.5)
    assert isinstance(M, Updated)
    whole = M.dense()
    exact = spectrum(whole, 8, exact=True)
    monkeypatch.setattr(Updated, "dense", lambda self: pytest.fail("formed"))
    found = spectrum(M, 8)
    assert found.S.numel() == 8 and found.frobenius == pytest.approx(exact.frobenius, rel=1e-5)
    assert relative_error(found.S, exact.S[:8]) < 1e-3
    product, best = (found.U * found.S) @ found.Vh, (exact.U[:, :8] * exact.S[:8]) @ exact.Vh[:8]
    assert float(torch.linalg.matrix_norm(product - best)) < 1e-3 * exact.frobenius
    assert float(torch.linalg.matrix_norm(product - 1.1 * best)) > 1e-3 * exact.frobenius  # control


def test_a_product_needs_less_than_each_of_its_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flat spectrum: [M]_q within 1e-3 of ‖M‖ in fewer steps than each triplet within its own share."""
    n, q, steps = 1000, 4, []
    M = draw(0, n, n).float()
    plain = truncated_svd._Krylov.grow
    monkeypatch.setattr(truncated_svd._Krylov, "grow", lambda self: (steps.append(self.steps), plain(self))[1])
    found = leading_triplets(M, q, norm=float(torch.linalg.matrix_norm(M)))
    assert found is not None
    of_product = len(steps)
    leading_triplets(M, q)
    assert of_product < len(steps) - of_product
    U, S, Vh = found
    exact = spectrum(M, q, exact=True)
    best = (exact.U[:, :q] * exact.S[:q]) @ exact.Vh[:q]
    assert float(torch.linalg.matrix_norm((U * S) @ Vh - best)) < 1e-3 * exact.frobenius
    norms = torch.linalg.vector_norm(M.mT @ U - Vh.mT * S, dim=0)
    assert float(norms.square().sum().sqrt()) < 3e-4 * exact.frobenius
    early = truncated_svd._Krylov(M, q)  # control: the first block alone would not do
    assert float(torch.linalg.matrix_norm(early.basis @ (early.basis.mT @ M.mT) - best.mT)) > 0.1 * exact.frobenius


def test_sums_are_listed_by_name_whatever_the_order_they_came_in() -> None:
    """Threads add them in any order, and processes compare the lists."""
    found = []
    for order in ("abc", "cab"):
        sums = SharedSums()
        for name in order:
            sums.add([name, name * 2], torch.full((2,), float(ord(name))))
        assert list(sums._sums) != sorted(sums._sums) or order == "abc"  # the control: held in another order
        found.append([(names, total.tolist()) for names, total in sums.groups()])
    assert found[0] == found[1] and [names for names, _ in found[0]] == [["a", "aa"], ["b", "bb"], ["c", "cc"]]
