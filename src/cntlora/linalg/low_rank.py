"""Matrices of low rank that are not formed: a sum over batches that has few directions, and W updated by one.

Where the batches have fewer tokens than a layer has features, T (d, d) of cross and self mode has as few directions as
there are tokens. Held by its rows it takes n·d numbers in place of d², and neither T nor W·T is ever formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

LARGE = 1024
"""Features of an input at which products with a (d, d) matrix begin to cost more than those with its rows."""


HALF = (torch.bfloat16, torch.float16)


def sums_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether `product_of_halves` takes tensors of this dtype there: PyTorch has it for CUDA from 2.8 on."""
    return dtype in HALF and device.type == "cuda" and _has_units(device)


@cache
def _has_units(device: torch.device) -> bool:
    known = "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None
    return known and torch.cuda.get_device_capability(device) >= (8, 0)


def product_of_halves(left: Tensor, right: Tensor) -> Tensor:
    """left·right (m, n) in float32 of matrices in half precision, by the matrix units of a GPU.

    The product of two numbers in half precision is exact in float32, so that only the sums round. On an H100 that is
    ten times as fast as a product of float32, which the library computes without TF32.
    """
    return torch.mm(left, right, out_dtype=torch.float32)


def symmetric_product(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """rowsᵀ·diag(weights)·rows (d, d) of (n, d) rows; if d is large by the blocks on and above the diagonal, which are
    two thirds of the work."""
    d = rows.shape[1]
    left = rows if weights is None else rows * weights[:, None]
    if d < 256 or rows.device.type != "cpu":
        return left.mT @ rows
    product, step = rows.new_empty(d, d), max(128, -(-d // 8))
    for i in range(0, d, step):
        product[i : i + step, i:] = left[:, i : i + step].mT @ rows[:, i:]
        product[i + step :, i : i + step] = product[i : i + step, i + step :].mT
    return product


class Term(NamedTuple):
    """A (d, d) matrix of rank n: rowsᵀ·diag(weights)·rows, or `rows` with zeros below where `weights` is None.

    Attributes:
        rows: (n, d), in half precision where matrix units multiply them. weights: (n,) or None; all alike of rows in
            half precision, which must not be rounded again.
    """

    rows: Tensor
    weights: Tensor | None

    def dense(self) -> Tensor:
        """The (d, d) matrix, in float32 at least; the rows themselves where they are all of it."""
        n, d = self.rows.shape
        if self.weights is not None:
            if sums_in_float32(self.rows.dtype, self.rows.device):
                return product_of_halves(self.rows.mT, self.rows).mul_(self.weights[0])
            return symmetric_product(self.rows, self.weights)
        return self.rows if n == d else torch.cat([self.rows, self.rows.new_zeros(d - n, d)])


@dataclass(frozen=True)
class LowRank:
    """A (d, d) matrix, the sum of a few `Term`s."""

    terms: tuple[Term, ...]

    @property
    def rank(self) -> int:
        """n, of all terms together."""
        return sum(len(term.rows) for term in self.terms)

    @property
    def pays(self) -> bool:
        """Return whether it is cheaper to hold and to multiply with than the (d, d) matrix."""
        d = self.terms[0].rows.shape[1]
        return d >= LARGE and 2 * self.rank <= d

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> LowRank:
        """The same in another dtype or on another device."""
        return LowRank(
            tuple(
                Term(term.rows.to(device, dtype), None if term.weights is None else term.weights.to(device, dtype))
                for term in self.terms
            )
        )

    def scaled(self, weight: float) -> LowRank:
        """Multiply it by a number."""
        if weight == 1.0:
            return self
        return LowRank(
            tuple(
                Term(t.rows * weight, None) if t.weights is None else Term(t.rows, t.weights * weight)
                for t in self.terms
            )
        )

    def plus(self, other: LowRank) -> LowRank:
        """The sum of two; of terms without weights, which stand above zeros, the rows are added."""
        both = self.terms + other.terms
        weighted = tuple(term for term in both if term.weights is not None)
        plain = sorted((term.rows for term in both if term.weights is None), key=len, reverse=True)
        if not plain:
            return LowRank(weighted)
        total = plain[0].clone() if len(plain) > 1 else plain[0]
        for rows in plain[1:]:
            total[: len(rows)] += rows
        return LowRank((*weighted, Term(total, None)))

    def dense(self) -> Tensor:
        """The (d, d) matrix; one term after another is formed, and added to the first."""
        first, *more = self.terms
        total = first.dense()
        total = total.clone() if more and first.weights is None else total
        for term in more:
            total.add_(term.dense())
        return total


def low_rank(rows: Tensor, weights: Tensor | None) -> LowRank | Tensor:
    """rowsᵀ·diag(weights)·rows, or `rows` with zeros below (`Term`): as its rows where that pays, else formed."""
    found = LowRank((Term(rows, weights),))
    return found if found.pays else found.dense()


@dataclass(frozen=True)
class Updated:
    """M = a·W + Y·R (k, d) with Y (k, n) and R (n, d), which is multiplied with thin blocks and never formed.

    Attributes:
        inner: ⟨W, Y·R⟩, for the norm.
    """

    a: float
    W: Tensor
    Y: Tensor
    R: Tensor
    inner: float

    @property
    def shape(self) -> torch.Size:
        return self.W.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.W.dtype

    @property
    def device(self) -> torch.device:
        return self.W.device

    @property
    def mT(self) -> Updated:
        return Updated(self.a, self.W.mT, self.R.mT, self.Y.mT, self.inner)

    def __matmul__(self, block: Tensor) -> Tensor:
        return torch.add(self.Y @ (self.R @ block), self.W @ block, alpha=self.a)

    def norm(self) -> float:
        """‖M‖_F, from ‖W‖, ⟨W, Y·R⟩ and the (n, n) products of Y and of R."""
        of_update = ((self.Y.mT @ self.Y) * (self.R @ self.R.mT)).sum(dtype=torch.float64)
        square = self.a**2 * float(torch.linalg.matrix_norm(self.W)) ** 2 + 2 * self.a * self.inner + float(of_update)
        return max(square, 0.0) ** 0.5  # rounding may go below zero

    def dense(self) -> Tensor:
        """The (k, d) matrix."""
        return torch.add(self.Y @ self.R, self.W, alpha=self.a)


def updated(a: float, W: Tensor, T: LowRank, share: float) -> Matrix:
    """a·W + share·W·T (k, d), formed where T has terms without weights: its norm alone would cost as much."""
    left, inner = [], 0.0
    forms = any(weights is None for _, weights in T.terms)
    for rows, weights in T.terms:
        product = W[:, : len(rows)] if weights is None else W @ rows.mT  # (k, n)
        left.append(product * share if weights is None else share * (product * weights))
        inner += 0.0 if forms else float((product * left[-1]).sum(dtype=torch.float64))
    Y, R = torch.cat(left, dim=1), torch.cat([term.rows for term in T.terms])
    return torch.addmm(W, Y, R, beta=a) if forms else Updated(a, W, Y, R, inner)


@dataclass(frozen=True)
class Shifted:
    """a·I + T (d, d) with T of low rank, which is multiplied with and never formed."""

    a: float
    T: LowRank

    def after(self, M: Tensor, scale: float = 1.0) -> Matrix:
        """scale·M·(a·I + T) of M (k, d)."""
        return updated(scale * self.a, M, self.T.to(M.dtype, M.device), scale)


def times(M: Tensor, right: Tensor | Shifted) -> Tensor:
    """M·right (k, d) of a thin M, in the precision of `right` where that is formed."""
    return formed(right.after(M)) if isinstance(right, Shifted) else M.to(right) @ right


def root_rows(T: LowRank, shift: Tensor | float = 0.0) -> Tensor:
    """Y (n, d) with Yᵀ·Y = T, where all terms have weights, none of them below zero; `shift` (d,) is taken off the rows
    before they are weighted."""
    return torch.cat([(rows - shift) * weights.sqrt()[:, None] for rows, weights in T.terms if weights is not None])


def has_root(T: LowRank) -> bool:
    """Return whether no weight is below zero."""
    return not bool(torch.cat([weights < 0 for _, weights in T.terms if weights is not None]).any())


Matrix = Tensor | Updated


def formed(M: Matrix) -> Tensor:
    """The matrix as a tensor."""
    return M.dense() if isinstance(M, Updated) else M


def frobenius(M: Matrix) -> float:
    """‖M‖_F."""
    return M.norm() if isinstance(M, Updated) else float(torch.linalg.matrix_norm(M))
