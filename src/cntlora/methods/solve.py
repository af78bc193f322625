"""What each method keeps of the data as it streams: sums over batches for every site, fed one input at a time.

Work that depends only on the inputs is done once for all sites that share them (q, k, v); their sums are one tensor
as long as their histories agree, so the memory is one (d, d) matrix an input and not one a site.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..linalg.moments import Moments
from ..linalg.pseudo_inverse import (
    column_condition,
    default_rtol,
    full_rank,
    numerical_rank,
    rounding_noise,
    tall_pinv,
)
from ..linalg.sums import SharedSums
from .constraints import combine, shift_constant, shift_inverse, shift_resolvent, shift_rtol
from .estimator import Digest, Noted
from .peers import Target

WeightOf = Callable[[str], Tensor]
"""Site name → its weight W (k, d), float32 or float64, made on demand."""

Map = Callable[[Moments], tuple[Tensor, int]]
QuickMap = Callable[[Moments], tuple[Tensor, Tensor, int]]


class MapEstimator:
    """Modes of the form W_tar = W·T (cross, self): sums T_j (d, d), whatever W is, in the precision of the inputs.

    Args:
        map: T (d, d) and the rank of G.
        quick: T, whether it holds, and the rank: tried first, where there is one.
        rtol: the tolerance of † (), where it follows from the inputs; None where it is given.
    """

    totals = False

    def __init__(
        self,
        weight_of: WeightOf,
        map: Map,
        quick: QuickMap | None = None,
        rtol: Callable[[Moments], Tensor] | None = None,
    ) -> None:
        self.weight_of, self.map, self.quick, self.rtol = weight_of, map, quick, rtol
        self.sums = SharedSums()
        self.accumulated: tuple[SharedSums, ...] = (self.sums,)
        self.noted = Noted()
        self._failed: set[str] = set()  # sites where `quick` did not hold: it would not in the next batch either

    def prepare(self, names: Sequence[str], X: Moments) -> tuple[Any, Tensor | None]:
        if self.quick is None or names[0] in self._failed:
            return None, None
        T, holds, rank = self.quick(X)
        return (T, rank), holds.double()[None]

    def finish(self, names: Sequence[str], X: Moments, prepared: Any, numbers: Sequence[float]) -> Digest:
        if prepared is not None and numbers[0]:
            T, rank = prepared
        else:
            self._failed.update(names)
            del prepared  # as large as what is made now
            T, rank = self.map(X)
        return Digest(shared=T.to(X.seen_dtype), rank=rank, rtol=None if self.rtol is None else self.rtol(X))

    def add(self, names: Sequence[str], digest: Digest, weight: float) -> None:
        assert digest.shared is not None and digest.rank is not None
        self.sums.add(names, digest.shared, weight)
        self.noted.add(names, digest)

    def target(self, name: str, batches: int, initial: str) -> Target:
        T = self.sums.get(name)
        assert T is not None, f"{name} saw no batch"
        W = self.weight_of(name)
        return Target(M=combine(W, W @ T.to(W), batches, initial), is_delta=True)

    def effective_rank(self, name: str) -> int | None:
        return self.noted.ranks.get(name)


class ShiftEstimator:
    """Shift mode: W_tar = C (Wᵀ − G Wᵀ)†, C applied after the sum over batches.

    Where W has full column rank (k ≥ d) and I − G is invertible, (Wᵀ − G Wᵀ)† = (Wᵀ)† (I − G)⁻¹, so that one (d, d)
    sum serves every site with that input. Elsewhere the pseudo-inverse is taken per site and batch.

    Args:
        constant: C, a multiple of the identity or "gaussian".
        rtol: tolerance on the singular values of Wᵀ − G Wᵀ; None and 0 for max(d, k)·eps.
        seed: of the Gaussian C; every site draws its own, by its name.

    Attributes:
        weight_facts: site → shape of its W and its condition number by columns, infinite where k < d.
    """

    totals = False

    def __init__(
        self, weight_of: WeightOf, constant: float | str = 1.0, rtol: float | None = None, seed: int = 0
    ) -> None:
        self.weight_of, self.constant, self.rtol, self.seed = weight_of, constant, rtol or None, seed
        self.shared, self.own = SharedSums(), SharedSums()
        self.accumulated: tuple[SharedSums, ...] = (self.shared, self.own)
        self.noted = Noted()
        self.weight_facts: dict[str, tuple[tuple[int, ...], float]] = {}

    def prepare(self, names: Sequence[str], X: Moments) -> tuple[Any, Tensor | None]:
        resolvent, holds, condition, S = shift_resolvent(X, shift_rtol(X.dim, X.dim, X.dtype, self.rtol))
        full = full_rank(S, self._rank_rtol(X))
        eps = torch.full_like(condition, torch.finfo(X.dtype).eps)
        return resolvent, torch.stack([holds.double(), condition.double(), full.double(), eps.double()])

    def finish(self, names: Sequence[str], X: Moments, prepared: Any, numbers: Sequence[float]) -> Digest:
        full = numbers[2]
        apart = self.asks_weight(names, numbers)
        together = tuple(name for name in names if name not in apart)
        own = {n: shift_inverse(self.weight_of(n).to(X.dtype), X.gram(), self.rtol) for n in apart}
        rank = min(X.tokens, X.dim) if full else X.numerical_rank(self._rank_rtol(X))
        return Digest(shared=prepared if together else None, sharing=together, own=own, rank=rank)

    def add(self, names: Sequence[str], digest: Digest, weight: float) -> None:
        if digest.shared is not None:
            self.shared.add(digest.sharing or names, digest.shared, weight)
        for name, term in digest.own.items():
            self.own.add([name], term, weight)
        assert digest.rank is not None
        self.noted.add(names, digest)

    def _rank_rtol(self, X: Moments) -> float:
        return self.rtol or X.rtol

    def asks_weight(self, names: Sequence[str], numbers: Sequence[float]) -> tuple[str, ...]:
        """Those of `names` that cannot share a sum, so that `finish` needs their W."""
        holds, condition, _, eps = numbers
        return tuple(name for name in names if not (holds and self._may_share(name, condition, eps)))

    def note_weight(self, name: str) -> None:
        """Stores what W of a site decides, if it is not known yet."""
        if name not in self.weight_facts:
            W = self.weight_of(name).double()
            self.weight_facts[name] = (tuple(W.shape), column_condition(W) if W.shape[0] >= W.shape[1] else math.inf)

    def _may_share(self, name: str, condition: float, eps: float) -> bool:
        """Whether † of the product drops nothing for certain: cond(I − G)·cond(W)·rtol < 1."""
        self.note_weight(name)
        (k, d), of_weight = self.weight_facts[name]
        return condition * of_weight * (self.rtol or max(k, d) * eps) < 1.0

    def target(self, name: str, batches: int, initial: str) -> Target:
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
        return Target(M=combine(W, W_tar_sum, batches, initial).to(stored), is_delta=True)

    def effective_rank(self, name: str) -> int | None:
        return self.noted.ranks.get(name)


def _left_divided(W: Tensor, S: Tensor) -> Tensor:
    """(Wᵀ)† S (k, d) of W (k, d) of full column rank, which was checked when the batches came."""
    S = S.to(W)
    if W.shape[0] == W.shape[1]:
        return torch.linalg.solve(W.mT, S)
    inverse = tall_pinv(W, 0.0)
    assert inverse is not None, "its columns are independent"
    return inverse.mT @ S


class WeightEstimator:
    """Methods that read no data: a target of W alone, or of nothing (LoRA)."""

    def __init__(self, weight_of: WeightOf, make: Callable[[Tensor], Target] | None) -> None:
        self.weight_of, self.make = weight_of, make
        self.accumulated: tuple[SharedSums, ...] = ()
        self.noted = Noted()

    def target(self, name: str, batches: int, initial: str) -> Target:
        return Target() if self.make is None else self.make(self.weight_of(name))

    def effective_rank(self, name: str) -> int | None:
        return None


Shared = TypeVar("Shared")
COUNTED = 4096
"""Most features of an input of deficient rank whose rank is counted: eigenvalues for the report alone would cost more
than all else that EVA and CorDA do."""


class InputEstimator(Generic[Shared]):
    """Methods of the second moment of all inputs together (CorDA, EVA).

    Per input one tensor (d + 2, d) is summed, each batch times its w_j: X Xᵀ, Σ x, and a row that starts with n.

    Args:
        share: X Xᵀ (d, d), Σ x (d,), n → what does not depend on W, once for neighbours that share their input.
        make: site name, batches in which it saw a token, and that → its target.
        totals: whether Σ x is wanted; else it is zero.
    """

    def __init__(
        self,
        share: Callable[[Tensor, Tensor, float], Shared],
        make: Callable[[str, int, Shared], Target],
        totals: bool = False,
    ) -> None:
        self.share, self.make, self.totals = share, make, totals
        self.sums = SharedSums()
        self.accumulated: tuple[SharedSums, ...] = (self.sums,)
        self.noted = Noted()
        self._last: tuple[str, Shared, int | None] | None = None  # one only: sites with the same input are neighbours
        self._lock = Lock()

    def prepare(self, names: Sequence[str], X: Moments) -> tuple[Any, Tensor | None]:
        gram = X.gram_sum()
        assert gram is not None, "a batch without tokens is not absorbed"
        count = gram.new_zeros(X.dim)
        count[:1].fill_(X.tokens)  # and not count[0] = …, for which a GPU waits
        total = X.total() if self.totals else gram.new_zeros(X.dim)
        return torch.cat([gram, total[None], count[None]]), None

    def finish(self, names: Sequence[str], X: Moments, prepared: Any, numbers: Sequence[float]) -> Digest:
        return Digest(shared=prepared, precision=X.precision)

    def add(self, names: Sequence[str], digest: Digest, weight: float) -> None:
        assert digest.shared is not None
        self.sums.add(names, digest.shared, weight)
        self.noted.add(names, digest)

    def target(self, name: str, batches: int, initial: str) -> Target:
        packed = self.sums.get(name)
        assert packed is not None, f"{name} saw no batch"
        with self._lock:  # neighbours may be made side by side
            if self._last is None or not self.sums.same(self._last[0], name):
                self._last = name, *self._shared(packed, self.noted.precisions[name])
            _, shared, rank = self._last
            if rank is not None:
                self.noted.ranks[name] = rank
        return self.make(name, batches, shared)

    def _shared(self, packed: Tensor, precision: torch.dtype) -> tuple[Shared, int | None]:
        gram, total, tokens = packed[:-2], packed[-2], float(packed[-1, 0])
        if tokens <= 0:
            raise ValueError(f"batch_weights: expected a sum over all tokens above 0, got {tokens:g}")
        rtol = default_rtol(gram.shape[0], int(tokens), gram.dtype)
        noise = rounding_noise(precision, gram.shape[0], int(tokens))
        counted = gram.shape[0] <= COUNTED or bool(full_rank(gram, max(rtol, noise**2)))
        rank = numerical_rank(gram, rtol, noise) if counted else None
        return self.share(gram.double(), total.double(), tokens), rank

    def effective_rank(self, name: str) -> int | None:
        return self.noted.ranks.get(name)


class GradientSums:
    """∂L/∂W of every site, summed over batches (a `GradientReader`)."""

    def __init__(self) -> None:
        self.gradients = SharedSums()

    def add_gradient(self, name: str, G: Tensor, weight: float) -> None:
        """Adds ∂L/∂W (k, d) of one batch, times w_j."""
        self.gradients.add([name], G.to(torch.promote_types(G.dtype, torch.float32), copy=True), weight)

    def has_gradient(self, name: str) -> bool:
        """Whether a gradient other than zero has come."""
        total = self.gradients.get(name)
        return total is not None and bool(total.any())

    def slope(self, name: str, B: Tensor, A: Tensor) -> float:
        """Σ_j w_j ⟨∂L_j/∂W, B·A⟩ without the product: how the losses change along B (k, r) A (r, d), to first order."""
        total = self.gradients.get(name)
        assert total is not None, f"{name} has no gradient"
        return float((B.to(total) * (total @ A.to(total).mT)).sum(dtype=torch.float64))

    def mean_gradient(self, name: str, batches: int) -> Tensor:
        """The mean of ∂L/∂W (k, d) over so many batches."""
        total = self.gradients.get(name)
        assert total is not None, f"{name} has no gradient"
        return total / batches


class GradientEstimator(GradientSums):
    """Methods of the gradient of the loss by W, its mean over batches (LoRA-GA, LoRA-One)."""

    def __init__(self, make: Callable[[Tensor], Target]) -> None:
        super().__init__()
        self.make = make
        self.accumulated: tuple[SharedSums, ...] = (self.gradients,)
        self.noted = Noted()

    def target(self, name: str, batches: int, initial: str) -> Target:
        return self.make(self.mean_gradient(name, batches))

    def effective_rank(self, name: str) -> int | None:
        return None


def site_generator(seed: int, name: str) -> torch.Generator:
    """The random stream of one site, by seed and site name alone."""
    # torch's CPU generator reads only the low 32 bits of its seed, so both must reach those
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
