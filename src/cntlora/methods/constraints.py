"""The three constraint sets of the paper as closed forms for one batch (Das et al. 2025, section 3.2).

Layout: W (k, d), X (d, b), G = X Xᵀ (d, d). Cross and self give W_tar = W·T with a T (d, d) that does not know W, so
that sites with the same input share it; shift needs W inside the pseudo-inverse and shares (I − G)⁻¹ where it may.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg.moments import Moments
from ..linalg.pseudo_inverse import (
    cholesky_inverse,
    default_rtol,
    fix_diagonal,
    frobenius_condition,
    pinv,
    triangular_inverse,
)


def cross_quick(X: Moments, rtol: float | None = None) -> tuple[Tensor, Tensor, int]:
    """T = G† of eq. 4 by Cholesky, which holds only where † drops nothing; nothing is read back from the device.

    Returns:
        T (d, d), whether it holds (), and then the rank of G. Where b ≤ d by the dual, G† = X (Xᵀ X)⁻² Xᵀ.
    """
    tolerance = rtol or X.rtol
    rows = X.rows()
    if rows is None:
        inverse, holds = cholesky_inverse(X.gram(), tolerance)
        return inverse, holds, X.dim
    inverse, holds = cholesky_inverse(rows @ rows.mT, tolerance)
    half = inverse @ rows
    return half.mT @ half, holds, rows.shape[0]


def cross_map(X: Moments, rtol: float | None = None) -> tuple[Tensor, int]:
    """T = G† of eq. 4, W_tar = W (X Xᵀ)†, from W X_src = W_tar X and X_src Xᵀ = I, by the eigenvalues of G.

    Returns:
        T (d, d) and the numerical rank of G.
    """
    pairs = X.eigenpairs(rtol or X.rtol)
    return (pairs.P / pairs.D) @ pairs.P.mT, pairs.D.numel()


def self_map(X: Moments, root: str = "paper", rtol: float | None = None) -> tuple[Tensor, int]:
    """T = (P D^½)† of eq. 12, W_tar = W (P D^½)†, from equal output covariances and X_src X_srcᵀ = I.

    Args:
        root: "paper" for D^(−½) Pᵀ as printed, its rows ordered by falling eigenvalue and signed by
            `linalg.fix_signs`. Two members of the same solution family depend on neither order nor signs: "symmetric"
            for P D^(−½) Pᵀ, and "cholesky" for L⁻¹ with G = L Lᵀ, which needs no eigenvalues (`self_quick`).
        rtol: singular values D^½ of P D^½ at or under rtol·max are dropped. They are those of X; None drops what may
            be the rounding of its entries, D^½ at or under `X.noise`·‖X‖_F. 0 drops eigenvalues D under max(d, b)·eps,
            i.e. its square root on D^½, because the sums in D carry rounding noise of that size; for the same reason
            a smaller rtol acts as 0, and None drops those too.

    Returns:
        T (d, d) and the numerical rank of G.
    """
    pairs = X.eigenpairs(_root_rtol(X, rtol), _root_noise(X, rtol))
    half = (pairs.P / pairs.D.sqrt()).mT  # (n, d) = D^(−½) Pᵀ
    if root == "symmetric":
        return pairs.P @ half, pairs.D.numel()
    if root == "cholesky":
        Q, R = torch.linalg.qr((pairs.P * pairs.D.sqrt()).mT)  # G = Rᵀ R, so that Rᵀ is L where G has full rank
        half = fix_diagonal(R)[:, None] * (Q.mT @ half)
    return _padded(half, X.dim), pairs.D.numel()


def self_quick(X: Moments, rtol: float | None = None) -> tuple[Tensor, Tensor, int]:
    """T = L⁻¹ of G = L Lᵀ (`self_map` with root "cholesky"), which holds only where † drops nothing.

    It solves eq. 8 as P D^½ does: W L⁻¹ G L⁻ᵀ Wᵀ = W Wᵀ. Where b ≤ d by the dual, T = (Rᵀ)† = Qᵀ (Xᵀ X)⁻¹ Xᵀ from
    Xᵀ = Q R. Nothing is read back from the device.

    Returns:
        T (d, d), its rows past min(d, b) zero, whether it holds (), and then the rank of G.
    """
    tolerance, noise = _root_rtol(X, rtol), _root_noise(X, rtol)
    rows = X.rows()
    if rows is None:
        L, info = torch.linalg.cholesky_ex(X.gram())
        L.diagonal().masked_fill_(info != 0, 1.0)  # a factor that was given up has zeros there
        T = triangular_inverse(L, upper=False)
        # tr(G)·tr(G⁻¹), so that no eigenvalue is under either tolerance, of λ_max or of tr(G)
        return T, (info == 0) & (frobenius_condition(L, T).square() * max(tolerance, noise**2) < 1.0), X.dim
    S = rows @ rows.mT
    inverse, holds = cholesky_inverse(S, tolerance)
    holds = holds & (S.diagonal().sum() * torch.linalg.matrix_norm(inverse) * noise**2 < 1.0)
    Q, R = torch.linalg.qr(rows)
    half = fix_diagonal(R)[:, None] * (Q.mT @ (inverse @ rows))
    return _padded(half, X.dim), holds, rows.shape[0]


def _root_rtol(X: Moments, rtol: float | None) -> float:
    """The tolerance on D that stands for `rtol` on D^½, no smaller than the rounding noise that the sums in D carry."""
    return X.rtol if rtol is None else max(rtol**2, X.rtol)


def _root_noise(X: Moments, rtol: float | None) -> float:
    """What of ‖X‖_F is taken for rounding of the inputs: none of it where a tolerance is given."""
    return X.noise if rtol is None else 0.0


def _padded(half: Tensor, d: int) -> Tensor:
    """(n, d) with zero rows below, (d, d)."""
    return half if half.shape[0] == d else torch.cat([half, half.new_zeros(d - half.shape[0], d)])


def shift_inverse(W: Tensor, G: Tensor, rtol: float | None = None) -> Tensor:
    """(Wᵀ − G Wᵀ)† (k, d) of eq. 17, W_tar = C (Wᵀ − G Wᵀ)†.

    From W_tar Wᵀ − W_tar G Wᵀ = C (eq. 16). The default tolerance, and 0, is max(d, k)·eps on the singular values.
    """
    return pinv(W.mT - G @ W.mT, rtol or None)


def shift_resolvent(X: Moments, rtol: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(I − G)⁻¹ (d, d), with which (Wᵀ − G Wᵀ)† = (Wᵀ)† (I − G)⁻¹ where † drops nothing.

    Where b ≤ d from a b×b inverse, (I − X Xᵀ)⁻¹ = I + X (I − Xᵀ X)⁻¹ Xᵀ; nothing is read back from the device.

    Returns:
        The inverse, whether it holds () with this tolerance, ‖I − G‖_F·‖(I − G)⁻¹‖_F (), above its condition, and the
        matrix that it was made from, whose rank is that of G: Xᵀ X (b, b) where b ≤ d, else G.
    """
    rows = X.rows()
    S = X.gram() if rows is None else rows @ rows.mT
    K = torch.eye(S.shape[0], dtype=S.dtype, device=S.device) - S
    inverse, info = torch.linalg.inv_ex(K)
    ones = X.dim - S.shape[0]  # eigenvalues of I − G that are 1, outside the span of X
    squares = [torch.linalg.matrix_norm(matrix).square() + ones for matrix in (K, inverse)]
    condition = (squares[0] * squares[1]).sqrt()
    holds = (info == 0) & (condition * rtol < 1.0)
    if rows is not None:
        inverse = rows.mT @ (inverse @ rows)
        inverse.diagonal().add_(1.0)
    return inverse, holds, condition, S


def shift_constant(C: float | str, k: int, generator: torch.Generator, like: Tensor) -> Tensor | float:
    """C of eq. 14: c for c·identity, or a (k, k) matrix of standard normal entries for "gaussian"."""
    if C == "gaussian":
        draws = torch.randn(k, k, generator=generator, dtype=torch.float64)
        return draws.to(device=like.device, dtype=like.dtype)
    return float(C)


def shift_rtol(k: int, d: int, dtype: torch.dtype, rtol: float | None) -> float:
    """The tolerance that `shift_inverse` applies to a (d, k) matrix."""
    return rtol or default_rtol(d, k, dtype)


def combine(W: Tensor, W_tar_sum: Tensor, batches: int, initial: str = "pretrained") -> Tensor:
    """ΔW = W_est − W with eq. 18, W_est = (W_0 + Σ_j w_j W_tar,j) / (B + 1).

    Args:
        W: pretrained weight (k, d).
        W_tar_sum: Σ_j w_j W_tar,j (k, d).
        batches: B, the number of batches that contributed.
        initial: W_0, "pretrained" for W (the paper's default) or "zero".

    The paper says that W_est is "subtracted from W_src"; its own definition W_tar = W + ΔW gives W_est − W, which
    is what this returns.
    """
    W_0 = W if initial == "pretrained" else torch.zeros_like(W)
    return (W_0 + W_tar_sum) / (batches + 1) - W
