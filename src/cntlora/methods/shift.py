"""Shift mode (Das et al. 2025, eq. 17): output covariances that differ by a constant.

Layout: W (k, d), X (d, b), G = X Xᵀ (d, d). W stands inside the pseudo-inverse; sites with the same input share
(I − G)⁻¹ where they may.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..linalg.moments import Moments
from ..linalg.pseudo_inverse import column_condition, default_rtol, full_rank, pinv, tall_pinv
from ..linalg.sums import SharedSums
from .estimator import Contribution, Estimator
from .factors import product_factors, site_generator
from .facts import Facts
from .method import Method, Range, Settings, WeightOf
from .statistics import combine
from .target import SiteTarget, Target


@dataclass(frozen=True, kw_only=True)
class Shift(Method):
    """ΔW = W_est − W with W_tar = C (Wᵀ − G Wᵀ)† (eq. 17), averaged over batches by eq. 18.

    Attributes:
        decomposition: "svd", "qr" as printed in the paper, or "qr_pivoted" (column pivoting, reveals the rank).
        p: share of the singular values that goes to A (B gets 1 − p), in [0, 1]. SVD only.
        strength: scaling·B·A = strength·[ΔW]_r, whatever alpha, r and rsLoRA say; 2 is the α = 2r of the paper's runs.
        rtol: singular values at or under rtol·σ_max are dropped by †; at less than 1e-3 ΔW is huge (tweets_tolerance).
            0 for max(d, b)·eps of the statistics' dtype, as NumPy has it, as printed in the paper.
        gram: G as the "sum" over tokens (the paper) or the "mean".
        shift_constant: C, a multiple of the identity, or "gaussian".
        batch_weights: w_j of eq. 18, one a batch; None for 1 each.
        initial_weight: W_0 of eq. 18, "pretrained" or "zero".
    """

    name = "shift"
    summary = "output covariances differ by a constant"
    source = "Das et al. 2025, eq. 17"
    reads = "inputs"
    site_sums = True
    ranges: ClassVar[Mapping[str, Range]] = {"shift_constant": (-math.inf, math.inf, "1 is the identity")}

    decomposition: Literal["svd", "qr", "qr_pivoted"] = "svd"
    p: float = 0.5
    strength: float = 2.0
    rtol: float = 1e-3
    gram: Literal["sum", "mean"] = "sum"
    shift_constant: float | str = 1.0
    batch_weights: tuple[float, ...] | None = None
    initial_weight: Literal["pretrained", "zero"] = "pretrained"

    def estimator(self, weight_of: WeightOf, settings: Settings) -> Estimator:
        return ShiftEstimator(weight_of, self.shift_constant, self.rtol, settings.seed, self.initial_weight)

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        return product_factors(site, self.decomposition, self.p)

    def rtol_at(self, k: int, d: int, tokens: int) -> float | None:
        return shift_rtol(k, d, torch.float64, self.rtol)


class ShiftEstimator:
    """Shift mode: W_tar = C (Wᵀ − G Wᵀ)†, C applied after the sum over batches.

    Where W has full column rank (k ≥ d) and I − G is invertible, (Wᵀ − G Wᵀ)† = (Wᵀ)† (I − G)⁻¹, so that one (d, d)
    sum serves every site with that input. Elsewhere the pseudo-inverse is taken per site and batch.

    Args:
        constant: C, a multiple of the identity or "gaussian".
        rtol: tolerance on the singular values of Wᵀ − G Wᵀ; None and 0 for max(d, k)·eps.
        seed: of the Gaussian C; every site draws its own, by its name.
        initial_weight: W_0 of eq. 18.

    Attributes:
        weight_facts: site → shape of its W and its condition number by columns, infinite where k < d.
    """

    totals = single = unit = early = False
    solved_in = None

    def __init__(
        self,
        weight_of: WeightOf,
        constant: float | str = 1.0,
        rtol: float | None = None,
        seed: int = 0,
        initial_weight: str = "pretrained",
    ) -> None:
        self.initial_weight = initial_weight
        self.weight_of, self.constant, self.rtol, self.seed = weight_of, constant, rtol or None, seed
        self.shared, self.own = SharedSums(), SharedSums()
        self.accumulated: tuple[SharedSums, ...] = (self.shared, self.own)
        self.facts = Facts()
        self.weight_facts: dict[str, tuple[tuple[int, ...], float]] = {}

    def prepare(self, names: Sequence[str], X: Moments) -> tuple[Any, Tensor | None]:
        resolvent, holds, condition, S = shift_resolvent(X, shift_rtol(X.dim, X.dim, X.dtype, self.rtol))
        full = full_rank(S, self._rank_rtol(X))
        eps = torch.full_like(condition, torch.finfo(X.dtype).eps)
        return resolvent, torch.stack([holds.double(), condition.double(), full.double(), eps.double()])

    def asks_pairs(self, numbers: Sequence[float]) -> bool:
        return False

    def finish(self, names: Sequence[str], X: Moments, prepared: Any, numbers: Sequence[float]) -> Contribution:
        full = numbers[2]
        apart = self.asks_weight(names, numbers)
        together = tuple(name for name in names if name not in apart)
        own = {n: shift_inverse(self.weight_of(n).to(X.dtype), X.gram(), self.rtol) for n in apart}
        rank = min(X.tokens, X.dim) if full else X.numerical_rank(self._rank_rtol(X))
        return Contribution(shared=prepared if together else None, sharing=together, own=own, rank=rank)

    def add(self, names: Sequence[str], contribution: Contribution, weight: float) -> None:
        if contribution.shared is not None:
            self.shared.add(contribution.sharing or names, contribution.shared, weight)
        for name, term in contribution.own.items():
            self.own.add([name], term, weight)
        assert contribution.rank is not None
        self.facts.add(names, rank=contribution.rank)

    def _rank_rtol(self, X: Moments) -> float:
        return self.rtol or X.rtol

    def asks_weight(self, names: Sequence[str], numbers: Sequence[float]) -> tuple[str, ...]:
        """Those of `names` that cannot share a sum, so that `finish` needs their W."""
        holds, condition, _, eps = numbers
        return tuple(name for name in names if not (holds and self._may_share(name, condition, eps)))

    def note_weight(self, name: str) -> None:
        """Store what W of a site decides, if it is not known yet."""
        if name not in self.weight_facts:
            W = self.weight_of(name).double()
            self.weight_facts[name] = (tuple(W.shape), column_condition(W) if W.shape[0] >= W.shape[1] else math.inf)

    def _may_share(self, name: str, condition: float, eps: float) -> bool:
        """Return whether † of the product drops nothing for certain: cond(I − G)·cond(W)·rtol < 1."""
        self.note_weight(name)
        (k, d), of_weight = self.weight_facts[name]
        return condition * of_weight * (self.rtol or max(k, d) * eps) < 1.0

    def target(self, name: str, batches: int) -> Target:
        stored = self.weight_of(name)
        W = stored.double()
        own, resolvents = self.own.get(name), self.shared.get(name)
        parts = [] if own is None else [own.to(W)]
        if resolvents is not None:
            parts.append(_left_divided(W, resolvents))
        assert parts, f"{name} saw no batch"
        total = sum(parts[1:], start=parts[0])
        C = shift_constant(self.constant, W.shape[0], site_generator(self.seed, name), W)
        W_tar_sum = C @ total if isinstance(C, Tensor) else C * total
        return Target(M=combine(W, W_tar_sum, batches, self.initial_weight).to(stored), is_delta=True)


def _left_divided(W: Tensor, S: Tensor) -> Tensor:
    """(Wᵀ)† S (k, d) of W (k, d) of full column rank, which was checked when the batches came."""
    S = S.to(W)
    if W.shape[0] == W.shape[1]:
        return torch.linalg.solve(W.mT, S)
    inverse = tall_pinv(W, 0.0)
    assert inverse is not None, "its columns are independent"
    return inverse.mT @ S


def shift_inverse(W: Tensor, G: Tensor, rtol: float | None = None) -> Tensor:
    """(Wᵀ − G Wᵀ)† (k, d) of eq. 17, W_tar = C (Wᵀ − G Wᵀ)†.

    From W_tar Wᵀ − W_tar G Wᵀ = C (eq. 16). The default tolerance, and 0, is max(d, k)·eps on the singular values.
    """
    return pinv(W.mT - G @ W.mT, rtol or None)


def shift_resolvent(X: Moments, rtol: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(I − G)⁻¹ (d, d), with which (Wᵀ − G Wᵀ)† = (Wᵀ)† (I − G)⁻¹ where † drops nothing.

    Where b ≤ d from a b×b inverse, (I − X Xᵀ)⁻¹ = I + X (I − Xᵀ X)⁻¹ Xᵀ; nothing is read back from the device.

    Returns:
        The inverse, whether it holds () with this tolerance, ‖I − G‖_F·‖(I − G)⁻¹‖_F (), above its condition, and the
        matrix that it was made from, whose rank is that of G: Xᵀ X (b, b) where b ≤ d, else G.
    """
    rows = X.rows()
    S = X.gram() if rows is None else rows @ rows.mT
    K = torch.eye(S.shape[0], dtype=S.dtype, device=S.device) - S
    inverse, info = torch.linalg.inv_ex(K)
    ones = X.dim - S.shape[0]  # eigenvalues of I − G that are 1, outside the span of X
    squares = [torch.linalg.matrix_norm(matrix).square() + ones for matrix in (K, inverse)]
    condition = (squares[0] * squares[1]).sqrt()
    holds = (info == 0) & (condition * rtol < 1.0)
    if rows is not None:
        inverse = rows.mT @ (inverse @ rows)
        inverse.diagonal().add_(1.0)
    return inverse, holds, condition, S


def shift_constant(C: float | str, k: int, generator: torch.Generator, like: Tensor) -> Tensor | float:
    """C of eq. 14: c for c·identity, or a (k, k) matrix of standard normal entries for "gaussian"."""
    if C == "gaussian":
        draws = torch.randn(k, k, generator=generator, dtype=torch.float64)
        return draws.to(device=like.device, dtype=like.dtype)
    return float(C)


def shift_rtol(k: int, d: int, dtype: torch.dtype, rtol: float | None) -> float:
    """The tolerance that `shift_inverse` applies to a (d, k) matrix."""
    return rtol or default_rtol(d, k, dtype)
