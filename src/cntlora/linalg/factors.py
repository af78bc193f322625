"""LoRA factors B (k, r) and A (r, d) of ΔW (k, d): truncated SVD or QR, then the arrangement of a `base`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .spectrum import Spectrum


def svd_factors(s: Spectrum, r: int, p: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """B = U S^(1−p) and A = S^p Vᵀ of rank r, with S times `scale`, so that B·A = scale·[ΔW]_r.

    Args:
        p: share of the spectrum that goes to A, in [0, 1]; 0.5 balances the two.
    """
    S = s.S[:r] * scale
    # 0^0 is 1: at p = 0 or 1 a zero singular value leaves one factor orthonormal and the other zero
    return s.U[:, :r] * S ** (1.0 - p), (S**p)[:, None] * s.Vh[:r]


def qr_factors(M: Tensor, r: int, pivoted: bool = False, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """B = Q[:, :r], A = scale·R[:r, :] of M = Q R, the diagonal of R not below zero.

    Args:
        pivoted: choose columns by the largest remaining norm (M Π = Q R), which reveals the rank; the columns of A
            are put back in their order. Not in the paper, whose plain QR takes the leading columns as they come.
    """
    if pivoted:
        return _pivoted_qr(M, r, scale)
    Q, R = torch.linalg.qr(M[:, :r])  # a step looks at no column beyond its own
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(M.dtype)
    return Q * signs, (scale * signs)[:, None] * torch.cat([R, Q.mT @ M[:, r:]], dim=1)


def _pivoted_qr(M: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """r Householder steps with column pivoting, ties to the lowest column; Q is orthonormal also past the rank of M."""
    R = M.clone()
    Q = torch.eye(M.shape[0], r, dtype=M.dtype, device=M.device)
    signs = M.new_ones(r)
    reflections = []
    for i in range(r):
        pivot = int(R[i:].square().sum(dim=0).argmax())
        v = R[i:, pivot].clone()
        v[0] += torch.copysign(torch.linalg.vector_norm(v), v[0])
        v = torch.nn.functional.normalize(v, dim=0, eps=torch.finfo(M.dtype).tiny)
        R[i:] -= 2 * v[:, None] * (v @ R[i:])
        R[i + 1 :, pivot] = 0.0  # exactly, so that no rounding noise of a used column is chosen again
        signs[i] = -1.0 if float(R[i, pivot]) < 0 else 1.0
        reflections.append(v)
    for i, v in reversed(list(enumerate(reflections))):
        Q[i:] -= 2 * v[:, None] * (v @ Q[i:])
    return Q * signs, (scale * signs)[:, None] * R[:r]


def norm_of(W: Tensor) -> Tensor:
    """‖W‖_F () in float64, of the norms of rows: a sum over all entries in float32 would lose digits."""
    return torch.linalg.vector_norm(torch.linalg.vector_norm(W, dim=1).double())


def product_inner(B: Tensor, A: Tensor, Y: Tensor, X: Tensor) -> float:
    """⟨B·A, Y·X⟩_F without the products: the sum over BᵀY ∘ AXᵀ."""
    return float(((B.mT @ Y) * (A @ X.mT)).sum())


def product_square(B: Tensor, A: Tensor) -> Tensor:
    """‖B·A‖_F² () without the product."""
    return ((B.mT @ B) * (A @ A.mT)).sum()


def product_norm(B: Tensor, A: Tensor) -> float:
    """‖B·A‖_F without the product."""
    return max(float(product_square(B, A)), 0.0) ** 0.5  # rounding may go below zero


def product_spectrum(B: Tensor, A: Tensor) -> Tensor:
    """Singular values of B·A through two small QRs, without forming the product."""
    return torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT)


def offset(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """[B, −B] (k, 2r) and [A; A] (2r, d): the product is zero, and the first halves are where training starts."""
    return torch.cat([B, -B], dim=1), torch.cat([A, A], dim=0)


def halves_cancel(B: Tensor, A: Tensor) -> bool:
    """Return whether the rank is two halves [B', −B'] and [A'; A'], as `offset` and `paired` write them.

    Or [B', B'] and [A'; −A'], as the head has them that shares the factors of its embedding, transposed.
    """
    h = A.shape[0] // 2
    one, two, down, up = A[:h], A[h : 2 * h], B[:, :h], B[:, h : 2 * h]
    return h > 0 and any(torch.equal(one, s * two) and torch.equal(down, -s * up) for s in (1.0, -1.0))


def paired(B: Tensor, A: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """`offset` at rank r from ⌈r/2⌉ directions; an odd r gives the last direction to A only, with zeros in B."""
    h = r // 2
    B_pairs, A_pairs = offset(B[:, :h], A[:h])
    if r % 2 == 0:
        return B_pairs, A_pairs
    return torch.cat([B_pairs, torch.zeros_like(B[:, :1])], dim=1), torch.cat([A_pairs, A[h : h + 1]], dim=0)
