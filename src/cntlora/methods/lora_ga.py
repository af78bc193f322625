"""LoRA-GA (Wang et al. 2024, theorems 3.1 and 3.2): singular vectors of the gradient.

Layout: G = ∂L/∂W (k, d), the mean over batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..linalg.spectrum import Spectrum
from .estimator import Estimator
from .method import Method, Settings, WeightOf
from .statistics import GradientEstimator
from .target import SiteTarget, Target


@dataclass(frozen=True, kw_only=True)
class LoraGa(Method):
    """A = c·V[:, :r]ᵀ and B = c·U[:, r:2r] of G = U S Vᵀ.

    Attributes:
        strength: scaling·B·A = strength·U[:, r:2r] V[:, :r]ᵀ·√k/γ; None for the layer's scaling, by which its source
            does not divide.
        batch_weights: one a batch, in the mean gradient; None for 1 each.
    """

    name = "lora_ga"
    summary = "singular vectors of the gradient"
    source = "Wang et al. 2024, theorems 3.1 and 3.2"
    reads = "gradients"
    width = 2

    strength: float | None = None
    batch_weights: tuple[float, ...] | None = None

    def estimator(self, weight_of: WeightOf, settings: Settings) -> Estimator:
        return GradientEstimator(lambda G: Target(M=G))

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        return lora_ga_factors(site.spectrum, site.r, site.scale)


def lora_ga_factors(s: Spectrum, r: int, scale: float, gamma: float = 16.0) -> tuple[Tensor, Tensor]:
    """A = c·V[:, :r]ᵀ, B = c·U[:, r:2r], c² = scale·√k/γ, of G = U S Vᵀ (LoRA-GA, Wang et al. 2024).

    The directions are those of its theorem 3.1, the scale that of theorem 3.2 and its authors' code ("stable", γ = 16).
    The spectrum of the gradient itself does not enter, so that the scale of the loss does not matter. PEFT 0.21
    multiplies B by S[r:2r] and scales B alone, which does let it matter; its subspaces are the same.
    """
    c = math.sqrt(scale * math.sqrt(s.U.shape[0]) / gamma)
    return c * s.U[:, r : 2 * r], c * s.Vh[:r]
