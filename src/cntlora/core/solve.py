"""What each method keeps of the data as it streams: sums over batches for every site, fed one input at a time.

Work that depends only on the inputs is done once for all sites that share them (q, k, v); their sums are one tensor
as long as their histories agree, so the memory is one (d, d) matrix an input and not one a site.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from .constraints import combine, shift_constant, shift_inverse, shift_rtol
from .linalg import default_rtol, frobenius_condition, numerical_rank, plain_inverse, tall_pinv
from .moments import Moments
from .peers import Target

WeightOf = Callable[[str], Tensor]
"""Site name → its weight W (k, d) in the dtype of computation, made on demand."""


class Estimator(Protocol):
    """Accumulates what a method needs of the data, for every site.

    Attributes:
        accumulated: all that has been summed; several processes add theirs up.
        ranks: site → smallest numerical rank of G over batches, where that is noted batch by batch.
    """

    accumulated: tuple[SharedSums, ...]
    ranks: dict[str, int]

    def absorb(self, names: Sequence[str], X: Moments, weight: float) -> None:
        """Adds one batch that the sites `names` saw as `X`, times w_j."""

    def target(self, name: str, batches: int, initial: str) -> Target:
        """What one site's factors are made from, `batches` being those in which it saw a token."""

    def effective_rank(self, name: str) -> int | None:
        """Numerical rank of the inputs: the smallest over batches, or that of all; None where no input is read."""


def note_rank(ranks: dict[str, int], names: Sequence[str], rank: int) -> None:
    """Keeps the smallest numerical rank of G over batches, per site."""
    ranks.update({name: min(rank, ranks.get(name, rank)) for name in names})


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

    def groups(self) -> list[tuple[list[str], Tensor]]:
        """The distinct sums, each with the names that hold it."""
        found: dict[int, tuple[list[str], Tensor]] = {}
        for name, total in self._sums.items():
            found.setdefault(id(total), ([], total))[0].append(name)
        return list(found.values())

    def put(self, names: Sequence[str], total: Tensor) -> None:
        """Replaces the sum of all `names` by one."""
        self._sums.update(dict.fromkeys(names, total))


class MapEstimator:
    """Modes of the form W_tar = W·T (cross, self): sums T_j (d, d), whatever W is."""

    def __init__(self, weight_of: WeightOf, map: Callable[[Moments], tuple[Tensor, int]]) -> None:
        self.weight_of, self.map = weight_of, map
        self.sums = SharedSums()
        self.accumulated: tuple[SharedSums, ...] = (self.sums,)
        self.ranks: dict[str, int] = {}

    def absorb(self, names: Sequence[str], X: Moments, weight: float) -> None:
        T, rank = self.map(X)
        self.sums.add(names, weight * T)
        note_rank(self.ranks, names, rank)

    def target(self, name: str, batches: int, initial: str) -> Target:
        T = self.sums.get(name)
        assert T is not None, f"{name} saw no batch"
        W = self.weight_of(name)
        return Target(M=combine(W, W @ T, batches, initial), is_delta=True)

    def effective_rank(self, name: str) -> int | None:
        return self.ranks.get(name)


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
        self.accumulated: tuple[SharedSums, ...] = (self.shared, self.own)
        self.ranks: dict[str, int] = {}
        self._weight_conditions: dict[str, float] = {}

    def absorb(self, names: Sequence[str], X: Moments, weight: float) -> None:
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
        note_rank(self.ranks, names, X.numerical_rank(X.rtol if self.rtol is None else self.rtol))

    def _may_share(self, name: str, condition: float) -> bool:
        """Whether † of the product drops nothing for certain: cond(I − G)·cond(W)·rtol < 1."""
        W = self.weight_of(name)
        if name not in self._weight_conditions:
            inverse = tall_pinv(W, 0.0) if W.shape[0] >= W.shape[1] else None
            bound = float("inf") if inverse is None else frobenius_condition(W, inverse)
            self._weight_conditions[name] = bound
        return condition * self._weight_conditions[name] * shift_rtol(W.shape[0], W.shape[1], W.dtype, self.rtol) < 1.0

    def target(self, name: str, batches: int, initial: str) -> Target:
        W = self.weight_of(name)
        total = self.own.get(name)
        resolvents = self.shared.get(name)
        if resolvents is not None:
            inverse = tall_pinv(W, 0.0)
            assert inverse is not None, "full column rank was checked when the batch came"
            part = inverse.mT @ resolvents
            total = part if total is None else total + part
        assert total is not None, f"{name} saw no batch"
        C = shift_constant(self.constant, W.shape[0], site_generator(self.seed, name), W)
        W_tar_sum = C @ total if isinstance(C, Tensor) else C * total
        return Target(M=combine(W, W_tar_sum, batches, initial), is_delta=True)

    def effective_rank(self, name: str) -> int | None:
        return self.ranks.get(name)


class WeightEstimator:
    """Methods that read no data: a target of W alone, or of nothing (LoRA)."""

    def __init__(self, weight_of: WeightOf, make: Callable[[Tensor], Target] | None) -> None:
        self.weight_of, self.make = weight_of, make
        self.accumulated: tuple[SharedSums, ...] = ()
        self.ranks: dict[str, int] = {}

    def absorb(self, names: Sequence[str], X: Moments, weight: float) -> None:
        raise AssertionError("no data is read for this method")

    def target(self, name: str, batches: int, initial: str) -> Target:
        return Target() if self.make is None else self.make(self.weight_of(name))

    def effective_rank(self, name: str) -> int | None:
        return None


Shared = TypeVar("Shared")


class InputEstimator(Generic[Shared]):
    """Methods of the second moment of all inputs together (CorDA, EVA).

    Per input one tensor (d + 2, d) is summed, each batch times its w_j: X Xᵀ, Σ x, and a row that starts with n.

    Args:
        prepare: X Xᵀ (d, d), Σ x (d,), n → what does not depend on W, once for neighbours that share their input.
        finish: site name and that → its target.
    """

    def __init__(
        self, prepare: Callable[[Tensor, Tensor, float], Shared], finish: Callable[[str, Shared], Target]
    ) -> None:
        self.prepare, self.finish = prepare, finish
        self.sums = SharedSums()
        self.accumulated: tuple[SharedSums, ...] = (self.sums,)
        self.ranks: dict[str, int] = {}
        self._last: tuple[Tensor, Shared, int] | None = None  # one only: sites with the same input are neighbours

    def absorb(self, names: Sequence[str], X: Moments, weight: float) -> None:
        gram = X.gram_sum()
        assert gram is not None, "a batch without tokens is not absorbed"
        count = gram.new_zeros(X.dim)
        count[0] = X.tokens
        self.sums.add(names, weight * torch.cat([gram, X.total()[None], count[None]]))

    def target(self, name: str, batches: int, initial: str) -> Target:
        packed = self.sums.get(name)
        assert packed is not None, f"{name} saw no batch"
        if self._last is None or self._last[0] is not packed:
            gram, total, tokens = packed[:-2], packed[-2], float(packed[-1, 0])
            if tokens <= 0:
                raise ValueError(f"batch_weights: expected a sum over all tokens above 0, got {tokens:g}")
            rtol = default_rtol(gram.shape[0], int(tokens), gram.dtype)
            self._last = packed, self.prepare(gram, total, tokens), numerical_rank(gram, rtol)
        _, shared, self.ranks[name] = self._last
        return self.finish(name, shared)

    def effective_rank(self, name: str) -> int | None:
        return self.ranks.get(name)


class GradientEstimator:
    """Methods of the gradient of the loss by W, its mean over batches (LoRA-GA, LoRA-One)."""

    def __init__(self, make: Callable[[Tensor], Target]) -> None:
        self.make = make
        self.sums = SharedSums()
        self.accumulated: tuple[SharedSums, ...] = (self.sums,)
        self.ranks: dict[str, int] = {}

    def add(self, name: str, G: Tensor, weight: float) -> None:
        """Adds ∂L/∂W (k, d) of one batch, times w_j."""
        self.sums.add([name], weight * G.to(torch.promote_types(G.dtype, torch.float32)))

    def absorb(self, names: Sequence[str], X: Moments, weight: float) -> None:
        pass  # the inputs are only counted

    def has_gradient(self, name: str) -> bool:
        """Whether a gradient other than zero has come."""
        total = self.sums.get(name)
        return total is not None and bool(total.any())

    def target(self, name: str, batches: int, initial: str) -> Target:
        total = self.sums.get(name)
        assert total is not None, f"{name} has no gradient"
        return self.make(total.double() / batches)

    def effective_rank(self, name: str) -> int | None:
        return None


def site_generator(seed: int, name: str) -> torch.Generator:
    """The random stream of one site, by seed and site name alone."""
    # torch's CPU generator reads only the low 32 bits of its seed, so both must reach those
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
