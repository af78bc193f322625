"""LoRA-One (Zhang et al. 2025, algorithm 1): one step of gradient descent.

Layout: G = ∂L/∂W (k, d), the mean over batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .estimator import Estimator
from .factors import product_factors
from .method import Method, Settings, WeightOf
from .statistics import GradientEstimator
from .target import SiteTarget, Target


@dataclass(frozen=True, kw_only=True)
class LoraOne(Method):
    """B·A = [ΔW]_r with ΔW = −G/(γ·σ_1(G)).

    Attributes:
        decomposition: "svd", "qr" or "qr_pivoted" (column pivoting, reveals the rank).
        p: share of the singular values that goes to A (B gets 1 − p), in [0, 1]. SVD only.
        strength: scaling·B·A = strength·[ΔW]_r; None for the layer's scaling, by which its source does not divide.
        batch_weights: one a batch, in the mean gradient; None for 1 each.
    """

    name = "lora_one"
    summary = "one step of gradient descent"
    source = "Zhang et al. 2025, algorithm 1"
    reads = "gradients"

    decomposition: Literal["svd", "qr", "qr_pivoted"] = "svd"
    p: float = 0.5
    strength: float | None = None
    batch_weights: tuple[float, ...] | None = None

    def estimator(self, weight_of: WeightOf, settings: Settings) -> Estimator:
        return GradientEstimator(lora_one_target)

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        return product_factors(site, self.decomposition, self.p)


def lora_one_target(G: Tensor, gamma: float = 128.0) -> Target:
    """ΔW = −G/(γ·σ_1(G)) (LoRA-One, Zhang et al. 2025, algorithm 1): one step of gradient descent, factored by SVD.

    As published it takes the step: `base="keep"`. γ = 128 is its authors'; `strength` scales it.
    """
    return Target(M=-G / (gamma * torch.linalg.matrix_norm(G, 2)), is_delta=True)
