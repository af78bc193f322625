"""Small linear algebra shared by the modes: tolerances, signs, and inverses that know when they may be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def default_rtol(rows: int, columns: int, dtype: torch.dtype) -> float:
    """max(rows, columns)·eps, the tolerance that NumPy and PyTorch use for a pseudo-inverse."""
    return max(rows, columns) * torch.finfo(dtype).eps


def coarser(one: torch.dtype | None, other: torch.dtype) -> torch.dtype:
    """The one of two floating dtypes that rounds more; `other` if there is no first."""
    return one if one is not None and torch.finfo(one).eps > torch.finfo(other).eps else other


ENTRIES, SUMS = 8.0, 32.0
"""Rounding of activations, in unit roundoffs: of the entries by themselves, and of the sums that they come from.

Measured against float64 (docs/math/rounding.md): 2.6 at most under autocast (4.5 in 30 layers of bfloat16), and 2.1 in
float32. The margins are for deeper models, and for kernels that add up in another order; in half precision there is
room for a small one only.
"""


def rounding_noise(dtype: torch.dtype, d: int, b: int) -> float:
    """Return a bound, over ‖X‖_F, on singular values of X (d, b) that are nothing but the rounding of its entries.

    Entries that are rounded to a unit roundoff u independently of each other make a random matrix; its largest singular
    value is near u·rms·(√d + √b), a share of u·(1/√d + 1/√b) of ‖X‖_F. The errors of the sums behind the entries may be
    alike in many rows, so that the bound for any matrix is taken, u' of ‖X‖_F, with u' of the dtype that layers sum in:
    float32 for half precision.

    Args:
        dtype: that of the activations, the coarsest that they went through since the last sum.
    """
    u = torch.finfo(dtype).eps / 2
    summed = min(u, torch.finfo(torch.float32).eps / 2)
    return ENTRIES * u * (d**-0.5 + max(b, 1) ** -0.5) + SUMS * summed


def fix_signs(columns: Tensor) -> Tensor:
    """The signs (n,) that make the largest-magnitude entry of every column of an (m, n) matrix positive.

    Eigenvectors and singular vectors are known up to sign only; without a convention the result depends on the
    LAPACK build. The first of equal magnitudes decides.
    """
    if columns.shape[1] == 0:
        return columns.new_ones(0)
    largest = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True)).squeeze(0)
    return torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)


def fix_diagonal(R: Tensor) -> Tensor:
    """The signs (m,) that make the diagonal of an upper trapezoidal (m, n) factor R of a QR positive.

    Where an entry of the diagonal is nothing but rounding, the largest-magnitude entry of its row decides.
    """
    diagonal = R.diagonal()
    usable = diagonal.abs() > 1e-8 * R.abs().amax(dim=1)
    return torch.where(usable, torch.where(diagonal < 0, -1.0, 1.0).to(R.dtype), fix_signs(R.mT))


def eigh_descending(S: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (…, n), descending and not below zero, and eigenvectors (…, n, n) of positive semi-definite S."""
    values, vectors = torch.linalg.eigh(S)
    return values.flip(-1).clamp_min(0.0), vectors.flip(-1)


def frobenius_condition(M: Tensor, inverse: Tensor) -> Tensor:
    """‖M‖_F·‖M†‖_F (), at least σ_max/σ_min and at most n times that; infinite or NaN where anything overflowed."""
    return torch.linalg.matrix_norm(M) * torch.linalg.matrix_norm(inverse)


def nothing_dropped(M: Tensor, inverse: Tensor, rtol: float) -> Tensor:
    """Tell whether σ_min(M) > rtol·σ_max(M) for certain, so that M† is the plain inverse; boolean ()."""
    return frobenius_condition(M, inverse) * rtol < 1.0


def cholesky_inverse(S: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    """S⁻¹ of a positive definite matrix by Cholesky, and whether it is S† (), i.e. nothing has to be dropped."""
    L, info = torch.linalg.cholesky_ex(S)
    L.diagonal().masked_fill_(info != 0, 1.0)  # `cholesky_inverse` refuses a singular factor
    inverse = torch.cholesky_inverse(L)
    return inverse, (info == 0) & nothing_dropped(S, inverse, rtol)


POWER_STEPS = 30
"""Products with S that find λ_max for a tolerance, to a few percent where the first eigenvalues are close together."""


def full_rank(S: Tensor, rtol: float) -> Tensor:
    """Tell whether all eigenvalues of a positive semi-definite matrix are above rtol·tr(S), and so above rtol·λ_max.

    It is certain: S − rtol·tr(S)·I has a Cholesky factor.

    Returns:
        Boolean ().
    """
    return torch.linalg.cholesky_ex(_lowered(S, rtol * S.diagonal().sum())).info == 0


def _lowered(S: Tensor, by: Tensor) -> Tensor:
    """S − by·I, without an identity of its size."""
    lowered = S.clone()
    lowered.diagonal().sub_(by)
    return lowered


def kept(D: Sequence[float], rtol: float, noise: float = 0.0) -> int:
    """Count the eigenvalues D, descending, of S = Y Yᵀ that are above rtol·λ_max and above (noise·‖Y‖_F)²."""
    least = max(rtol * D[0], noise**2 * math.fsum(D))
    return sum(value > least for value in D)


def numerical_rank(S: Tensor, rtol: float, noise: float = 0.0) -> int:
    """Number of eigenvalues that `kept` keeps of a positive semi-definite S, without eigenvalues.

    A Cholesky factor shows a full rank. Else S − τ·I = L Δ Lᵀ (Bunch–Kaufman) has as many eigenvalues above zero as Δ
    (Sylvester's law of inertia), and a 2 × 2 block of Δ has one of each sign. Eigenvalues take five times as long.
    """
    if bool(full_rank(S, max(rtol, noise**2))):
        return S.shape[0]
    return _count_above(S, rtol * _largest_eigenvalue(S), noise)


def _count_above(S: Tensor, least: Tensor, noise: float) -> int:
    """Number of eigenvalues above `least` () and above the noise."""
    tau = torch.maximum(least, noise**2 * S.diagonal().sum())
    LD, pivots, _ = torch.linalg.ldl_factor_ex(_lowered(S, tau))
    alone, paired = pivots > 0, pivots < 0
    return int((alone & (LD.diagonal() > 0)).sum() + paired.sum() // 2)


def _largest_eigenvalue(S: Tensor) -> Tensor:
    """λ_max () of a positive semi-definite matrix from below, by a power iteration from its largest features on."""
    v = S.diagonal()
    for _ in range(POWER_STEPS):
        v = S @ (v / torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny))
    v = v / torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny)
    return torch.maximum(v @ (S @ v), S.diagonal().amax())


LEAST = 4.0
"""Rounding of sums of float32, in eps·λ_max: what it leaves of an eigenvalue of zero lies under that."""


def rank_with_gap(S: Tensor, rtol: float, noise: float = 0.0) -> int | None:
    """`numerical_rank` of an S whose own rounding hides small eigenvalues: None where some lie between that and `rtol`,
    and may be there or not."""
    if bool(full_rank(S, max(rtol, noise**2))):
        return len(S)
    largest = _largest_eigenvalue(S)
    rank, there = (_count_above(S, least * largest, noise) for least in (rtol, LEAST * torch.finfo(S.dtype).eps))
    return rank if rank in (there, len(S)) else None


def tall_pinv(M: Tensor, rtol: float) -> Tensor | None:
    """M† of an (m, n) matrix with m ≥ n by QR, M† = R⁻¹Qᵀ, or None where M is not safely of full column rank.

    QR keeps the error at cond(M)·eps; the normal equations would square the condition.
    """
    Q, R = torch.linalg.qr(M)
    inverse = triangular_inverse(R)
    return inverse @ Q.mT if bool(nothing_dropped(R, inverse, rtol)) else None


def column_condition(M: Tensor) -> float:
    """‖M‖_F·‖M†‖_F of an (m, n) matrix with m ≥ n, by R of its QR alone; infinite where its columns are dependent."""
    R = torch.linalg.qr(M, mode="r").R
    bound = float(frobenius_condition(R, triangular_inverse(R)))
    return bound if math.isfinite(bound) else math.inf


def triangular_inverse(R: Tensor, upper: bool = True) -> Tensor:
    """R⁻¹ of a triangular matrix, with Inf or NaN where there is none."""
    return torch.linalg.solve_triangular(R, torch.eye(R.shape[0], dtype=R.dtype, device=R.device), upper=upper)


SQUARED_RTOL = 3e-4
"""Least tolerance on singular values at which their squares serve: these carry rounding of 2e-16/rtol², some 2e-9."""


def _gram_pinv(M: Tensor, rtol: float) -> Tensor:
    """M† = (MᵀM)†Mᵀ of an (m, n) matrix with m ≥ n in float64, a fraction of the cost of an SVD."""
    wide = M.double()
    D, V = eigh_descending(wide.mT @ wide)
    keep = rtol**2 * D[0] < D
    V = V[:, keep]
    return ((V / D[keep]) @ (V.mT @ wide.mT)).to(M.dtype)


def pinv(M: Tensor, rtol: float | None = None) -> Tensor:
    """M† (n, m) of any (m, n) matrix: singular values at or under rtol·σ_max are dropped.

    Tries QR where that is exact and several times cheaper. Else it takes eigenvalues of the smaller Gram matrix in
    float64 where `rtol` is so large that squaring loses nothing of what is kept, and the SVD where it is not.
    """
    rtol = default_rtol(M.shape[0], M.shape[1], M.dtype) if rtol is None else rtol
    wide = M.shape[0] < M.shape[1]
    fast = tall_pinv(M.mT if wide else M, rtol)
    if fast is None and rtol >= SQUARED_RTOL:
        fast = _gram_pinv(M.mT if wide else M, rtol)
    if fast is not None:
        return fast.mT if wide else fast
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    keep = rtol * S[0] < S
    inverse = torch.where(keep, 1.0 / torch.where(keep, S, 1.0), 0.0)
    return (Vh.mT * inverse) @ U.mT
