"""GoRA (He et al. 2025, arXiv 2502.12171): ranks by importance, and the gradient compressed onto a random A.

Layout: W (k, d), G = ∂L/∂W (k, d), the mean over batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.low_rank import formed
from ..linalg.spectrum import Spectrum
from ..linalg.sums import SharedSums
from .estimator import Estimator
from .factors import lora_down, site_generator
from .facts import Facts
from .method import Method, Settings, WeightOf
from .statistics import GradientSums
from .target import RankFacts, SiteTarget, Target

GAMMA = 0.05
"""γ of its authors' runs."""


@dataclass(frozen=True, kw_only=True)
class Gora(Method):
    """A as plain LoRA draws it, and B·A = −γ √(d/r) G A⁺A: a step of gradient descent, projected on the rows of A.

    √(d/r) makes up for what the projection takes away: over the draw of A, E‖B·A‖² = γ²‖G‖². With adaptive ranks they
    follow `gora_ranks`. The sign is the paper's; its authors' code has lost the minus since August 2025. Their runs
    weight the budget by k + d, the paper by √(k + d), as here.

    Attributes:
        strength: scaling·B·A = −strength·γ √(d/r) G A⁺A, whatever alpha, r and rsLoRA say.
        batch_weights: one a batch, in the mean gradient; None for 1 each.
    """

    name = "gora"
    summary = "gradient on random directions, ranks by importance"
    source = "He et al. 2025, arXiv 2502.12171"
    reads = "gradients"

    strength: float = 1.0
    batch_weights: tuple[float, ...] | None = None

    def estimator(self, weight_of: WeightOf, settings: Settings) -> Estimator:
        return GoraEstimator(weight_of)

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        assert site.target.M is not None
        G = formed(site.target.M)
        A = lora_down(site.r, site.shape[1], site_generator(settings.seed, site.name)).to(G.device)
        return site.scale * gora_up(G.to(A), A), A

    def ranks(self, sites: Mapping[str, RankFacts], budget: int, low: int, high: int | None) -> dict[str, int]:
        return gora_ranks(sites, budget / len(sites), low, high)

    @property
    def needs_matrix(self) -> bool:
        return True


class GoraEstimator(GradientSums):
    """∂L/∂W, its mean over batches, and the importance of W by it."""

    def __init__(self, weight_of: WeightOf) -> None:
        super().__init__()
        self.weight_of = weight_of
        self.accumulated: tuple[SharedSums, ...] = (self.gradients,)
        self.facts = Facts()

    def target(self, name: str, batches: int) -> Target:
        G = self.mean_gradient(name, batches)
        importance = float((self.weight_of(name).to(G) * G).abs().mean())
        return Target(M=G, known=lambda q: _no_spectrum(G), importance=importance)


def _no_spectrum(G: Tensor) -> Spectrum:
    none = torch.zeros(0, dtype=torch.float64, device=G.device)
    return Spectrum(none.new_zeros(len(G), 0), none, none.new_zeros(0, G.shape[1]))


def gora_up(G: Tensor, A: Tensor) -> Tensor:
    """B (k, r) = −γ √(d/r) G A⁺, for A (r, d): the nearest to −γ √(d/r) G in ‖B·A − …‖_F."""
    r, d = A.shape
    return -GAMMA * math.sqrt(d / max(r, 1)) * G @ torch.linalg.pinv(A)


def gora_ranks(
    sites: Mapping[str, RankFacts], reference: float, low: int = 0, high: int | None = None
) -> dict[str, int]:
    """Ranks that give each site parameters in proportion to its importance: b·a_i/√(k_i + d_i), rounded and bounded.

    a_i is the importance mean|W ⊙ G| of a site as a share of all, and b = reference·Σ √(k_j + d_j). Because of rounding
    and bounds the sum is not exactly reference·(number of sites).

    Args:
        reference: rank if all sites were alike.
        low, high: least and largest rank; 0 and None for the paper's reference/2 and 4·reference.
    """
    cost = {name: math.sqrt(sum(site.shape)) for name, site in sites.items()}
    total = sum(site.importance or 0.0 for site in sites.values())
    if total <= 0:
        raise ValueError("adaptive_ranks: |W ⊙ ∂L/∂W| is zero at every site, so that none is more important")
    budget = reference * sum(cost.values())
    least, most = low or int(reference / 2), int(4 * reference) if high is None else high
    ranks = {}
    for name, site in sites.items():
        cap = min(most, *site.shape)
        share = (site.importance or 0.0) / total
        ranks[name] = min(max(round(budget * share / cost[name]), min(least, cap)), cap)
    return ranks
