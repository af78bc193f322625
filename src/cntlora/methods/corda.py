"""CorDA (Yang et al. 2024, instruction-previewed; eq. 33): SVD of W times the input covariance.

Layout: W (k, d), C = X Xᵀ / n (d, d) over all tokens of all batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..linalg.damping import damped_inverse, damped_rows
from ..linalg.low_rank import LowRank, Shifted, root_rows
from .estimator import Estimator
from .factors import product_factors
from .method import Method, Settings, WeightOf
from .statistics import InputEstimator
from .target import SiteTarget, Target


@dataclass(frozen=True, kw_only=True)
class Corda(Method):
    """B·A = [W C̃]_r C̃⁻¹.

    Attributes:
        decomposition: "svd", "qr" or "qr_pivoted" (column pivoting, reveals the rank).
        p: share of the singular values that goes to A (B gets 1 − p), in [0, 1]. SVD only.
        strength: scaling·B·A = strength·[ΔW]_r, whatever alpha, r and rsLoRA say.
        damping: C̃ = C + damping·mean(diag C)·I. The paper's C⁻¹ does not exist for a rank-poor C. PEFT damps in the
            same way, by 0.01, and doubles it while a float32 inverse is off by more than 0.05. In float64 it never is.
        batch_weights: one a batch, in the sums over tokens; None for 1 each.
    """

    name = "corda"
    summary = "SVD of W times the input covariance"
    source = "Yang et al. 2024; eq. 33"
    reads = "inputs"

    decomposition: Literal["svd", "qr", "qr_pivoted"] = "svd"
    p: float = 0.5
    strength: float = 1.0
    damping: float = 0.01
    batch_weights: tuple[float, ...] | None = None

    def estimator(self, weight_of: WeightOf, settings: Settings) -> Estimator:
        return InputEstimator(
            lambda gram, total, tokens: _of_input(gram, tokens, self.damping),
            lambda name, batches, C: corda_target(weight_of(name).double(), *C),
            by_rows=True,
            single=True,
        )

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        return product_factors(site, self.decomposition, self.p)


def _of_input(gram: Tensor | LowRank, tokens: float, damping: float) -> tuple[Tensor | Shifted, Tensor | Shifted]:
    """C̃ and its inverse, which all sites share that see an input."""
    if isinstance(gram, Tensor):
        return damped_inverse(gram / tokens, damping)
    rows = damped_rows(root_rows(gram) / tokens**0.5, damping)
    return rows.power(1.0), rows.power(-1.0)


def corda_target(W: Tensor, C: Tensor | Shifted, inverse: Tensor | Shifted) -> Target:
    """ΔW C = SVD(W C) (CorDA, Yang et al. 2024, instruction-previewed; eq. 33–36): B·A = [W C̃]_r C̃⁻¹.

    Args:
        C, inverse: C̃ and C̃⁻¹, of `damped_inverse` or `damped_rows`.
    """
    return Target(M=C.after(W) if isinstance(C, Shifted) else W @ C, right=inverse)
