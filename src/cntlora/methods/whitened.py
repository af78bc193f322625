"""Whitened mode, beyond the paper: A whitens the inputs in the directions of the gradient, in units of the outputs.

Under Adam the entries of B move by about the learning rate a step, so that the outputs y = W x + s·B·A x of a layer
move by lr·s·(A x) along random signs. With A C Aᵀ = c·I and c = κ²·(mean square of the outputs)/(r s²) that is, in root
mean square over tokens, κ·lr of the outputs' own size: in every layer, at every rank and scaling. B's problem is as
well conditioned as it can be, since its inputs A x are white. The directions are the r in which the gradient is largest
in that metric, those of descent: the leading right singular vectors of G L⁻ᵀ, with C = L Lᵀ.

Layout: G = ∂L/∂W (k, d), the mean over batches; C = X Xᵀ / n (d, d) over all tokens of all batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..linalg.damping import DampedRows
from ..linalg.low_rank import Shifted, times
from .descent import DescentEstimator, descent_target
from .estimator import Estimator
from .factors import zero_up
from .method import Method, Range, Settings, WeightOf
from .target import SiteTarget, Target


@dataclass(frozen=True, kw_only=True)
class Whitened(Method):
    """A = κ·σ/(s·√r)·V[:, :r]ᵀ L⁻¹ and B = 0, with G L⁻ᵀ = U S Vᵀ, C = L Lᵀ and σ² the mean square of W x.

    Attributes:
        motion: κ, the relative motion of a layer's outputs per unit of learning rate, in the first steps of Adam.
        damping: C gets damping·mean(diag C)·I before it is factored.
        batch_weights: one a batch, in both means; None for 1 each.
    """

    name = "whitened"
    summary = "A whitens the inputs in the gradient's directions, B zero"
    source = "cntlora, A C Aᵀ = c·I in units of the outputs"
    reads = "gradients"
    zero_start = True
    ranges: ClassVar[Mapping[str, Range]] = {"motion": (0.0, math.inf, "4 makes 1e-3 a good learning rate")}

    motion: float = 4.0
    damping: float = 0.01
    batch_weights: tuple[float, ...] | None = None

    def estimator(self, weight_of: WeightOf, settings: Settings) -> Estimator:
        return WhitenedEstimator(weight_of, self.damping)

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        assert site.target.right is not None
        A = times(site.spectrum.Vh[: site.r], site.target.right)
        return zero_up(site.scale * self.motion / math.sqrt(site.r) * A, site.shape[0])


def whitened_target(G: Tensor, inverse: Tensor | DampedRows, eta: Tensor | float = 1.0) -> Target:
    """M = −η G L⁻ᵀ as in descent, whose Vᵀ are the directions, and √η·L⁻¹ that A is multiplied with.

    Args:
        inverse: L⁻¹ of `whitening`, or C̃ of `damped_rows`.
        eta: σ², the mean square of the site's outputs.
    """
    target, root = descent_target(G, inverse, eta), float(eta) ** 0.5
    half = target.right
    assert half is not None
    right = Shifted(root * half.a, half.T.scaled(root)) if isinstance(half, Shifted) else root * half
    return replace(target, right=right, is_product=False)


class WhitenedEstimator(DescentEstimator):
    """The sums of descent."""

    target_of = staticmethod(whitened_target)
