"""Descent mode, beyond the paper: the paper's cross-domain constraint with targets one step down the loss.

Equation 4 asks for W_tar X = W X_src. Here the outputs Y = W X are asked to move down the loss: W_tar X = Y − η ∂L/∂Y.
Its least-squares solution of least change is ΔW = −η (∂L/∂Y) X† = −η (∂L/∂Y Xᵀ)(X Xᵀ)†, and ∂L/∂Y Xᵀ is the gradient
∂L/∂W that autograd gives. Of rank r the best is the one that is nearest in the outputs, ‖(ΔW − B·A) X‖_F.

η is one common number times the mean square of the layer's outputs. Among steps with the same sum of squared relative
output changes, this one lowers the loss most (to first order), and units do not matter. The number is found by the loss
on the first batches (`execution.step_size`).

Layout: G = ∂L/∂W (k, d), the mean over batches; C = X Xᵀ / n (d, d) over all tokens of all batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.damping import DampedRows, damped_rows, whitening
from ..linalg.low_rank import LowRank, product_of_halves, root_rows, sums_in_float32
from .estimator import Estimator
from .factors import product_factors
from .method import Method, Settings, WeightOf
from .statistics import GradientSums, InputEstimator
from .target import SiteTarget, Target

ROW_NORM = 1 / math.sqrt(3)
"""Norm of a row of A: that of plain LoRA's, uniform in ±1/√d, so that learning rates are of the same size."""


@dataclass(frozen=True, kw_only=True)
class Descent(Method):
    """B·A = [−η G L⁻ᵀ]_r L⁻¹ (C = L Lᵀ): of rank r, the nearest to ΔW = −η G C⁻¹ in the outputs.

    Attributes:
        strength: the largest ‖scaling·B·A‖/‖W‖ of all sites; None for the one that lowers the loss most (at most 0.5;
            measured on the first four batches).
        damping: C gets damping·mean(diag C)·I before it is inverted.
        batch_weights: one a batch, in both means; None for 1 each.
    """

    name = "descent"
    summary = "outputs one step down the loss, of a size that the loss finds"
    source = "cntlora, eq. 4 with targets W X − η ∂L/∂Y"
    reads = "gradients"
    base = "keep"
    has_step_size = True

    strength: float | None = None
    damping: float = 0.01
    batch_weights: tuple[float, ...] | None = None

    def estimator(self, weight_of: WeightOf, settings: Settings) -> Estimator:
        return DescentEstimator(weight_of, self.damping)

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        return descent_factors(*product_factors(site))


SINGLE_ERROR = 1e-3
"""Most of the condition of a damped C times the rounding of float32, for it to be factored in that."""


def mean_square(W: Tensor, C: Tensor) -> Tensor:
    """The mean square of the outputs W x: tr(W C Wᵀ)/k (), over tokens and output features."""
    return ((W @ C) * W).sum() / W.shape[0]


def descent_target(G: Tensor, inverse: Tensor | DampedRows, eta: Tensor | float = 1.0) -> Target:
    """M = −η G L⁻ᵀ: B·A = [M]_r L⁻¹ is, of rank r, the nearest to ΔW = −η G C⁻¹ in ‖(ΔW − B·A) X‖_F.

    ‖D X‖_F² / n = ‖D L‖_F² for C = L Lᵀ, and ΔW L = −η G L⁻ᵀ: its truncated SVD times L⁻¹ is the best of that rank.

    Args:
        inverse: L⁻¹ of `whitening`; or C̃ of `damped_rows`, for which C̃^(−½) stands for L⁻¹. Of a G in the span of the
            tokens M is then (k, m), with m of them.
        eta: of this site, up to a factor that is common to all.
    """
    if isinstance(inverse, Tensor):
        return Target(M=-eta * (G @ inverse.to(G).mT), right=inverse, is_product=True)
    if (found := inverse.within(G)) is not None:
        N, R = found
        return Target(M=-eta * N, right=R, is_product=True)
    root = inverse.power(-0.5)
    return Target(M=root.after(G, -float(eta)), right=root, is_product=True)


def descent_factors(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same product B·A with orthonormal rows in A, times ROW_NORM; the size of the step is all in B."""
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return (B @ U) * (S / ROW_NORM), ROW_NORM * Vh


def _of_input(gram: Tensor | LowRank, tokens: float, damping: float) -> tuple[Tensor, Tensor | DampedRows]:
    """Return what all sites that see an input share: C and L⁻¹; or Y (n, d) with C = YᵀY, and C̃."""
    if isinstance(gram, Tensor):
        C = gram / tokens
        return C, whitening(C, damping)
    Y = root_rows(gram) / tokens**0.5
    return Y, damped_rows(Y, damping)


class DescentEstimator(InputEstimator[tuple[Tensor, Tensor | DampedRows]], GradientSums):
    """X Xᵀ and n of all inputs together, and ∂L/∂W, its mean over batches.

    Args:
        damping: of C, in units of the mean of its diagonal.
    """

    def __init__(self, weight_of: WeightOf, damping: float) -> None:
        GradientSums.__init__(self)
        InputEstimator.__init__(
            self, lambda gram, total, n: _of_input(gram, n, damping), None, by_rows=True, single=True
        )
        self.weight_of, self.damping = weight_of, damping
        self.accumulated = (self.sums, self.counts, self.gradients)

    def factors_in_single(self, d: int) -> bool:
        """The condition of C + μ·I is at most 1 + d/damping: float32 will do where that leaves its error small."""
        return d * torch.finfo(torch.float32).eps <= SINGLE_ERROR * self.damping

    def made(self, name: str, batches: int, shared: tuple[Tensor, Tensor | DampedRows]) -> Target:
        G = self.mean_gradient(name, batches)
        return descent_target(G, shared[1], self.mean_square(name, G, shared))

    def mean_square(self, name: str, G: Tensor, shared: tuple[Tensor, Tensor | DampedRows]) -> Tensor:
        """σ² (), the mean square of the site's outputs W x, in the precision of its gradient G."""
        moment, inverse = shared
        W, precision = self.weight_of(name).to(G), self.facts[name].precision
        if isinstance(inverse, DampedRows):
            return (W @ moment.to(G).mT).square().sum() / W.shape[0]
        if precision == torch.bfloat16 and sums_in_float32(precision, W.device):
            # W is exact there, and what C loses cancels out in a sum over all of its entries
            return (product_of_halves(W.to(precision), moment.to(precision)) * W).sum() / W.shape[0]
        return mean_square(W, moment.to(G))
