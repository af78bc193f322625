"""PiSSA (Meng et al. 2024; eq. 24): the principal singular triplets of W."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .estimator import Estimator
from .factors import product_factors
from .method import Method, Settings, WeightOf
from .statistics import WeightEstimator
from .target import SiteTarget, Target


@dataclass(frozen=True, kw_only=True)
class Pissa(Method):
    """B·A = [W]_r.

    Attributes:
        decomposition: "svd", "qr" or "qr_pivoted" (column pivoting, reveals the rank).
        p: share of the singular values that goes to A (B gets 1 − p), in [0, 1]. SVD only.
        strength: scaling·B·A = strength·[ΔW]_r, whatever alpha, r and rsLoRA say.
    """

    name = "pissa"
    summary = "principal singular triplets of W"
    source = "Meng et al. 2024; eq. 24"
    reads = "weights"

    decomposition: Literal["svd", "qr", "qr_pivoted"] = "svd"
    p: float = 0.5
    strength: float = 1.0

    def estimator(self, weight_of: WeightOf, settings: Settings) -> Estimator:
        return WeightEstimator(weight_of, pissa_target)

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        return product_factors(site, self.decomposition, self.p)


def pissa_target(W: Tensor) -> Target:
    """ΔW = W (PiSSA, Meng et al. 2024; eq. 24–26): factored by SVD, B = U S^½ and A = S^½ Vᵀ at rank r.

    OLoRA (Büyükakyüz 2024; eq. 28–30) has the same ΔW and factors it by QR.
    """
    return Target(M=W, is_delta=True)
