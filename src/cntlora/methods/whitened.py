"""Whitened mode, beyond the paper: A whitens the inputs in the directions of the gradient, in units of the outputs.

`Whitened` leaves B = 0; `WhitenedDescent` makes descent's step in B.

Under Adam the entries of B move by about the learning rate a step, so that the outputs y = W x + s·B·A x of a layer
move by lr·s·(A x) along random signs. Here Σ mean (A x)² = κ²·(mean square of the outputs)/s², so that they move, in
root mean square over tokens, by κ·lr of their own size: in every layer, at every rank and scaling. The motions of
layers add up, about like √L in a model with residual connections, so κ is `motion`/√L for L adapted layers.

A whitens the inputs where they vary most, and B's problem is better conditioned: A = V[:, :r]ᵀ L⁻¹ with
C + damping·mean(diag C)·I = L Lᵀ, and V[:, :r] the leading right singular vectors of G L⁻ᵀ, the directions in which
the gradient is largest in that metric (those of descent).

Each token is scaled to a mean square of 1 before C and σ² are taken. Language models have tokens whose activations are
a hundred times those of all others; unscaled they would be the size of the outputs, and the others' would move by as
much as they do.

Layout: G = ∂L/∂W (k, d), the mean over batches; C = X Xᵀ / n (d, d) over all tokens of all batches, of unit size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..linalg.damping import DampedRows, shift_of
from ..linalg.low_rank import times
from .descent import DescentEstimator, descent_target
from .estimator import Estimator
from .factors import zero_up
from .method import Method, Range, Settings, WeightOf
from .target import SiteTarget, Target


@dataclass(frozen=True, kw_only=True)
class Whitened(Method):
    """A = κ·σ/(s·√(r·t))·V[:, :r]ᵀ L⁻¹ and B = 0, with G L⁻ᵀ = U S Vᵀ, C̃ = L Lᵀ and σ² the mean square of W x.

    t, the mean of V[:, :r]ᵀ L⁻¹ C L⁻ᵀ V[:, :r], makes up for the damping: Σ mean (A x)² = κ²σ²/s² whatever that is.

    Attributes:
        motion: κ·√L, with κ the relative motion of a layer's outputs per unit of learning rate in the first steps of
            Adam, and L the number of layers that the call initialises.
        damping: C̃ is C + damping·mean(diag C)·I. Directions that vary more than the mean are whitened. The others keep
            their size; with less damping noise of few tokens is among them.
        batch_weights: one a batch, in both means; None for 1 each.
    """

    name = "whitened"
    summary = "A whitens the inputs in the gradient's directions, B zero"
    source = "cntlora, A (C + μ·I) Aᵀ = c·I in units of the outputs"
    reads = "gradients"
    zero_start = True
    rate = 1e-3
    ranges: ClassVar[Mapping[str, Range]] = {"motion": (0.0, math.inf, "20 makes 1e-3 a good learning rate")}

    motion: float = 20.0
    damping: float = 1.0
    batch_weights: tuple[float, ...] | None = None

    def estimator(self, weight_of: WeightOf, settings: Settings) -> Estimator:
        return WhitenedEstimator(weight_of, self.damping)

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        rows = directions(site)
        return zero_up(self.size(site, rows) * rows, site.shape[0])

    def size(self, site: SiteTarget, rows: Tensor) -> float:
        """κ·σ/(s·√(r·t)), of which A is `rows`: Σ mean (A x)² is κ²σ²/s²."""
        total = site.r - site.target.shift * float(rows.square().sum())  # tr R C Rᵀ, where R (C + μ·I) Rᵀ = I
        return site.scale * self.motion / site.sites**0.5 * site.target.size / total**0.5


@dataclass(frozen=True, kw_only=True)
class WhitenedDescent(Whitened):
    """A of whitened mode, and B·A = [−η G L⁻ᵀ]_r L⁻¹: descent's step, in factors that train on at a known pace.

    With η one common number times σ². In the metric of A that is B = −(η/a²)·∂L/∂B/s with A (C + μ·I) Aᵀ = a²·I: a
    step of gradient descent in B.

    Attributes:
        strength: the largest ‖scaling·B·A‖/‖W‖ of all sites; None for the one that lowers the loss most (at most 0.5;
            measured on the first four batches), or no step (B = 0) where that lowers it by less than 1 %.
    """

    name = "whitened_descent"
    summary = "whitened's A, and in B one step down the loss, of a size that the loss finds"
    source = "cntlora, eq. 4 with targets W X − η ∂L/∂Y and A (C + μ·I) Aᵀ = c·I"
    zero_start = False
    base = "keep"
    has_step_size = True
    least_gain = 0.01

    strength: float | None = None

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        rows = directions(site)
        size = self.size(site, rows)
        step = site.scale * site.target.size**2 / size * site.spectrum.S[: site.r]
        return (site.spectrum.U[:, : site.r] * step).to(rows), size * rows


def directions(site: SiteTarget) -> Tensor:
    """V[:, :r]ᵀ L⁻¹ (r, d)."""
    assert site.target.right is not None
    return times(site.spectrum.Vh[: site.r], site.target.right)


class WhitenedEstimator(DescentEstimator):
    """The sums of descent, of tokens of unit size; the target is descent's, whose Vᵀ are the directions."""

    unit = True

    def made(self, name: str, batches: int, shared: tuple[Tensor, Tensor | DampedRows]) -> Target:
        (moment, inverse), G = shared, self.mean_gradient(name, batches)
        shift = inverse.mu if isinstance(inverse, DampedRows) else float(shift_of(moment, self.damping))
        size = float(self.mean_square(name, G, shared)) ** 0.5
        return replace(descent_target(G, inverse, 1.0), is_product=False, size=size, shift=shift)
