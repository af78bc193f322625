"""LoRA-DA (Zhang et al. 2025, arXiv 2510.24561): A from the bias and the variance of a fine-tuned weight.

With A fixed, fine-tuning estimates the projection of the target on the rows of A. Its expected squared error is, up to
a constant, tr(A Ω Aᵀ) for orthonormal rows, with Ω = (variance of the estimate) − DᵀD and D the step to the target. So
the best A are the eigenvectors of Ω with the smallest eigenvalues, and B = D Aᵀ.

Layout: G = ∂L/∂W (k, d), the mean over batches; C = X Xᵀ / n (d, d) over all tokens; f (k,) the mean over tokens of
(∂ℓ/∂y)², ℓ being the loss of one sample: the diagonal of F_y, the Fisher information of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg.damping import damped_inverse
from ..linalg.parallel import once
from ..linalg.pseudo_inverse import fix_signs
from ..linalg.spectrum import Spectrum
from .estimator import Estimator
from .method import Method, Range, Settings, WeightOf
from .statistics import GradientSums, InputEstimator, OutputGradientSums
from .target import SiteTarget, Target

GAMMA = 1024.0
"""γ of its authors' runs."""


@dataclass(frozen=True, kw_only=True)
class LoraDa(Method):
    """B·A = D A₁ᵀA₁/γ, A₁ (r, d) the eigenvectors of Ω with the r smallest eigenvalues.

    D = −diag(f̃)⁻¹ G C̃⁻¹, divided by its largest singular value σ₁, and Ω = variance·Σ 1/f̃/(samples·σ₁²)·C̃⁻¹ − DᵀD.

    As in its authors' code, F_y is its diagonal; the paper has the diagonal of its inverse. They damp C and f by 1e-6
    whatever the units; here damping is relative, so that the units of the loss and of the inputs do not matter.

    Attributes:
        strength: scaling·B·A = strength·D A₁ᵀA₁/γ; None for the layer's scaling, by which its source does not divide.
        damping: C̃ = C + damping·mean(diag C)·I, and f̃ = f + damping·mean(f).
        variance: weight of the variance, 0.03 in its authors' runs and 1 in the paper.
        samples: rows of the training data, by which the variance falls; 100,000 in its authors' runs.
        batch_weights: one a batch, in all means; None for 1 each.
    """

    name = "lora_da"
    summary = "directions of least error of the fine-tuned weight"
    source = "Zhang et al. 2025, arXiv 2510.24561"
    reads = "gradients"
    ranges: ClassVar[Mapping[str, Range]] = {
        "variance": (0.0, math.inf, "0.03 is LoRA-DA's own, 0 leaves the term out")
    }

    strength: float | None = None
    damping: float = 0.01
    variance: float = 0.03
    samples: int = 100_000
    batch_weights: tuple[float, ...] | None = None

    def estimator(self, weight_of: WeightOf, settings: Settings) -> Estimator:
        return LoraDaEstimator(self.damping, self.variance / self.samples)

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        share = 1 / math.sqrt(GAMMA)
        return site.scale * share * site.spectrum.U[:, : site.r], share * site.spectrum.Vh[: site.r]


class LoraDaEstimator(InputEstimator[tuple[Tensor, Tensor, float]], GradientSums, OutputGradientSums):
    """X Xᵀ and n of all inputs together, ∂L/∂W, and the squares of ∂L/∂y.

    Args:
        damping: of C and f, in units of their means.
        variance: weight of the variance, for one sample.
    """

    def __init__(self, damping: float, variance: float) -> None:
        GradientSums.__init__(self)
        OutputGradientSums.__init__(self)
        InputEstimator.__init__(self, lambda gram, total, n: (*damped_inverse(gram / n, damping), n), None)
        self.damping, self.variance = damping, variance
        self.accumulated = (self.sums, self.counts, self.gradients, self.squares)

    def made(self, name: str, batches: int, shared: tuple[Tensor, Tensor, float]) -> Target:
        _, inverse, tokens = shared
        G = self.mean_gradient(name, batches).to(inverse)
        return lora_da_target(G, inverse, self.mean_square(name, tokens).to(inverse), self.damping, self.variance)


def lora_da_target(G: Tensor, inverse: Tensor, f: Tensor, damping: float, variance: float) -> Target:
    """The step D, and the directions in which it is worth most: −Ω = U' diag U'ᵀ, its eigenvalues descending.

    Args:
        inverse: C̃⁻¹ (d, d) of `damped_inverse`.
        f: mean squares (k,) of the output gradients of single samples.
        variance: its weight, for one sample.
    """
    f = f + damping * f.mean()
    D = -(G / f[:, None]) @ inverse
    sigma = torch.linalg.matrix_norm(D, 2)
    D = D / sigma
    gain = D.mT @ D - variance * (1 / f).sum() / sigma**2 * inverse
    return Target(known=once(lambda q: _gainful(gain, D, q)))


def _gainful(gain: Tensor, D: Tensor, q: int) -> Spectrum:
    """The first q eigenvectors of `gain` as rows Vᵀ with U = D V beside them; S² are the eigenvalues above 0."""
    values, vectors = torch.linalg.eigh(gain)
    values, V = values.flip(0), vectors.flip(1)[:, : min(q, *D.shape)]
    V = V * fix_signs(V)
    return Spectrum(D @ V, values.clamp_min(0.0).sqrt()[: min(D.shape)], V.mT)
