"""OLoRA (Büyükakyüz 2024; eq. 28): QR of W."""

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
class Olora(Method):
    """B = Q[:, :r] and A = R[:r] of W = Q R.

    Attributes:
        decomposition: "qr", or "qr_pivoted" (column pivoting, reveals the rank).
        strength: scaling·B·A = strength·[ΔW]_r; None for the layer's scaling, by which its source does not divide.
    """

    name = "olora"
    summary = "QR of W"
    source = "Büyükakyüz 2024; eq. 28"
    reads = "weights"

    decomposition: Literal["qr", "qr_pivoted"] = "qr"
    strength: float | None = None

    def estimator(self, weight_of: WeightOf, settings: Settings) -> Estimator:
        return WeightEstimator(weight_of, lambda W: Target(M=W, is_delta=True))

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        return product_factors(site, self.decomposition)
