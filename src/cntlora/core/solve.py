"""Eq. 18 as it streams: the sum over batches for every site, fed one batch and one input at a time.

Work that depends only on the inputs is done once for all sites that share them (q, k, v); their sums are one tensor
as long as their histories agree, so the memory is one (d, d) matrix an input and not one a site.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .constraints import combine, shift_constant, shift_inverse, shift_rtol
from .linalg import frobenius_condition, plain_inverse, tall_pinv
from .moments import Moments

WeightOf = Callable[[str], Tensor]
"""Site name → its weight W (k, d) in the dtype of computation, made on demand."""


class Estimator(Protocol):
    """Accumulates Σ_j w_j W_tar,j for every site."""

    def absorb(self, names: Sequence[str], X: Moments, weight: float) -> int:
        """Adds one batch that the sites `names` saw as `X`, times w_j; returns the numerical rank of G."""

    def delta(self, name: str, batches: int, initial: str) -> Tensor:
        """ΔW (k, d) of one site by eq. 18, `batches` being those in which it saw a token."""


class SharedSums:
    """One running sum a name; names whose sums have had the same terms hold the same tensor."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, names: Sequence[str], term: Tensor) -> None:
        """Adds `term` to each name's sum, once for all names that share it. Never edits a sum in place."""
        new: dict[int, Tensor] = {}
        for name in names:
            old = self._sums.get(name)
            if id(old) not in new:
                new[id(old)] = term if old is None else old + term
        self._sums.update({name: new[id(self._sums.get(name))] for name in names})

    def get(self, name: str) -> Tensor | None:
        """The sum of `name`, or None before the first term. Not to be edited."""
        return self._sums.get(name)


class MapEstimator:
    """Modes of the form W_tar = W·T (cross, self): sums T_j (d, d), whatever W is."""

    def __init__(self, weight_of: WeightOf, map: Callable[[Moments], tuple[Tensor, int]]) -> None:
        self.weight_of, self.map = weight_of, map
        self.sums = SharedSums()

    def absorb(self, names: Sequence[str], X: Moments, weight: float) -> int:
        T, rank = self.map(X)
        self.sums.add(names, weight * T)
        return rank

    def delta(self, name: str, batches: int, initial: str) -> Tensor:
        T = self.sums.get(name)
        assert T is not None, f"{name} saw no batch"
        W = self.weight_of(name)
        return combine(W, W @ T, batches, initial)


class ShiftEstimator:
    """Shift mode: W_tar = C (Wᵀ − G Wᵀ)†, C applied after the sum over batches.

    Where W has full column rank (k ≥ d) and I − G is invertible, (Wᵀ − G Wᵀ)† = (Wᵀ)† (I − G)⁻¹, so that one (d, d)
    sum serves every site with that input. Elsewhere the pseudo-inverse is taken per site and batch.

    Args:
        constant: C, a multiple of the identity or "gaussian".
        rtol: tolerance on the singular values of Wᵀ − G Wᵀ; None for max(d, k)·eps.
        seed: of the Gaussian C; every site draws its own, by its name.
    """

    def __init__(
        self, weight_of: WeightOf, constant: float | str = 1.0, rtol: float | None = None, seed: int = 0
    ) -> None:
        self.weight_of, self.constant, self.rtol, self.seed = weight_of, constant, rtol, seed
        self.shared, self.own = SharedSums(), SharedSums()
        self._weight_conditions: dict[str, float] = {}

    def absorb(self, names: Sequence[str], X: Moments, weight: float) -> int:
        G = X.gram()
        M = torch.eye(X.dim, dtype=G.dtype, device=G.device) - G
        resolvent = plain_inverse(M, shift_rtol(X.dim, X.dim, G.dtype, self.rtol))
        alone = list(names)
        if resolvent is not None:
            condition = frobenius_condition(M, resolvent)
            together = [name for name in names if self._may_share(name, condition)]
            alone = [name for name in names if name not in together]
            self.shared.add(together, weight * resolvent)
        for name in alone:
            self.own.add([name], weight * shift_inverse(self.weight_of(name), G, self.rtol))
        return X.numerical_rank(X.rtol if self.rtol is None else self.rtol)

    def _may_share(self, name: str, condition: float) -> bool:
        """Whether † of the product drops nothing for certain: cond(I − G)·cond(W)·rtol < 1."""
        W = self.weight_of(name)
        if name not in self._weight_conditions:
            inverse = tall_pinv(W, 0.0) if W.shape[0] >= W.shape[1] else None
            bound = float("inf") if inverse is None else frobenius_condition(W, inverse)
            self._weight_conditions[name] = bound
        return condition * self._weight_conditions[name] * shift_rtol(W.shape[0], W.shape[1], W.dtype, self.rtol) < 1.0

    def delta(self, name: str, batches: int, initial: str) -> Tensor:
        W = self.weight_of(name)
        total = self.own.get(name)
        resolvents = self.shared.get(name)
        if resolvents is not None:
            inverse = tall_pinv(W, 0.0)
            assert inverse is not None, "full column rank was checked when the batch came"
            part = inverse.mT @ resolvents
            total = part if total is None else total + part
        assert total is not None, f"{name} saw no batch"
        C = shift_constant(self.constant, W.shape[0], constant_generator(self.seed, name), W)
        return combine(W, C @ total if isinstance(C, Tensor) else C * total, batches, initial)


def constant_generator(seed: int, name: str) -> torch.Generator:
    """The stream of the Gaussian C of one site, by seed and site name alone."""
    # torch's CPU generator reads only the low 32 bits of its seed, so both must reach those
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
