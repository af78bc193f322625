"""Estimators that several methods share: sums over batches for every site, fed one input at a time.

Work that depends only on the inputs is done once for all sites that share them (q, k, v); their sums are one tensor
as long as their histories agree, so the memory is one (d, d) matrix an input and not one a site.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..linalg.low_rank import LowRank, Matrix, has_root, root_rows, symmetric_product, updated
from ..linalg.moments import Moments
from ..linalg.pseudo_inverse import default_rtol, numerical_rank, rank_with_gap, rounding_noise
from ..linalg.sums import SharedSums
from .estimator import Contribution
from .facts import Facts
from .method import WeightOf
from .target import Target

Map = Callable[[Moments], tuple[Tensor | LowRank, int]]
QuickMap = Callable[[Moments], tuple[Tensor | LowRank, Tensor, int]]


def combine(W: Tensor, W_tar_sum: Tensor, batches: int, initial: str = "pretrained") -> Tensor:
    """ΔW = W_est − W with eq. 18, W_est = (W_0 + Σ_j w_j W_tar,j) / (B + 1).

    Args:
        W: pretrained weight (k, d).
        W_tar_sum: Σ_j w_j W_tar,j (k, d).
        batches: B, the number of batches that contributed.
        initial: W_0, "pretrained" for W (the paper's default) or "zero".

    The paper says that W_est is "subtracted from W_src"; its own definition W_tar = W + ΔW gives W_est − W, which
    is what this returns.
    """
    W_0 = W if initial == "pretrained" else torch.zeros_like(W)
    return (W_0 + W_tar_sum) / (batches + 1) - W


def combine_map(W: Tensor, T: Tensor | LowRank, batches: int, initial: str = "pretrained") -> Matrix:
    """`combine` where W_tar,j = W·T_j: ΔW from Σ_j w_j T_j (d, d), which is not formed where it is held by its rows."""
    if isinstance(T, Tensor):
        return combine(W, W @ T.to(W), batches, initial)
    share = 1.0 / (batches + 1)
    return updated((share if initial == "pretrained" else 0.0) - 1.0, W, T.to(W.dtype, W.device), share)


class MapEstimator:
    """Modes of the form W_tar = W·T (cross, self): sums T_j (d, d), whatever W is, in the precision of the inputs.

    Args:
        map: T (d, d) and the rank of G.
        quick: T, whether it holds, and the rank: tried first, where there is one.
        rtol: the tolerance of † (), where it follows from the inputs; None where it is given.
        initial_weight: W_0 of eq. 18.
        single: whether float32 will do for X Xᵀ of inputs of float32.
        solved_in: the dtype in which `map` finds eigenpairs of G; None for that of the sums.
    """

    totals = unit = early = False

    def __init__(
        self,
        weight_of: WeightOf,
        map: Map,
        quick: QuickMap | None = None,
        rtol: Callable[[Moments], Tensor] | None = None,
        initial_weight: str = "pretrained",
        single: bool = False,
        solved_in: torch.dtype | None = None,
    ) -> None:
        self.initial_weight, self.single, self.solved_in = initial_weight, single, solved_in
        self.weight_of, self.map, self.quick, self.rtol = weight_of, map, quick, rtol
        self.sums = SharedSums()
        self.accumulated: tuple[SharedSums, ...] = (self.sums,)
        self.facts = Facts()
        self._failed: set[str] = set()  # sites where `quick` did not hold: it would not in the next batch either

    def prepare(self, names: Sequence[str], X: Moments) -> tuple[Any, Tensor | None]:
        if self.quick is None or names[0] in self._failed:
            return None, None
        T, holds, rank = self.quick(X)
        return (T, rank), holds.double()[None]

    def asks_pairs(self, numbers: Sequence[float]) -> bool:
        return not (numbers and numbers[0])

    def finish(self, names: Sequence[str], X: Moments, prepared: Any, numbers: Sequence[float]) -> Contribution:
        if not self.asks_pairs(numbers):
            T, rank = prepared
        else:
            self._failed.update(names)
            del prepared  # as large as what is made now
            T, rank = self.map(X)
        return Contribution(
            shared=T.to(dtype=X.seen_dtype), rank=rank, rtol=None if self.rtol is None else self.rtol(X)
        )

    def add(self, names: Sequence[str], contribution: Contribution, weight: float) -> None:
        assert contribution.shared is not None and contribution.rank is not None
        self.sums.add(names, contribution.shared, weight)
        self.facts.add(names, rank=contribution.rank, rtol=contribution.rtol)

    def target(self, name: str, batches: int) -> Target:
        T = self.sums.held(name)
        assert T is not None, f"{name} saw no batch"
        return Target(M=combine_map(self.weight_of(name), T, batches, self.initial_weight), is_delta=True)


class WeightEstimator:
    """Methods that read no data: a target of W alone, or of nothing (LoRA)."""

    def __init__(self, weight_of: WeightOf, make: Callable[[Tensor], Target] | None = None) -> None:
        self.weight_of, self.make = weight_of, make
        self.accumulated: tuple[SharedSums, ...] = ()
        self.facts = Facts()

    def target(self, name: str, batches: int) -> Target:
        return Target() if self.make is None else self.make(self.weight_of(name))


Shared = TypeVar("Shared")
COUNTED = 1024
"""Most features of an input whose rank is counted: for the report alone, the three factorisations of a larger one take
longer than all else that is done with it."""


class InputEstimator(Generic[Shared]):
    """Methods of the second moment of all inputs together (CorDA, EVA).

    Per input X Xᵀ is summed, and a tensor (2, d) of Σ x and a row that starts with n, each batch times its w_j. Where a
    large layer sees few tokens, X Xᵀ is held by these.

    Args:
        share: X Xᵀ (d, d), Σ x (d,), n → what does not depend on W, once for neighbours that share their input.
        make: site name, batches in which it saw a token, and that → its target; None where `made` is another.
        totals: whether Σ x is wanted; else it is zero.
        by_rows: whether `share` takes X Xᵀ as a `LowRank` too, all weights of which are above zero.
        single: whether float32 will do for X Xᵀ of inputs of float32: leading directions are wanted, or it is damped.
    """

    unit, early, solved_in = False, True, None

    def __init__(
        self,
        share: Callable[[Any, Tensor, float], Shared],
        make: Callable[[str, int, Shared], Target] | None,
        totals: bool = False,
        by_rows: bool = False,
        single: bool = False,
    ) -> None:
        self.share, self.make, self.totals, self.by_rows, self.single = share, make, totals, by_rows, single
        self.sums, self.counts = SharedSums(symmetric=True), SharedSums()
        self.accumulated: tuple[SharedSums, ...] = (self.sums, self.counts)
        self.facts = Facts()
        self._last: tuple[str, Shared, int | None] | None = None  # one only: sites with the same input are neighbours
        self._lock = Lock()

    def prepare(self, names: Sequence[str], X: Moments) -> tuple[Any, Tensor | None]:
        total = X.total() if self.totals else torch.zeros(X.dim, dtype=X.dtype, device=X.device)
        count = torch.zeros_like(total)
        count[:1].fill_(X.tokens)  # and not count[0] = …, for which a GPU waits
        return (X.second_moment(), torch.stack([total, count])), None

    def asks_pairs(self, numbers: Sequence[float]) -> bool:
        return False

    def finish(self, names: Sequence[str], X: Moments, prepared: Any, numbers: Sequence[float]) -> Contribution:
        return Contribution(shared=prepared[0], counts=prepared[1], precision=X.precision)

    def add(self, names: Sequence[str], contribution: Contribution, weight: float) -> None:
        assert contribution.shared is not None and contribution.counts is not None
        self.sums.add(names, contribution.shared, weight)
        self.counts.add(names, contribution.counts, weight)
        self.facts.add(names, precision=contribution.precision)

    def target(self, name: str, batches: int) -> Target:
        with self._lock:  # neighbours may be made side by side
            if self._last is None or not self.sums.same(self._last[0], name):
                self._last = None  # its room is free for the next
                self._last = name, *self._shared(name)
            _, shared, rank = self._last
            if rank is not None:
                self.facts[name].effective_rank = rank
        return self.made(name, batches, shared)

    def made(self, name: str, batches: int, shared: Shared) -> Target:
        """The target of a site. A method, so that no estimator is held by itself, its sums after it is given up."""
        assert self.make is not None
        return self.make(name, batches, shared)

    def _shared(self, name: str) -> tuple[Shared, int | None]:
        gram, counts, precision = self.sums.held(name), self.counts.get(name), self.facts[name].precision
        assert gram is not None and counts is not None and precision is not None, f"{name} saw no batch"
        total, tokens = counts.double()[0], float(counts[1, 0])
        if tokens <= 0:
            raise ValueError(f"batch_weights: expected a sum over all tokens above 0, got {tokens:g}")
        if isinstance(gram, LowRank) and not (self.by_rows and has_root(gram)):
            gram = gram.dense()
        rank = self._rank(gram, total.numel(), precision, int(tokens))
        single = self.factors_in_single(total.numel()) and isinstance(gram, Tensor)
        wide = gram if single else gram.to(torch.float64)
        del gram  # as large as what is made of it
        return self.share(wide, total, tokens), rank

    def factors_in_single(self, d: int) -> bool:
        """Return whether X Xᵀ (d, d) is factored in float32, where that is its precision."""
        return False

    def _rank(self, gram: Tensor | LowRank, d: int, precision: torch.dtype, tokens: int) -> int | None:
        """The numerical rank of X Xᵀ, for the report; None where it would cost too much."""
        if (gram.shape[0] if isinstance(gram, Tensor) else gram.rank) > COUNTED:
            return None
        smaller = gram if isinstance(gram, Tensor) else symmetric_product(root_rows(gram).mT)  # of the same rank
        rtol, noise = default_rtol(d, tokens, smaller.dtype), rounding_noise(precision, d, tokens)
        rounded = self.single and torch.finfo(smaller.dtype).eps >= torch.finfo(precision).eps
        return (rank_with_gap if rounded else numerical_rank)(smaller, rtol, noise)


class GradientSums:
    """∂L/∂W of every site, summed over batches (a `GradientReader`)."""

    def __init__(self) -> None:
        self.gradients = SharedSums()

    def add_gradient(self, name: str, G: Tensor, weight: float) -> None:
        """Add ∂L/∂W (k, d) of one batch, times w_j; it may become the sum, and is not to be used afterwards."""
        first = name not in self.gradients  # which others, of half precision, are added to as they are
        self.gradients.add([name], G.to(torch.promote_types(G.dtype, torch.float32)) if first else G, weight)

    def has_gradient(self, name: str) -> bool:
        """Return whether a gradient other than zero has come."""
        total = self.gradients.get(name)
        return total is not None and bool(total.any())

    def slope(self, name: str, B: Tensor, A: Tensor) -> Tensor:
        """Σ_j w_j ⟨∂L_j/∂W, B·A⟩ () without the product: the slope of the losses along B (k, r) A (r, d)."""
        total = self.gradients.get(name)
        assert total is not None, f"{name} has no gradient"
        return (B.to(total) * (total @ A.to(total).mT)).sum(dtype=torch.float64)

    def mean_gradient(self, name: str, batches: int) -> Tensor:
        """The mean of ∂L/∂W (k, d) over so many batches."""
        total = self.gradients.get(name)
        assert total is not None, f"{name} has no gradient"
        return total / batches


class OutputGradientSums:
    """Σ over tokens of (∂ℓ/∂y)² of every site, summed over batches (for an `OutputGradientReader`)."""

    def __init__(self) -> None:
        self.squares = SharedSums()

    def add_output_gradient(self, name: str, squares: Tensor, weight: float) -> None:
        """Add the sum (k,) of one batch, times w_j."""
        self.squares.add([name], squares, weight)

    def mean_square(self, name: str, tokens: float) -> Tensor:
        """The mean (k,) over so many tokens."""
        total = self.squares.get(name)
        if total is None:
            raise ValueError(
                f"site {name}: its weight has a gradient, and what its layer gives has none (is the weight used "
                "without a call of the layer?); take a method that reads no output gradients"
            )
        return total / tokens


class GradientEstimator(GradientSums):
    """Methods of the gradient of the loss by W, its mean over batches (LoRA-GA, LoRA-One)."""

    def __init__(self, make: Callable[[Tensor], Target]) -> None:
        super().__init__()
        self.make = make
        self.accumulated: tuple[SharedSums, ...] = (self.gradients,)
        self.facts = Facts()

    def target(self, name: str, batches: int) -> Target:
        return self.make(self.mean_gradient(name, batches))
