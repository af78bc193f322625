"""The truncated SVD: what it gives is within its bound, and it says where it cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests import bounds
from tests.cases import array, draw, relative_error
from torch import Tensor

from cntlora.linalg.factors import svd_factors
from cntlora.linalg.filtered_svd import filtered_triplets
from cntlora.linalg.spectrum import EXACT_BELOW, input_spectrum, spectra, spectrum
from cntlora.linalg.truncated_svd import TOLERANCE, gram_triplets, leading_triplets

LAWS = {
    "falling": lambda n: torch.logspace(0, -3, n, dtype=torch.float64),
    "flat": lambda n: torch.linspace(1.0, 0.7, n, dtype=torch.float64),
    "one giant": lambda n: torch.cat([torch.tensor([300.0]), torch.logspace(0, -1.5, n - 1)]).double(),
    "plateau": lambda n: torch.cat([torch.ones(5), torch.full((n - 5,), 0.5)]).double(),
}
SHAPES = [(400, 300), (300, 400), (320, 320)]


def with_law(shape: tuple[int, int], law: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A random matrix of a known spectrum, and the spectrum."""
    k, d = shape
    n = min(shape)
    S = LAWS[law](n)
    U, V = (torch.linalg.qr(draw(i, m, n)).Q for i, m in enumerate((k, d)))
    return ((U * S) @ V.mT).to(dtype), S


def filtered(M: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor] | None:
    U, S, Vh, trusted = filtered_triplets(M, q, torch.tensor(0.0))  # each triplet by itself
    return (U, S, Vh) if bool(trusted) else None


def as_on_a_gpu(M: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor] | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cntlora.linalg.truncated_svd.CHOLESKY_QR", ("cpu",))
        patch.setattr("cntlora.linalg.truncated_svd.FIRST_LOOK", {"cpu": 6})
        return leading_triplets(M, q)


WAYS = [
    (filtered, torch.float32),
    (leading_triplets, torch.float32),
    (as_on_a_gpu, torch.float32),
    (as_on_a_gpu, torch.float64),
    (leading_triplets, torch.float64),
    (gram_triplets, torch.float32),
]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("way", "dtype"), WAYS)
def test_triplets_are_within_their_bound(law: str, shape: tuple[int, int], way: Callable, dtype: torch.dtype) -> None:
    q, bound = 8, TOLERANCE[dtype]
    M, S = with_law(shape, law, dtype)
    found = way(M, q)
    if found is None:
        # nothing sticks out, so that a small space cannot tell the first ones; or too much does for squares
        blind = {gram_triplets: ["one giant"], leading_triplets: ["flat"], as_on_a_gpu: ["flat"]}
        assert law in blind.get(way, ["one giant", "flat"])
        return
    U, values, Vh = found
    assert U.shape == (shape[0], q) and Vh.shape == (q, shape[1]) and U.dtype == dtype
    assert float(((values.double() - S[:q]).abs() / S[:q]).max()) < 2 * bound
    rounding = 100 * torch.finfo(dtype).eps * float(S[0] / S[q - 1])
    assert relative_error(M @ Vh.mT, U * values) < bound + rounding
    assert relative_error(M.mT @ U, Vh.mT * values) < bound + rounding
    for columns in (U, Vh.mT):
        assert relative_error(columns.mT @ columns, torch.eye(q)) < bound + rounding
    wrong = torch.linalg.qr(draw(9, shape[1], q)).Q.to(dtype)  # control: any orthonormal columns would not do
    assert relative_error(M.mT @ (M @ wrong), wrong * values**2) > 0.1


@pytest.mark.parametrize("law", ["falling", "one giant", "plateau"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_start_of_a_gpu_leads_to_the_same_triplets(
    law: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    M, S = with_law((400, 300), law, dtype)
    plain = leading_triplets(M, 8)
    monkeypatch.setattr("cntlora.linalg.truncated_svd.FIRST_LOOK", {"cpu": 13})
    found = leading_triplets(M, 8)
    assert plain is not None and found is not None
    assert found[0].shape == plain[0].shape
    bound = 2 * TOLERANCE[dtype]
    assert relative_error(found[1], S[:8].to(dtype)) < bound
    if law == "falling":  # elsewhere values coincide, so that their vectors are free
        product, other = ((U * values) @ Vh for U, values, Vh in (found, plain))
        assert relative_error(product, other) < 10 * bound
        assert not torch.equal(product, other)  # control: another way


@pytest.mark.parametrize("law", ["falling", "one giant"])
def test_the_factors_capture_what_the_exact_ones_do(law: str) -> None:
    M, _ = with_law((400, 300), law, torch.float32)
    best, ours = spectrum(M, 8, exact=True), spectrum(M, 8)
    assert ours.S.numel() == 8 and best.S.numel() == 300  # the truncated way was taken
    B, A = svd_factors(ours, 8, 0.5)
    expected_B, expected_A = svd_factors(best, 8, 0.5)
    norm = float(torch.linalg.matrix_norm(M))
    assert float(torch.linalg.matrix_norm(B @ A - expected_B @ expected_A)) / norm < 1e-3
    tail = float(torch.linalg.matrix_norm(M - expected_B @ expected_A))
    assert float(torch.linalg.matrix_norm(M - B @ A)) < tail + 1e-6 * norm
    assert relative_error(ours.S, best.S[:8]) < 1e-3
    assert ours.frobenius == pytest.approx(best.frobenius, rel=bounds.norm(M.numel()))
    assert relative_error(ours.relative_variance(), best.relative_variance()[:8]) < 1e-3


def test_the_same_matrix_gives_the_same_bits_and_leaves_the_generator_alone() -> None:
    M, _ = with_law((300, 400), "falling", torch.float32)
    state = torch.get_rng_state()
    one, two = spectrum(M, 8), spectrum(M, 8)
    assert all(torch.equal(a, b) for a, b in ((one.U, two.U), (one.S, two.S), (one.Vh, two.Vh)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_matrix_of_lower_rank_than_asked_is_left_to_the_exact_way(rank: int) -> None:
    M = (draw(0, 300, 5)[:, :rank] @ draw(1, 5, 400)[:rank]).float()
    assert leading_triplets(M, 8) is None and as_on_a_gpu(M, 8) is None
    found = spectrum(M, 8)
    assert found.U.shape == (300, 8) and bool(torch.isfinite(found.U).all()) and bool(torch.isfinite(found.Vh).all())
    assert int((1e-5 * max(float(found.S[0]), 1e-30) < found.S).sum()) == rank
    assert leading_triplets(M + 0.01 * draw(2, 300, 400).float(), 1 + rank) is not None or rank > 0  # control


def test_small_matrices_and_many_triplets_are_exact() -> None:
    small = draw(0, EXACT_BELOW, EXACT_BELOW)
    assert spectrum(small, 4).S.numel() == EXACT_BELOW
    large = draw(0, 300, 300)
    assert spectrum(large, 60).S.numel() == 300
    assert relative_error(spectrum(large, 60).S, torch.linalg.svdvals(large)) < 1e-8


def test_the_inputs_spectrum_is_that_of_their_gram_matrix() -> None:
    X = draw(0, 300, 900) * torch.logspace(0, -2, 300, dtype=torch.float64)[:, None]
    found = input_spectrum(X @ X.mT, 8)
    _, S, Vh = torch.linalg.svd(X.mT, full_matrices=False)
    assert found.S.numel() == 8
    assert relative_error(found.S, S[:8]) < 1e-3
    assert relative_error((found.Vh @ Vh[:8].mT).abs(), torch.eye(8)) < 0.05
    assert found.frobenius == pytest.approx(float(torch.linalg.matrix_norm(X)), rel=1e-10)
    assert relative_error((found.Vh @ Vh[8:16].mT).abs(), torch.eye(8)) > 0.9  # control
    assert array(input_spectrum((X @ X.mT)[:50, :50], 8).S).size == 50  # small: all of them


@pytest.mark.parametrize("law", LAWS)
def test_a_filtered_product_is_the_truncated_svd(law: str) -> None:
    """In a stack and alone, where it is trusted; control: a block that was not filtered is far from it."""
    matrices = [with_law(shape, law, torch.float32)[0] for shape in ((400, 300), (400, 300))]
    matrices[1] = matrices[1].flip(0) * 3.0
    stack = torch.stack(matrices)
    U, S, Vh, trusted = filtered_triplets(stack, 8, torch.linalg.matrix_norm(stack))
    assert bool(trusted.all()) or law in ("flat", "one giant")
    for M, u, s, v, holds in zip(matrices, U, S, Vh, trusted, strict=True):
        if not bool(holds):
            continue
        alone = filtered_triplets(M, 8, torch.linalg.matrix_norm(M))
        for values, product in ((s, (u * s) @ v), (alone[1], (alone[0] * alone[1]) @ alone[2])):
            rest = float(torch.linalg.matrix_norm(M.double() - product.double()) ** 2)
            tail = float(torch.linalg.svdvals(M.double())[8:].square().sum())
            assert rest - tail < 1e-5 * float(torch.linalg.matrix_norm(M)) ** 2
            assert relative_error(values[:1], torch.linalg.svdvals(M)[:1]) < 1e-5
        basis = torch.linalg.qr(M.mT @ draw(3, 400, 8).float()).Q
        assert float(torch.linalg.matrix_norm(M - M @ basis @ basis.mT) ** 2) - tail > 1e-5 * float(M.square().sum())


def test_large_matrices_are_filtered_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a stack of one shape, each within 3e-4 of its own truncated SVD."""
    made = [with_law((700, 660), "falling", torch.float32)[0] * (i + 1) for i in range(2)]
    tried: list[int] = []

    def watched(M: Tensor, q: int, norm: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tried.append(len(M))
        return filtered_triplets(M, q, norm)

    monkeypatch.setattr("cntlora.linalg.spectrum.filtered_triplets", watched)
    plain = spectra(made, [8, 8], False, [True, True])
    assert tried == []  # control
    monkeypatch.setattr("cntlora.linalg.spectrum.FILTERED", ("cpu",))
    for M, one, other in zip(made, spectra(made, [8, 8], False, [True, True]), plain, strict=True):
        product, expected = ((s.U * s.S) @ s.Vh for s in (one, other))
        assert float((product - expected).norm() / M.norm()) < 3e-4
        assert float((product - expected / 2).norm() / M.norm()) > 0.1  # control
    assert tried == [2]
    for M, one in zip(made, spectra(made, [8, 8], False, [False, False]), strict=True):  # where directions count
        residual = torch.linalg.vector_norm(M.mT.double() @ one.U.double() - (one.S[:, None] * one.Vh).mT, dim=0)
        assert float((residual / one.S).max()) < 2e-4
        assert float(torch.linalg.vector_norm(M.mT @ one.U, dim=0).min() / one.S.max()) > 0.1  # control: U is not zero
    assert tried == [2, 2]


def test_a_matrix_without_directions_is_not_trusted() -> None:
    for M in (torch.zeros(300, 280), draw(1, 300, 3).float() @ draw(2, 3, 280).float()):
        *_, trusted = filtered_triplets(M, 8, torch.linalg.matrix_norm(M))
        assert not bool(trusted)
    M = draw(1, 300, 20).float() @ draw(2, 20, 280).float()  # control
    assert bool(filtered_triplets(M, 8, torch.linalg.matrix_norm(M))[3])
