"""Tolerances, signs and the inverses that know when they may be trusted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import bounds, reference
from tests.cases import array, draw, relative_error
from torch import Tensor

from cntlora.linalg.pseudo_inverse import (
    SQUARED_RTOL,
    _gram_pinv,
    cholesky_inverse,
    default_rtol,
    eigh_descending,
    fix_signs,
    frobenius_condition,
    nothing_dropped,
    numerical_rank,
    pinv,
    tall_pinv,
)

SHAPES = [(4, 9), (9, 4), (6, 6)]


def with_values(rows: int, columns: int, values: list[float], seed: int = 0) -> torch.Tensor:
    """A matrix with the given singular values, the rest zero."""
    U, V = torch.linalg.qr(draw(seed, rows, rows))[0], torch.linalg.qr(draw(seed + 1, columns, columns))[0]
    n = len(values)
    return U[:, :n] * torch.tensor(values, dtype=torch.float64) @ V[:, :n].mT


def test_default_rtol_is_the_one_of_numpy_and_torch() -> None:
    assert default_rtol(30, 7, torch.float64) == 30 * np.finfo(np.float64).eps == reference.default_rtol(7, 30)
    assert default_rtol(3, 7, torch.float32) == 7 * float(np.finfo(np.float32).eps)
    assert default_rtol(3, 7, torch.float32) != default_rtol(3, 7, torch.float64)


# --- signs --------------------------------------------------------------------------------------------------


def test_signs_do_not_depend_on_the_signs_that_came() -> None:
    M = draw(0, 7, 5)
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    assert torch.equal(M * fix_signs(M), (M * flips) * fix_signs(M * flips))
    assert not torch.equal(M, M * flips)  # control: without the convention they differ
    largest = (M * fix_signs(M)).gather(0, M.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all())


def test_the_first_of_equal_magnitudes_decides_the_sign_and_zero_is_positive() -> None:
    M = torch.tensor([[-2.0, 2.0, 0.0], [2.0, -2.0, 0.0]])
    assert fix_signs(M).tolist() == [-1.0, 1.0, 1.0]
    assert fix_signs(torch.zeros(3, 0)).shape == (0,)


def test_eigenvalues_fall_and_are_never_negative() -> None:
    X = draw(0, 8, 3)
    S = X @ X.mT
    D, P = eigh_descending(S)
    assert D.tolist() == sorted(D.tolist(), reverse=True)
    assert float(D.min()) >= 0
    assert relative_error(P * D @ P.mT, S) < 1e-14
    assert float(torch.linalg.eigvalsh(S).min()) < 0  # control: rounding does give negative ones


# --- pseudo-inverse -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("values", [[3.0, 2.0, 1.0, 0.5], [3.0, 1.0], [1.0, 1e-3, 1e-6]], ids=str)
def test_pinv_is_the_moore_penrose_inverse(shape: tuple[int, int], values: list[float]) -> None:
    M = with_values(*shape, values)
    inverse, bound = pinv(M), bounds.inverse(values[0] / values[-1], max(shape))
    for product, expected in ((M @ inverse @ M, M), (inverse @ M @ inverse, inverse)):
        assert relative_error(product, expected) < bound
    for projector in (M @ inverse, inverse @ M):
        assert relative_error(projector.mT, projector) < bound
    assert relative_error(inverse, reference.pinv(array(M), default_rtol(*shape, torch.float64))) < bound
    assert relative_error(M @ (1.001 * inverse) @ M, M) > 1e-4 > bound  # control


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_a_large_tolerance_squares_serve(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to the least tolerance for which they are taken; below, they would not do."""
    rtol = SQUARED_RTOL
    M = with_values(*shape, [1.0, 0.5, 2 * rtol, 0.5 * rtol, 1e-8]).to(dtype)
    expected = reference.pinv(array(M.double()), rtol)
    monkeypatch.setattr(torch.linalg, "svd", None)  # not called
    assert relative_error(pinv(M, rtol), expected) < (1e-8 if dtype == torch.float64 else 1e-4)
    if dtype == torch.float64:  # control
        small = with_values(*shape, [1.0, 2e-7, 1e-12])
        tall = small if shape[0] >= shape[1] else small.mT
        assert relative_error(_gram_pinv(tall, 1e-7), reference.pinv(array(tall), 1e-7)) > 1e-6
        with pytest.raises(TypeError):
            pinv(small, 1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_pinv_drops_what_is_at_or_under_the_tolerance(shape: tuple[int, int]) -> None:
    M = with_values(*shape, [2.0, 1.0, 0.02, 0.01])
    expected = reference.pinv(array(with_values(*shape, [2.0, 1.0])), 1e-12)
    assert relative_error(pinv(M, 0.02), expected) < 1e-12
    assert relative_error(pinv(M), expected) > 1.0  # control: nothing is dropped by default
    exact = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    assert pinv(exact, 0.25).diagonal().tolist() == [0.25, 0.0]  # at the tolerance
    assert pinv(exact, 0.2499).diagonal().tolist() == [0.25, 1.0]


def test_pinv_of_zero_is_zero() -> None:
    assert not bool(pinv(torch.zeros(3, 5, dtype=torch.float64)).any())


# --- inverses that refuse -----------------------------------------------------------------------------------


def given(made: Tensor | tuple[Tensor, Tensor] | None) -> Tensor | None:
    """The inverse, if it is said to hold."""
    if isinstance(made, tuple):
        return made[0] if bool(made[1]) else None
    return made


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-6, 1e-9, 1e-12, 1e-14, 1e-16, 0.0])
def test_a_plain_inverse_is_given_only_where_pinv_agrees(smallest: float) -> None:
    M = with_values(6, 6, [1.0, 1.0, 0.7, 0.5, 0.5, smallest])
    S = with_values(6, 6, [1.0, 1.0, 0.7, 0.5, 0.5, smallest], 0)
    S = (S @ S.mT) if smallest > 1e-7 or smallest == 0 else S.mT @ S
    rtol = default_rtol(6, 6, torch.float64)
    for matrix, made in ((M, tall_pinv(M, rtol)), (S, cholesky_inverse(S, rtol))):
        values = torch.linalg.svdvals(matrix)
        made = given(made)
        if made is None:
            # refused, though up to a factor n earlier than needed
            assert float(values[-1] / values[0]) <= 6 * 6 * rtol
            continue
        assert float(values[-1] / values[0]) > rtol
        bound = 100 * np.finfo(float).eps * float(values[0] / values[-1])
        assert relative_error(made, reference.pinv(array(matrix), rtol)) < bound


def test_what_would_be_dropped_is_refused_though_the_inverse_exists() -> None:
    S = torch.diag(torch.tensor([1.0, 1e-6], dtype=torch.float64))
    for inverse in (cholesky_inverse, tall_pinv):
        assert given(inverse(S, 1e-3)) is None
        assert given(inverse(S, 1e-12)) is not None  # control


def test_the_indefinite_the_singular_and_the_overflowing_are_refused() -> None:
    assert given(cholesky_inverse(torch.diag(torch.tensor([1.0, -1.0])), 1e-6)) is None
    assert given(cholesky_inverse(torch.diag(torch.tensor([1.0, 1.0])), 1e-6)) is not None  # control
    for inverse in (cholesky_inverse, tall_pinv):
        assert given(inverse(torch.zeros(2, 2), 1e-6)) is None
        assert given(inverse(torch.diag(torch.tensor([1e200, 1e-200], dtype=torch.float64)), 0.0)) is None


@pytest.mark.parametrize("n", [2, 7])
def test_the_condition_is_bounded_on_both_sides(n: int) -> None:
    M = draw(n, n, n)
    true = float(torch.linalg.cond(M))
    bound = frobenius_condition(M, torch.linalg.inv(M))
    assert true <= bound <= n * true
    assert nothing_dropped(M, torch.linalg.inv(M), 0.99 / bound)
    assert not nothing_dropped(M, torch.linalg.inv(M), 1.01 / bound)


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_numerical_rank_counts_what_the_tolerance_keeps(rank: int) -> None:
    X = draw(3, 7, rank) @ draw(4, rank, 20)
    assert numerical_rank(X @ X.mT, 1e-10) == rank
    S = torch.diag(torch.tensor([1.0, 0.5, 1e-3, 0.0], dtype=torch.float64))
    assert [numerical_rank(S, rtol) for rtol in (1e-6, 1e-2, 0.7)] == [3, 2, 1]
