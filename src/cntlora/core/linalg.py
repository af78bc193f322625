"""Small linear algebra shared by the modes: tolerances, signs, and inverses that know when they may be trusted."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def default_rtol(rows: int, columns: int, dtype: torch.dtype) -> float:
    """max(rows, columns)·eps, the tolerance that NumPy and PyTorch use for a pseudo-inverse."""
    return max(rows, columns) * torch.finfo(dtype).eps


def fix_signs(columns: Tensor) -> Tensor:
    """The signs (n,) that make the largest-magnitude entry of every column of an (m, n) matrix positive.

    Eigenvectors and singular vectors are known up to sign only; without a convention the result depends on the
    LAPACK build. The first of equal magnitudes decides.
    """
    if columns.shape[1] == 0:
        return columns.new_ones(0)
    largest = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True)).squeeze(0)
    return torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)


def eigh_descending(S: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), descending and not below zero, and eigenvectors (n, n) of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(S)
    return values.flip(0).clamp_min(0.0), vectors.flip(1)


def frobenius_condition(M: Tensor, inverse: Tensor) -> float:
    """‖M‖_F·‖M†‖_F, at least σ_max/σ_min and at most n times that; infinite where anything overflowed."""
    bound = float(torch.linalg.matrix_norm(M) * torch.linalg.matrix_norm(inverse))
    return bound if math.isfinite(bound) else math.inf


def nothing_dropped(M: Tensor, inverse: Tensor, rtol: float) -> bool:
    """Whether σ_min(M) > rtol·σ_max(M) for certain, so that the pseudo-inverse is the plain inverse."""
    return frobenius_condition(M, inverse) * rtol < 1.0


def cholesky_inverse(S: Tensor, rtol: float) -> Tensor | None:
    """S⁻¹ of a positive definite matrix by Cholesky, or None where † would have to drop something."""
    L, info = torch.linalg.cholesky_ex(S)
    if int(info) != 0:
        return None
    inverse = torch.cholesky_inverse(L)
    return inverse if nothing_dropped(S, inverse, rtol) else None


def numerical_rank(S: Tensor, rtol: float) -> int:
    """Number of eigenvalues above rtol·λ_max of a positive semi-definite matrix: by Cholesky alone where it is full."""
    if cholesky_inverse(S, rtol) is not None:
        return S.shape[0]
    D = torch.linalg.eigvalsh(S)
    return int((rtol * D[-1] < D).sum())


def plain_inverse(M: Tensor, rtol: float) -> Tensor | None:
    """M⁻¹ of a square matrix by LU, or None where † would have to drop something."""
    inverse, info = torch.linalg.inv_ex(M)
    if int(info) != 0:
        return None
    return inverse if nothing_dropped(M, inverse, rtol) else None


def tall_pinv(M: Tensor, rtol: float) -> Tensor | None:
    """M† of an (m, n) matrix with m ≥ n by QR, M† = R⁻¹Qᵀ, or None where M is not safely of full column rank.

    QR keeps the error at cond(M)·eps; the normal equations would square the condition.
    """
    Q, R = torch.linalg.qr(M)
    identity = torch.eye(R.shape[0], dtype=R.dtype, device=R.device)
    if bool((R.diagonal() == 0).any()):
        return None
    inverse = torch.linalg.solve_triangular(R, identity, upper=True)
    return inverse @ Q.mT if nothing_dropped(R, inverse, rtol) else None


def pinv(M: Tensor, rtol: float | None = None) -> Tensor:
    """M† (n, m) of any (m, n) matrix: singular values at or under rtol·σ_max are dropped.

    Tries QR where that is exact and several times cheaper, and falls back to the SVD.
    """
    rtol = default_rtol(M.shape[0], M.shape[1], M.dtype) if rtol is None else rtol
    wide = M.shape[0] < M.shape[1]
    fast = tall_pinv(M.mT if wide else M, rtol)
    if fast is not None:
        return fast.mT if wide else fast
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    keep = rtol * S[0] < S
    inverse = torch.where(keep, 1.0 / torch.where(keep, S, 1.0), 0.0)
    return (Vh.mT * inverse) @ U.mT
