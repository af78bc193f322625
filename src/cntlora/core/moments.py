"""Second moments of the inputs of one batch, streamed, in the smaller of the two forms X Xᵀ and Xᵀ X.

Tensor layout: tokens arrive as rows (n, d); X of the paper is their transpose (d, b). While b ≤ d the rows are kept,
and the b×b dual Xᵀ X serves; beyond that only G = X Xᵀ (d×d) is held, so memory never exceeds d×d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linalg import default_rtol, eigh_descending, fix_signs, numerical_rank


@dataclass(frozen=True)
class Eigenpairs:
    """The part of G = P D Pᵀ that the tolerance keeps: `P` (d, n), `D` (n,) descending, signs fixed."""

    P: Tensor
    D: Tensor


class Moments:
    """Accumulates the tokens that one input sees in one batch.

    Args:
        dim: number of input features d.
        gram: "sum" for G = X Xᵀ as printed in the paper, "mean" for G / b.
        dtype: dtype of accumulation and of everything returned.
    """

    def __init__(self, dim: int, gram: str = "sum", dtype: torch.dtype = torch.float64) -> None:
        self.dim, self.kind, self.dtype = dim, gram, dtype
        self.tokens = 0
        self._rows: list[Tensor] = []
        self._gram: Tensor | None = None
        self._total: Tensor | None = None

    def empty(self) -> Moments:
        """A new one of the same kind."""
        return Moments(self.dim, self.kind, self.dtype)

    def update(self, rows: Tensor) -> None:
        """Adds `rows` (n, d), one row a token; any floating dtype, n may be 0. `rows` may be edited afterwards."""
        given, rows = rows, rows.to(self.dtype)
        self.tokens += rows.shape[0]
        self._add_total(rows.sum(dim=0))
        if self._gram is not None:
            self._gram.addmm_(rows.mT, rows)
            return
        if rows.shape[0] == 0:
            return
        self._rows.append(rows.clone() if rows is given else rows)
        if self.tokens > self.dim:
            kept = torch.cat(self._rows)
            self._gram = kept.mT @ kept
            self._rows = []

    def merge(self, other: Moments) -> None:
        """Adds what `other` has seen (a module called several times in one forward pass)."""
        if other._gram is None:
            for rows in other._rows:
                self.update(rows)
            return
        mine = self.gram_sum()
        self._gram = other._gram.clone() if mine is None else mine + other._gram
        self._rows = []
        self.tokens += other.tokens
        self._add_total(other.total())

    def _add_total(self, total: Tensor) -> None:
        self._total = total if self._total is None else self._total + total

    def total(self) -> Tensor:
        """Σ x (d,) over all tokens."""
        return torch.zeros(self.dim, dtype=self.dtype) if self._total is None else self._total

    def finite(self) -> bool:
        """Whether every token seen so far is free of NaN and Inf (and small enough to square)."""
        if self._gram is not None:
            return bool(torch.isfinite(self._gram.diagonal().sum()))
        return all(bool(torch.isfinite(rows.square().sum())) for rows in self._rows)

    @property
    def scale(self) -> float:
        """What X Xᵀ is multiplied with: 1, or 1/b for the mean."""
        return 1.0 / max(self.tokens, 1) if self.kind == "mean" else 1.0

    @property
    def rtol(self) -> float:
        """The default tolerance on the eigenvalues of G: max(d, b)·eps."""
        return default_rtol(self.dim, self.tokens, self.dtype)

    def gram_sum(self) -> Tensor | None:
        """X Xᵀ (d, d), whatever `gram` is; None before the first token."""
        if self._gram is not None or not self._rows:
            return self._gram
        rows = torch.cat(self._rows)
        return rows.mT @ rows

    def gram(self) -> Tensor:
        """G (d, d) = X Xᵀ, times 1/b if `gram="mean"`."""
        total = self.gram_sum()
        if total is None:
            raise ValueError("no token seen: G is undefined; check the attention mask of this batch")
        return total * self.scale

    def rows(self) -> Tensor | None:
        """√scale·Xᵀ (b, d) while b ≤ d, else None. `rowsᵀ·rows` is G."""
        if self._gram is not None or not self._rows:
            return None
        return torch.cat(self._rows) * self.scale**0.5

    def eigenpairs(self, rtol: float) -> Eigenpairs:
        """P and D of G = P D Pᵀ with D > rtol·max D, by the b×b dual where b ≤ d (P = X V D^(-½))."""
        rows = self.rows()
        if rows is None:
            D, P = eigh_descending(self.gram())
        else:
            D, V = eigh_descending(rows @ rows.mT)
        keep = rtol * D[0] < D
        D = D[keep]
        P = P[:, keep] if rows is None else (rows.mT @ V[:, keep]) / D.sqrt()
        return Eigenpairs(P * fix_signs(P), D)

    def numerical_rank(self, rtol: float) -> int:
        """Number of eigenvalues of G above rtol·λ_max: the directions that the data determine."""
        rows = self.rows()
        S = self.gram() if rows is None else rows @ rows.mT
        return numerical_rank(S, rtol)


class TokenCount:
    """Stands in for `Moments` where only the number of tokens is wanted (methods that read gradients)."""

    def __init__(self) -> None:
        self.tokens = 0
        self._finite = True

    def empty(self) -> TokenCount:
        """A new one."""
        return TokenCount()

    def update(self, rows: Tensor) -> None:
        """Counts `rows` (n, d)."""
        self.tokens += rows.shape[0]
        self._finite = self._finite and bool(torch.isfinite(rows).all())

    def merge(self, other: TokenCount) -> None:
        """Adds what `other` has counted."""
        self.tokens += other.tokens
        self._finite = self._finite and other.finite()

    def finite(self) -> bool:
        """Whether every token was free of NaN and Inf."""
        return self._finite
