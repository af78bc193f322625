"""Cross mode (Das et al. 2025, eq. 4): equal outputs, from inputs that are correlated with the source's.

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
from ..linalg.pseudo_inverse import cholesky_inverse, default_rtol
from .estimator import Estimator
from .factors import product_factors
from .method import Method, Settings, WeightOf
from .statistics import MapEstimator
from .target import SiteTarget

SINGLE_RTOL = 5e-4
"""Least tolerance at which float32 serves for G and its eigenvalues: its rounding, 6e-8·λ_max, is 1e-4 of what is kept
at most. On the inputs of MiniLM it moved B·A by 5e-5 of ‖ΔW‖ at 1e-3."""


@dataclass(frozen=True, kw_only=True)
class Cross(Method):
    """ΔW = W_est − W with W_tar = W G† (eq. 4), averaged over batches by eq. 18.

    Attributes:
        decomposition: "svd", "qr" as printed in the paper, or "qr_pivoted" (column pivoting, reveals the rank).
        p: share of the singular values that goes to A (B gets 1 − p), in [0, 1]. SVD only.
        strength: scaling·B·A = strength·[ΔW]_r, whatever alpha, r and rsLoRA say; 2 is the α = 2r of the paper's runs.
        rtol: singular values at or under rtol·σ_max are dropped by †; at less than 1e-3 ΔW is huge (tweets_tolerance).
            0 for max(d, b)·eps of the statistics' dtype, as NumPy has it, as printed in the paper.
        gram: G as the "sum" over tokens (the paper) or the "mean".
        batch_weights: w_j of eq. 18, one a batch; None for 1 each.
        initial_weight: W_0 of eq. 18, "pretrained" or "zero".
    """

    name = "cross"
    summary = "equal outputs, inputs correlated with the source's"
    source = "Das et al. 2025, eq. 4"
    reads = "inputs"

    decomposition: Literal["svd", "qr", "qr_pivoted"] = "svd"
    p: float = 0.5
    strength: float = 2.0
    rtol: float = 1e-3
    gram: Literal["sum", "mean"] = "sum"
    batch_weights: tuple[float, ...] | None = None
    initial_weight: Literal["pretrained", "zero"] = "pretrained"

    def estimator(self, weight_of: WeightOf, settings: Settings) -> Estimator:
        map = partial(cross_map, rtol=self.rtol, rounded=True)
        quick = partial(cross_quick, rtol=self.rtol, rounded=True)
        return MapEstimator(weight_of, map, quick, None, self.initial_weight, self.rtol >= SINGLE_RTOL)

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        return product_factors(site, self.decomposition, self.p)

    def rtol_at(self, k: int, d: int, tokens: int) -> float | None:
        return self.rtol or default_rtol(d, tokens, torch.float64)


def cross_quick(X: Moments, rtol: float | None = None, rounded: bool = False) -> tuple[Tensor | LowRank, Tensor, int]:
    """T = G† of eq. 4 by Cholesky, which holds only where † drops nothing; nothing is read back from the device.

    Args:
        rounded: T in the precision of the inputs, which its sum over batches has, and not in that of G.

    Returns:
        T (d, d), whether it holds (), and then the rank of G. Where b ≤ d by the dual, G† = X (Xᵀ X)⁻² Xᵀ.
    """
    tolerance = rtol or X.rtol
    rows = X.rows()
    if rows is None:
        inverse, holds = cholesky_inverse(X.gram(), tolerance)
        return inverse, holds, X.dim
    inverse, holds = cholesky_inverse(rows @ rows.mT, tolerance)
    half = (inverse @ rows).to(X.seen_dtype if rounded else X.dtype)
    return low_rank(half, half.new_ones(len(half))), holds, rows.shape[0]


def cross_map(X: Moments, rtol: float | None = None, rounded: bool = False) -> tuple[Tensor | LowRank, int]:
    """T = G† of eq. 4, W_tar = W (X Xᵀ)†, from W X_src = W_tar X and X_src Xᵀ = I, by the eigenvalues of G.

    Args:
        rounded: as in `cross_quick`.

    Returns:
        T (d, d) and the numerical rank of G.
    """
    pairs = X.eigenpairs(rtol or X.rtol, dtype=X.seen_dtype if rounded else X.dtype)
    return low_rank(pairs.rows, (1.0 / pairs.D).to(pairs.rows)), len(pairs.rows)
