"""What each method keeps of the data as it streams: sums over batches for every site, fed one input at a time.

Work that depends only on the inputs is done once for all sites that share them (q, k, v); their sums are one tensor
as long as their histories agree, so the memory is one (d, d) matrix an input and not one a site.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from .constraints import combine, shift_constant, shift_inverse, shift_rtol
from .linalg import default_rtol, frobenius_condition, plain_inverse, tall_pinv
from .moments import Moments
from .peers import Target

WeightOf = Callable[[str], Tensor]
"""Site name → its weight W (k, d) in the dtype of computation, made on demand."""


class Estimator(Protocol):
    """Accumulates what a method needs of the data, for every site."""

    def absorb(self, names: Sequence[str], X: Moments, weight: float) -> None:
        """Adds one batch that the sites `names` saw as `X`, times w_j."""

    def target(self, name: str, batches: int, initial: str) -> Target:
        """What one site's factors are made from, `batches` being those in which it saw a token."""

    def effective_rank(self, name: str) -> int | None:
        """Numerical rank of the inputs: the smallest over batches, or that of all; None where no input is read."""


class SmallestRank:
    """The smallest numerical rank of G over batches, per site."""

    def __init__(self) -> None:
        self._ranks: dict[str, int] = {}

    def note(self, names: Sequence[str], rank: int) -> None:
        """One batch."""
        self._ranks.update({name: min(rank, self._ranks.get(name, rank)) for name in names})

    def effective_rank(self, name: str) -> int | None:
        """See `Estimator`."""
        return self._ranks.get(name)


Term = TypeVar("Term", Tensor, "InputSums")


class SharedSums(Generic[Term]):
    """One running sum a name; names whose sums have had the same terms hold the same object."""

    def __init__(self) -> None:
        self._sums: dict[str, Term] = {}

    def add(self, names: Sequence[str], term: Term) -> None:
        """Adds `term` to each name's sum, once for all names that share it. Never edits a sum in place."""
        new: dict[int, Term] = {}
        for name in names:
            old = self._sums.get(name)
            if id(old) not in new:
                new[id(old)] = term if old is None else old + term
        self._sums.update({name: new[id(self._sums.get(name))] for name in names})

    def get(self, name: str) -> Term | None:
        """The sum of `name`, or None before the first term. Not to be edited."""
        return self._sums.get(name)


class MapEstimator(SmallestRank):
    """Modes of the form W_tar = W·T (cross, self): sums T_j (d, d), whatever W is."""

    def __init__(self, weight_of: WeightOf, map: Callable[[Moments], tuple[Tensor, int]]) -> None:
        super().__init__()
        self.weight_of, self.map = weight_of, map
        self.sums: SharedSums[Tensor] = SharedSums()

    def absorb(self, names: Sequence[str], X: Moments, weight: float) -> None:
        T, rank = self.map(X)
        self.sums.add(names, weight * T)
        self.note(names, rank)

    def target(self, name: str, batches: int, initial: str) -> Target:
        T = self.sums.get(name)
        assert T is not None, f"{name} saw no batch"
        W = self.weight_of(name)
        return Target(M=combine(W, W @ T, batches, initial), is_delta=True)


class ShiftEstimator(SmallestRank):
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
        super().__init__()
        self.weight_of, self.constant, self.rtol, self.seed = weight_of, constant, rtol, seed
        self.shared: SharedSums[Tensor] = SharedSums()
        self.own: SharedSums[Tensor] = SharedSums()
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
        self.note(names, X.numerical_rank(X.rtol if self.rtol is None else self.rtol))

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


class WeightEstimator:
    """Methods that read no data: a target of W alone, or of nothing (LoRA)."""

    def __init__(self, weight_of: WeightOf, make: Callable[[Tensor], Target] | None) -> None:
        self.weight_of, self.make = weight_of, make

    def absorb(self, names: Sequence[str], X: Moments, weight: float) -> None:
        raise AssertionError("no data is read for this method")

    def target(self, name: str, batches: int, initial: str) -> Target:
        return Target() if self.make is None else self.make(self.weight_of(name))

    def effective_rank(self, name: str) -> int | None:
        return None


@dataclass
class InputSums:
    """Of all tokens that one group of sites saw: X Xᵀ (d, d), Σ x (d,), and n, each batch times its w_j."""

    gram: Tensor
    total: Tensor
    tokens: float

    def __add__(self, other: InputSums) -> InputSums:
        return InputSums(self.gram + other.gram, self.total + other.total, self.tokens + other.tokens)


class InputEstimator:
    """Methods of the second moment of all inputs together (CorDA, EVA).

    Args:
        make: site name and sums → its target, and the eigenvalues of the moment where they are known.
    """

    def __init__(self, make: Callable[[str, InputSums], tuple[Target, Tensor | None]]) -> None:
        self.make = make
        self.sums: SharedSums[InputSums] = SharedSums()
        self._ranks: dict[int, int] = {}  # sites with the same input share their sums, and its rank

    def absorb(self, names: Sequence[str], X: Moments, weight: float) -> None:
        gram = X.gram_sum()
        assert gram is not None, "a batch without tokens is not absorbed"
        self.sums.add(names, InputSums(weight * gram, weight * X.total(), weight * X.tokens))

    def target(self, name: str, batches: int, initial: str) -> Target:
        sums = self.sums.get(name)
        assert sums is not None, f"{name} saw no batch"
        if sums.tokens <= 0:
            raise ValueError(f"batch_weights: expected a sum over all tokens above 0, got {sums.tokens:g}")
        target, D = self.make(name, sums)
        if id(sums) not in self._ranks:
            D = torch.linalg.eigvalsh(sums.gram) if D is None else D
            rtol = default_rtol(sums.gram.shape[0], int(sums.tokens), sums.gram.dtype)
            self._ranks[id(sums)] = int((rtol * D.max() < D).sum())
        return target

    def effective_rank(self, name: str) -> int | None:
        return self._ranks.get(id(self.sums.get(name)))


class GradientEstimator:
    """Methods of the gradient of the loss by W, its mean over batches (LoRA-GA, LoRA-One)."""

    def __init__(self, make: Callable[[Tensor], Target]) -> None:
        self.make = make
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, G: Tensor, weight: float) -> None:
        """Adds ∂L/∂W (k, d) of one batch, times w_j."""
        term = weight * G.to(torch.promote_types(G.dtype, torch.float32))
        self._sums[name] = self._sums[name] + term if name in self._sums else term

    def absorb(self, names: Sequence[str], X: Moments, weight: float) -> None:
        pass  # the inputs are only counted

    def has_gradient(self, name: str) -> bool:
        """Whether a gradient other than zero has come."""
        return name in self._sums and bool(self._sums[name].any())

    def target(self, name: str, batches: int, initial: str) -> Target:
        return self.make(self._sums[name].double() / batches)

    def effective_rank(self, name: str) -> int | None:
        return None


def site_generator(seed: int, name: str) -> torch.Generator:
    """The random stream of one site, by seed and site name alone."""
    # torch's CPU generator reads only the low 32 bits of its seed, so both must reach those
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
