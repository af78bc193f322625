"""Losses of the outputs z of a last linear layer: told by their gradient, and fitted by that layer.

Three are convex in z, and so in the layer's weight and bias: cross-entropy, with logits of several classes or of
independent labels, and squares. ∂L/∂z alone says which it is and what its targets are, whoever wrote the loss.

Layout: z and ∂L/∂z (n, c), rows × outputs; inputs X (n, d); weight (c, d), bias (c,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import stdev

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

RIDGES = (10.0, 10**0.5, 1.0, 10**-0.5, 0.1, 10**-1.5, 0.01, 1e-3)
"""Of the penalty, in units of the mean variance of an input; from the largest, which is the nearest to no change."""
ROUNDS = 60
"""Iterations of L-BFGS at most."""
ENOUGH = 1e-5
"""Change of the loss in an iteration that ends it."""
PATIENCE = 2
"""Smaller ridges that are tried beyond the best."""
FOLDS = 4
SATURATED = 0.01
"""A row whose outputs are right but for so much has a gradient that tells its weight no longer."""


@dataclass(frozen=True)
class OutputLoss:
    """A loss of one row of outputs: value(z, y) (n,), its gradient by z (n, c), and a bound of its curvature."""

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    curvature: float


def _classes(z: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(z, y, reduction="none")


def _of_probabilities(z: Tensor, y: Tensor) -> Tensor:
    return z.softmax(-1) - y


def _binary(z: Tensor, y: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(z, y, reduction="none").sum(-1)


def _of_odds(z: Tensor, y: Tensor) -> Tensor:
    return z.sigmoid() - y


def _squares(z: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (z - y).square().sum(-1)


CROSS_ENTROPY = OutputLoss("cross-entropy", _classes, _of_probabilities, 0.25)
BINARY = OutputLoss("binary cross-entropy", _binary, _of_odds, 0.25)
SQUARES = OutputLoss("squares", _squares, torch.sub, 1.0)


@dataclass(frozen=True)
class Targets:
    """The loss that gave a gradient: Σ w_i ℓ(z_i, y_i) with targets y (n, c) and weights w (n,)."""

    loss: OutputLoss
    y: Tensor
    w: Tensor


def targets_of(z: Tensor, g: Tensor, total: float, rounding: float) -> Targets | None:
    """Tell the loss L from ∂L/∂z, and its targets.

    The gradient of w·ℓ is w·(softmax(z) − y), w·(σ(z) − y) or w·(z − y). For one class a row, y is where g is below
    zero and w = −g_y/(1 − p_y), whatever weights classes and rows have; for targets that are probabilities, all w are
    1/n. The weight of squares is not in g, and is taken from the value of L.

    Args:
        z: outputs, in float64. g: ∂L/∂z of the rows that have one other than zero.
        total: L.
        rounding: relative error of g.

    Returns:
        None for another loss.
    """
    n, c = z.shape
    if c > 1 and bool((g.sum(-1).abs() <= rounding * max(float(g.abs().amax()), 1.0 / n)).all()):
        p = z.softmax(-1)
        classes = one_hot(g.argmin(-1), c).to(z)
        if (w := _weights(g, p - classes, rounding)) is not None:
            return Targets(CROSS_ENTROPY, classes, w)
        y = p - n * g
        if bool(((y >= -rounding) & (y <= 1 + rounding)).all()):
            return Targets(CROSS_ENTROPY, y.clamp(0.0, 1.0), z.new_full((n,), 1.0 / n))
        return None
    labels = (g < 0).to(z)
    if (w := _weights(g, z.sigmoid() - labels, rounding)) is not None:
        found = Targets(BINARY, labels, w)
        if c > 1 or abs(mean_loss(found, z) * float(w.sum()) - total) <= rounding * abs(total):
            return found
    if total > 0:  # Σ ½ w (z − y)² with w (z − y) = g
        weight = float(g.square().sum()) / (2 * total)
        if any(abs(weight * size - 1) <= rounding for size in (n / 2, n * c / 2, n, n * c)):  # means, or half of them
            return Targets(SQUARES, z - g / weight, z.new_full((n,), weight))
    return None


def _weights(g: Tensor, unit: Tensor, rounding: float) -> Tensor | None:
    """w (n,) of g = w·unit; None if there are none. Rows whose `unit` is next to zero have the median of the others, or
    1/n."""
    size = unit.abs().amax(-1)
    solid = size > SATURATED
    w = (g * unit).sum(-1) / unit.square().sum(-1).clamp(min=torch.finfo(g.dtype).tiny)
    w = torch.where(solid, w, w[solid].median() if solid.any() else 1.0 / len(g))
    near = (g - w[:, None] * unit).abs().amax() <= rounding * w.abs().amax()
    return w if bool(near) and bool((w > 0).all()) else None


def mean_loss(targets: Targets, z: Tensor) -> float:
    """Σ w ℓ(z, y)/Σ w."""
    return float((targets.w * targets.loss.value(z, targets.y)).sum() / targets.w.sum())


@dataclass(frozen=True)
class Fit:
    """Change of a layer: its weight by `delta` (c, d) and its bias by `bias` (c,).

    Attributes:
        ridge: of the penalty, one of `RIDGES`; None where the layer is best left as it is.
        before, after: the mean loss of the layer as it was, and of fits with `ridge` on the rows they left out.
    """

    delta: Tensor
    bias: Tensor
    ridge: float | None
    before: float
    after: float


def fit_layer(X: Tensor, z: Tensor, targets: Targets, fold: Tensor, with_bias: bool) -> Fit:
    """The change D, e of a layer that lowers Σ w ℓ(z + D x + e, y)/Σ w + ½ ridge·v·‖D‖² most, v the mean variance of x.

    The ridge is the largest whose loss on the rows left out, over folds, is within one standard error of the lowest;
    none where the lowest is not that much below the loss of the layer as it is.

    Args:
        X: inputs (n, d) in float64. z: outputs of the layer as it is.
        fold: number of each row's fold (n,), from 0.
    """
    problem, before = _Problem.of(X, z, targets, with_bias), mean_loss(targets, z)
    held_out = [fold == number for number in fold.unique()]
    shares = [float(targets.w[rows].sum() / targets.w.sum()) for rows in held_out]
    changes = [problem.none()] * len(held_out)
    losses: list[list[float]] = []
    means: list[float] = []
    for ridge in RIDGES:
        changes = [problem.solved(ridge, ~rows, near) for rows, near in zip(held_out, changes, strict=True)]
        losses.append([problem.loss(change, rows) for change, rows in zip(changes, held_out, strict=True)])
        means.append(math.fsum(share * loss for share, loss in zip(shares, losses[-1], strict=True)))
        lowest = means.index(min(means))
        if len(means) > lowest + PATIENCE:
            break
    error = stdev(losses[lowest]) / len(held_out) ** 0.5
    chosen = next(i for i, mean in enumerate(means) if mean <= means[lowest] + error)
    if not means[lowest] + error < before:
        return Fit(X.new_zeros(z.shape[1], X.shape[1]), z.new_zeros(z.shape[1]), None, before, before)
    best = RIDGES[chosen]
    everything = torch.ones_like(fold, dtype=torch.bool)
    delta, bias = problem.in_inputs(problem.solved(best, everything, problem.none()))
    return Fit(delta, bias, best, before, means[chosen])


_Change = tuple[Tensor, Tensor]
"""Of the weight in the coordinates of `_Problem` (c, m), and of the bias (c,)."""


@dataclass(frozen=True)
class _Problem:
    """The fit in the coordinates of the inputs that occur, scaled so that the curvature is about the same in all.

    D lies in the span of the inputs, so that min(n, d) coordinates are enough.

    Attributes:
        Z: centred inputs in these coordinates (n, m). V: their directions (d, m), orthonormal.
        mean: of the inputs (d,). variances: of the coordinates (m,). v: the mean variance of an input.
    """

    Z: Tensor
    V: Tensor
    mean: Tensor
    variances: Tensor
    v: float
    z: Tensor
    targets: Targets
    with_bias: bool

    @classmethod
    def of(cls, X: Tensor, z: Tensor, targets: Targets, with_bias: bool) -> _Problem:
        share = targets.w / targets.w.sum()
        mean = share @ X if with_bias else torch.zeros_like(X[0])
        centred = X - mean
        weighted = centred * share.sqrt()[:, None]
        if X.shape[0] >= X.shape[1]:
            found, V = torch.linalg.eigh(weighted.mT @ weighted)
        else:
            found, U = torch.linalg.eigh(weighted @ weighted.mT)
            V = weighted.mT @ (U / found.clamp(min=torch.finfo(found.dtype).tiny).sqrt())
        kept = found > 1e-10 * found.max()
        V, v = V[:, kept], float(found.sum() / X.shape[1])
        return cls(centred @ V, V, mean, found[kept], v, z, targets, with_bias)

    def none(self) -> _Change:
        """No change."""
        return self.Z.new_zeros(self.z.shape[1], self.Z.shape[1]), self.Z.new_zeros(self.z.shape[1])

    def solved(self, ridge: float, rows: Tensor, near: _Change) -> _Change:
        """The change in coordinates of the fit to `rows`, searched from one that is near."""
        penalty = ridge * self.v
        scale = (self.targets.loss.curvature * self.variances + penalty).rsqrt()
        Z, z, y = self.Z[rows] * scale, self.z[rows], self.targets.y[rows]
        share = (self.targets.w[rows] / self.targets.w[rows].sum())[:, None]
        found = [near[0] / scale, near[1].clone()]
        parameters = [part.requires_grad_(True) for part in found[: 1 + self.with_bias]]
        search = torch.optim.LBFGS(
            parameters, max_iter=ROUNDS, tolerance_grad=0.0, tolerance_change=ENOUGH, line_search_fn="strong_wolfe"
        )

        @torch.no_grad()
        def objective() -> Tensor:
            out = z + Z @ found[0].mT + found[1]
            of_out = share * self.targets.loss.gradient(out, y)
            found[0].grad = of_out.mT @ Z + penalty * found[0] * scale.square()
            if self.with_bias:
                found[1].grad = of_out.sum(0)
            return (share[:, 0] * self.targets.loss.value(out, y)).sum() + 0.5 * penalty * (
                found[0] * scale
            ).square().sum()

        search.step(objective)  # type: ignore[arg-type]
        return found[0].detach() * scale, found[1].detach()

    def loss(self, change: _Change, rows: Tensor) -> float:
        """The mean loss of rows."""
        part = Targets(self.targets.loss, self.targets.y[rows], self.targets.w[rows])
        return mean_loss(part, self.z[rows] + self.Z[rows] @ change[0].mT + change[1])

    def in_inputs(self, change: _Change) -> tuple[Tensor, Tensor]:
        """The change of the layer's weight (c, d) and bias (c,)."""
        delta = change[0] @ self.V.mT
        return delta, change[1] - delta @ self.mean


def folds_of(batch: Sequence[int]) -> Tensor:
    """The fold of each row, by the number of its batch; of one batch, by the row."""
    numbers = torch.tensor(batch)
    if len(numbers.unique()) == 1:
        numbers = torch.arange(len(numbers))
    return numbers % FOLDS
