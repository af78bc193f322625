"""Self mode (Das et al. 2025, eq. 12): equal output covariances, from a whitened source.

Layout: W (k, d), X (d, b), G = X Xᵀ (d, d). W_tar = W·T with a T (d, d) that does not know W, so that sites with the
same input share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..linalg.low_rank import LowRank, low_rank
from ..linalg.moments import Moments
from ..linalg.pseudo_inverse import (
    cholesky_inverse,
    default_rtol,
    fix_diagonal,
    frobenius_condition,
    triangular_inverse,
)
from .estimator import Estimator
from .factors import product_factors
from .method import Method, Settings, WeightOf
from .statistics import MapEstimator
from .target import SiteTarget

SOLVED_IN = torch.float64
"""dtype of the eigendecomposition, also where the sums are float32: in that the solver mixes eigenvectors of small
eigenvalues. In bfloat16 it moved B·A by 0.05 to 0.11 of ‖ΔW‖ on real layers, and float32 in the sums by 7e-4."""


@dataclass(frozen=True, kw_only=True)
class Self(Method):
    """ΔW = W_est − W with W_tar = W (P D^½)† (eq. 12), G = P D Pᵀ, averaged over batches by eq. 18.

    Attributes:
        decomposition: "svd", "qr" as printed in the paper, or "qr_pivoted" (column pivoting, reveals the rank).
        p: share of the singular values that goes to A (B gets 1 − p), in [0, 1]. SVD only.
        strength: scaling·B·A = strength·[ΔW]_r, whatever alpha, r and rsLoRA say; 2 is the α = 2r of the paper's runs.
        rtol: which singular values † drops. None (default): those that may be rounding errors of the inputs' dtype
            (docs/math/rounding.md). 0: those at or under max(d, b)·eps·σ_max in the statistics' dtype, as NumPy has it,
            as printed in the paper. A number: those at or under rtol·σ_max.
        gram: G as the "sum" over tokens (the paper) or the "mean".
        root: square root of G, "paper" (D^(−½) Pᵀ), "symmetric" (P D^(−½) Pᵀ) or "cholesky" (L⁻¹ of G = L Lᵀ, the
            fastest).
        batch_weights: w_j of eq. 18, one a batch; None for 1 each.
        initial_weight: W_0 of eq. 18, "pretrained" or "zero".
    """

    name = "self"
    summary = "equal output covariances, whitened source"
    source = "Das et al. 2025, eq. 12"
    reads = "inputs"

    decomposition: Literal["svd", "qr", "qr_pivoted"] = "svd"
    p: float = 0.5
    strength: float = 2.0
    rtol: float | None = None
    gram: Literal["sum", "mean"] = "sum"
    root: Literal["paper", "symmetric", "cholesky"] = "paper"
    batch_weights: tuple[float, ...] | None = None
    initial_weight: Literal["pretrained", "zero"] = "pretrained"

    def estimator(self, weight_of: WeightOf, settings: Settings) -> Estimator:
        map = partial(self_map, root=self.root, rtol=self.rtol, rounded=True)
        quick = partial(self_quick, rtol=self.rtol) if self.root == "cholesky" else None
        noise = Moments.noise_rtol if self.rtol is None else None
        return MapEstimator(weight_of, map, quick, noise, self.initial_weight, solved_in=SOLVED_IN)

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        return product_factors(site, self.decomposition, self.p)

    def rtol_at(self, k: int, d: int, tokens: int) -> float | None:
        return None if self.rtol is None else self.rtol or default_rtol(d, tokens, torch.float64)


def self_map(
    X: Moments, root: str = "paper", rtol: float | None = None, rounded: bool = False
) -> tuple[Tensor | LowRank, int]:
    """T = (P D^½)† of eq. 12, W_tar = W (P D^½)†, from equal output covariances and X_src X_srcᵀ = I.

    Args:
        root: "paper" for D^(−½) Pᵀ as printed, its rows ordered by falling eigenvalue and signed by
            `linalg.pseudo_inverse.fix_signs`. `symmetric` and `cholesky` solve the same equation and depend on neither
            the order nor the signs of the eigenvectors: P D^(−½) Pᵀ, and L⁻¹ with G = L Lᵀ, which needs no eigenvalues
            (`self_quick`).
        rtol: which singular values D^½ of P D^½, those of X, are dropped:

            - None: those that may be rounding of the entries of X, at or under `X.noise`·‖X‖_F, and those of 0.
            - 0: those whose eigenvalue D is under max(d, b)·eps times the largest, because the sums in D carry rounding
              noise of that size.
            - A number: those at or under rtol times the largest; a number under the limit of 0 acts as 0.

        rounded: T in the precision of the inputs, which its sum over batches has, and not in that of G.

    Returns:
        T (d, d) and the numerical rank of G.
    """
    dtype = X.seen_dtype if rounded else X.dtype
    wanted = None if root == "cholesky" else dtype
    pairs = X.eigenpairs(_root_rtol(X, rtol), _root_noise(X, rtol), wanted, SOLVED_IN)
    P, S = pairs.rows, pairs.D.sqrt().to(pairs.rows)[:, None]
    if root == "symmetric":
        return low_rank(P, 1 / S[:, 0]), len(P)
    half = P / S  # (n, d) = D^(−½) Pᵀ
    if root == "cholesky":
        Q, R = torch.linalg.qr(P * S)  # G = Rᵀ R, so that Rᵀ is L where G has full rank
        half = (fix_diagonal(R)[:, None] * (Q.mT @ half)).to(dtype)
    return low_rank(half, None), len(P)


def self_quick(X: Moments, rtol: float | None = None) -> tuple[Tensor | LowRank, Tensor, int]:
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
    return low_rank(half, None), holds, rows.shape[0]


def _root_rtol(X: Moments, rtol: float | None) -> float:
    """The tolerance on D that stands for `rtol` on D^½, no smaller than the rounding noise that the sums in D carry."""
    return X.rtol if rtol is None else max(rtol**2, X.rtol)


def _root_noise(X: Moments, rtol: float | None) -> float:
    """Return the share of ‖X‖_F that is taken for rounding of the inputs: none of it where a tolerance is given."""
    return X.noise if rtol is None else 0.0
