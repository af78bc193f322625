"""Factors of ΔW: the formulas after eq. 18, Eckart–Young, p, QR, and the arrangements that start at zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import reference
from tests.cases import array, draw, relative_error
from torch import Tensor

from cntlora.linalg.factors import offset, paired, qr_factors, svd_factors
from cntlora.linalg.spectrum import spectrum

MATRICES = {
    "k<d": draw(0, 6, 11),
    "k>d": draw(1, 12, 5),
    "k=d": draw(2, 7, 7),
    "rank 3": draw(3, 9, 3) @ draw(4, 3, 8),
    "steep": draw(5, 8, 8) * torch.logspace(0, -7, 8, dtype=torch.float64),
    "repeated": torch.cat([draw(6, 6, 3), draw(6, 6, 3)], dim=1),
}
matrix = pytest.mark.parametrize("M", MATRICES.values(), ids=MATRICES.keys())
shares = pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])


def numerical_rank(M: Tensor) -> int:
    return int(torch.linalg.matrix_rank(M, rtol=1e-10))


# --- spectrum -----------------------------------------------------------------------------------------------


@matrix
def test_the_spectrum_is_that_of_an_svd(M: Tensor) -> None:
    S = torch.linalg.svdvals(M)
    for q in range(min(M.shape) + 3):
        s = spectrum(M, q)
        assert s.triplets == min(q, *M.shape)
        assert s.S.shape == S.shape  # all singular values, however few vectors
        assert float((s.S - S).abs().max()) < 1e-7 * float(S[0])
        # of the vectors that are held, the values are accurate
        assert float(((s.S - S)[:q]).abs().max() if q else 0.0) < 1e-11 * float(S[0])


@matrix
def test_singular_vectors_are_orthonormal_and_belong_together(M: Tensor) -> None:
    n = numerical_rank(M)
    s = spectrum(M, n)
    for vectors in (s.U, s.Vh.mT):
        assert relative_error(vectors.mT @ vectors, torch.eye(n)) < 1e-7
    assert relative_error(s.U * s.S[:n] @ s.Vh, M) < 1e-9
    assert relative_error(s.U.flip(1) * s.S[:n] @ s.Vh, M) > 0.1  # control


@matrix
def test_signs_are_those_of_the_rows_of_a(M: Tensor) -> None:
    n = numerical_rank(M)
    s = spectrum(M, n)
    assert bool((s.Vh.gather(1, s.Vh.abs().argmax(dim=1, keepdim=True)) > 0).all())
    flipped = spectrum(-M, n)
    assert relative_error(flipped.Vh, s.Vh) < 1e-7  # −M has the same A and the opposite B
    assert relative_error(flipped.U, -s.U) < 1e-7
    a, b = spectrum(M, n), spectrum(M.clone(), n)
    assert torch.equal(a.U, b.U) and torch.equal(a.Vh, b.Vh)


def test_both_ways_of_making_the_spectrum_agree() -> None:
    """The Gram route and the fallback to the SVD meet at σ_q = 1e-4·σ_1."""
    for small in (0.5e-4, 0.99e-4, 1.01e-4, 2e-4):
        Q, R = torch.linalg.qr(draw(0, 9, 9))[0], torch.linalg.qr(draw(1, 7, 7))[0]
        S = torch.tensor([1.0, 0.5, 0.2, small, 0.5 * small, 0.0, 0.0], dtype=torch.float64)
        for M in (Q[:, :7] * S @ R.mT, R * S @ Q[:, :7].mT):
            s = spectrum(M, 4)
            B, A = svd_factors(s, 4, 0.5)
            expected = reference.svd_factors(array(M), 4)
            assert relative_error(B @ A, expected[0] @ expected[1]) < 1e-11
            assert relative_error(B, expected[0]) < 1e-8
            assert relative_error(A, expected[1]) < 1e-8


def test_relative_variance_is_eq_19_and_zero_for_zero() -> None:
    for M in MATRICES.values():
        v = spectrum(M, 2).relative_variance()
        assert float(v.sum()) == pytest.approx(1.0, abs=1e-14)
        assert np.abs(array(v) - reference.relative_variances(array(M))).max() < 1e-14
        assert np.abs(array(spectrum(7 * M, 2).relative_variance()) - array(v)).max() < 1e-14  # no scale
    assert not bool(spectrum(torch.zeros(3, 4, dtype=torch.float64), 2).relative_variance().any())
    M = MATRICES["k<d"]
    S = torch.linalg.svdvals(M)
    assert np.abs(array(S / S.sum()) - array(spectrum(M, 2).relative_variance())).max() > 0.01  # control: squares


# --- SVD factors --------------------------------------------------------------------------------------------


@matrix
@shares
def test_svd_factors_are_those_of_the_paper(M: Tensor, p: float) -> None:
    n = numerical_rank(M)
    for r in range(1, n + 1):
        B, A = svd_factors(spectrum(M, r), r, p)
        B_ref, A_ref = reference.svd_factors(array(M), r, p)
        assert relative_error(B, B_ref) < 1e-8
        assert relative_error(A, A_ref) < 1e-8
        assert relative_error(B, -B_ref) > 1  # control: signs are fixed


@matrix
@shares
def test_eckart_young_the_error_is_the_tail_of_the_spectrum(M: Tensor, p: float) -> None:
    S = torch.linalg.svdvals(M)
    for r in range(min(M.shape) + 1):
        B, A = svd_factors(spectrum(M, r), r, p)
        tail = float(S[r:].norm())
        assert float((M - B @ A).norm()) == pytest.approx(tail, rel=1e-7, abs=1e-12 * float(S[0]))
    # control: another rank-r product is worse
    r = 2
    B, A = qr_factors(M, r)
    assert float((M - B @ A).norm()) > 1.0001 * float(S[r:].norm())


@matrix
def test_p_moves_the_balance_and_not_the_product(M: Tensor) -> None:
    s = spectrum(M, 3)
    B, A = svd_factors(s, 3, 0.5)
    balance = []
    for p in (0.0, 0.25, 0.5, 0.75, 1.0):
        B_p, A_p = svd_factors(s, 3, p)
        assert relative_error(B_p @ A_p, B @ A) < 1e-14
        balance.append(float(A_p.norm(dim=1)[0] / B_p.norm(dim=0)[0]))
        assert relative_error(A_p.norm(dim=1), s.S[:3] ** p) < 1e-7
        assert relative_error(B_p.norm(dim=0), s.S[:3] ** (1 - p)) < 1e-7
    assert len(set(balance)) == 5  # control: the factors do differ
    assert svd_factors(s, 3, 0.0)[1].norm(dim=1).sub(1).abs().max() < 1e-8
    assert svd_factors(s, 3, 1.0)[0].norm(dim=0).sub(1).abs().max() < 1e-8
    assert balance[2] == pytest.approx(1.0, abs=1e-8)  # ½ balances


@shares
def test_the_scale_multiplies_the_product_and_is_shared_by_p(p: float) -> None:
    M = MATRICES["k<d"]
    s = spectrum(M, 4)
    B, A = svd_factors(s, 4, p)
    B_s, A_s = svd_factors(s, 4, p, scale=3.0)
    assert relative_error(B_s @ A_s, 3 * B @ A) < 1e-14
    assert relative_error(B_s, 3 ** (1 - p) * B) < 1e-14
    assert relative_error(A_s, 3**p * A) < 1e-14


@shares
def test_zero_singular_values_give_no_nan(p: float) -> None:
    for M in (torch.zeros(5, 4, dtype=torch.float64), MATRICES["rank 3"]):
        B, A = svd_factors(spectrum(M, 4), 4, p)
        assert bool(torch.isfinite(B).all()) and bool(torch.isfinite(A).all())
        assert float((B @ A - M).norm()) < 1e-12 * max(1.0, float(M.norm()))


# --- QR factors ---------------------------------------------------------------------------------------------


@matrix
@pytest.mark.parametrize("pivoted", [False, True])
def test_qr_factors_are_those_of_the_paper(M: Tensor, pivoted: bool) -> None:
    n = numerical_rank(M)
    for r in range(n + 1):
        B, A = qr_factors(M, r, pivoted)
        B_ref, A_ref = reference.qr_factors(array(M), r, pivoted)
        assert B.shape == (M.shape[0], r) and A.shape == (r, M.shape[1])
        assert relative_error(B @ A, B_ref @ A_ref) < 1e-9 or r == 0
        assert relative_error(B, B_ref) < 1e-8 or r == 0
        assert relative_error(A, A_ref) < 1e-8 or r == 0
        assert relative_error(B.mT @ B, torch.eye(r)) < 1e-12 or r == 0


@matrix
@pytest.mark.parametrize("pivoted", [False, True])
def test_the_whole_of_qr_is_the_matrix(M: Tensor, pivoted: bool) -> None:
    B, A = qr_factors(M, min(M.shape), pivoted, scale=2.5)
    assert relative_error(B @ A, 2.5 * M) < 1e-12
    assert relative_error(qr_factors(M, 2, pivoted, scale=2.5)[0], B[:, :2]) < 1e-12  # the scale goes to A


def test_plain_qr_has_a_triangle_with_a_diagonal_not_below_zero() -> None:
    for M in MATRICES.values():
        _, A = qr_factors(M, min(M.shape))
        assert float(A.tril(-1).abs().max()) < 1e-12 * float(M.norm())
        assert float(A.diagonal().min()) >= 0
    raw = torch.linalg.qr(MATRICES["k<d"])[1].diagonal()
    assert float(raw.min()) < 0  # control: LAPACK's own signs are not


def test_pivoting_reveals_the_rank_and_plain_qr_does_not() -> None:
    M = draw(3, 9, 3) @ draw(4, 3, 8)
    M[:, :3] = M[:, 3:4]  # the leading columns all alike
    B, A = qr_factors(M, 3, pivoted=True)
    assert relative_error(B @ A, M) < 1e-12
    B, A = qr_factors(M, 3)
    assert relative_error(B @ A, M) > 0.1  # control
    norms = qr_factors(MATRICES["steep"], 8, pivoted=True)[1].abs().amax(dim=1)
    assert norms.tolist() == sorted(norms.tolist(), reverse=True)


@pytest.mark.parametrize("pivoted", [False, True])
def test_a_is_a_triangle_up_to_the_order_of_columns(pivoted: bool) -> None:
    _, A = qr_factors(MATRICES["k<d"], 6, pivoted)
    assert int((A == 0).sum()) == 15  # exactly zero, 0 + 1 + … + 5 of them
    assert int((A[:, :6].tril(-1) == 0).sum()) == (21 + 15) or pivoted  # control: pivots stand elsewhere
    assert not pivoted or bool(A.tril(-1).any())


def test_pivots_fall_and_permuting_columns_permutes_a_only() -> None:
    M = MATRICES["k<d"]
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    B, A = qr_factors(M, 4, pivoted=True)
    B_p, A_p = qr_factors(M[:, order], 4, pivoted=True)
    assert relative_error(B_p, B) < 1e-12
    assert relative_error(A_p, A[:, order]) < 1e-12
    assert relative_error(qr_factors(M[:, order], 4)[0], qr_factors(M, 4)[0]) > 0.1  # control: plain QR does care


@pytest.mark.parametrize("pivoted", [False, True])
def test_past_the_rank_b_stays_orthonormal(pivoted: bool) -> None:
    """The rest beyond the rank is rounding noise: as a direction it would be neither new nor of length one."""
    zero = torch.zeros(4, 6, dtype=torch.float64)
    for M in (MATRICES["rank 3"], MATRICES["repeated"], zero, zero.mT):
        r = min(M.shape)
        B, A = qr_factors(M, r, pivoted)
        assert relative_error(B.mT @ B, torch.eye(r)) < 1e-12
        assert float((B @ A - M).norm()) <= 1e-12 * float(M.norm())
        assert relative_error(M.mT @ M, torch.eye(M.shape[1])) > 0.1  # control


def test_ties_go_to_the_lowest_column() -> None:
    B, _ = qr_factors(torch.eye(4, dtype=torch.float64), 2, pivoted=True)
    assert relative_error(B, torch.eye(4)[:, :2]) == 0.0


def test_factors_do_not_edit_the_matrix() -> None:
    for M in MATRICES.values():
        kept = M.clone()
        spectrum(M, 2), qr_factors(M, 2), qr_factors(M, 2, pivoted=True)
        assert torch.equal(M, kept)


# --- offset and paired --------------------------------------------------------------------------------------


def halves(B: Tensor, A: Tensor, h: int) -> Tensor:
    """B·A as the sum of two products, so that no rounding of a longer sum stands between the halves."""
    return B[:, :h] @ A[:h] + B[:, h : 2 * h] @ A[h : 2 * h]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [1, 2, 3, 4, 5])
def test_offset_and_paired_start_at_exactly_zero(r: int, dtype: torch.dtype) -> None:
    s = spectrum(MATRICES["k<d"], r)
    B, A = (f.to(dtype) for f in svd_factors(s, r, 0.5))
    B_o, A_o = offset(B, A)
    assert B_o.shape == (6, 2 * r) and A_o.shape == (2 * r, 11)
    assert not bool(halves(B_o, A_o, r).any())
    assert bool(halves(torch.cat([B, B], dim=1), A_o, r).any())  # control
    B_p, A_p = paired(B, A, r)
    assert B_p.shape == (6, r) and A_p.shape == (r, 11)
    h = r // 2
    assert not bool(halves(B_p, A_p, h).any()) and not bool(B_p[:, 2 * h :].any())
    assert bool(A_p[2 * h :].any()) == (r % 2 == 1)
    for got, expected in zip((*offset(B, A), *paired(B, A, r)), (*_reference_arranged(B, A, r),), strict=True):
        assert relative_error(got, expected) == 0.0


def _reference_arranged(B: Tensor, A: Tensor, r: int) -> tuple[np.ndarray, ...]:
    return (*reference.offset(array(B), array(A)), *reference.paired(array(B), array(A), r))


@pytest.mark.parametrize("r", [2, 3])
def test_both_gradients_are_non_zero_at_the_start(r: int) -> None:
    """Appendix B's argument, for the factors that train; plain LoRA (B = 0) is the control."""
    s = spectrum(MATRICES["k<d"], r)
    B, A = svd_factors(s, r, 0.5)
    x, target = draw(8, 11, 20), draw(9, 6, 20)
    for arranged in (offset(B, A), paired(B, A, r)):
        B_t, A_t = (f.clone().requires_grad_() for f in arranged)
        (B_t @ (A_t @ x) - target).square().mean().backward()
        assert B_t.grad is not None and A_t.grad is not None
        assert float(B_t.grad.norm()) > 1e-3 and float(A_t.grad.norm()) > 1e-3
    B_t, A_t = torch.zeros_like(B).requires_grad_(), A.clone().requires_grad_()
    (B_t @ (A_t @ x) - target).square().mean().backward()
    assert A_t.grad is not None and not bool(A_t.grad.any())


def test_halves_do_not_share_storage() -> None:
    B, A = offset(draw(0, 4, 2), draw(1, 2, 5))
    A[:2] = 0
    B[:, :2] = 0
    assert bool(A[2:].any()) and bool(B[:, 2:].any())
