"""Symmetric matrices held by one triangle: half of the numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def held_numbers(d: int) -> int:
    """Count the numbers by which a symmetric (d, d) matrix is held."""
    return d * (d + 1) // 2


@dataclass(frozen=True)
class Symmetric:
    """A symmetric (d, d) matrix, of which what lies on and above the diagonal is held.

    With its first n = ⌈d/2⌉ rows and the rest it has four blocks, M_11, M_12 and M_22. M_12 is held as it is. The upper
    triangle of M_11 and, transposed, that of M_22 fill one rectangle: LAPACK's rectangular full packed format.

    Attributes:
        flat: the rectangle, then M_12 (d·(d + 1)/2,). d: its rows.
    """

    flat: Tensor
    d: int

    @classmethod
    def of(cls, M: Tensor) -> Symmetric:
        """Copy the upper triangle of M (d, d)."""
        return cls(M.new_zeros(held_numbers(len(M))), len(M)).add_(M)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views: those places where the triangles of M_11 (n, n) and of M_22, transposed, lie, and M_12."""
        n = -(-self.d // 2)
        rest = self.d - n
        pair, corner = self.flat[: (rest + 1) * n].view(rest + 1, n), self.flat[(rest + 1) * n :].view(n, rest)
        return pair[:n], pair[1:, :rest], corner

    def add_(self, M: Tensor, weight: float = 1.0) -> Symmetric:
        """Add weight·M to it; returns itself."""
        first, second, corner = self._parts()
        n = len(first)
        first.add_(M[:n, :n].triu(), alpha=weight)
        second.add_(M[n:, n:].triu().mT, alpha=weight)
        corner.add_(M[:n, n:], alpha=weight)
        return self

    def dense(self, device: torch.device | None = None) -> Tensor:
        """The matrix (d, d)."""
        first, second, corner = self._parts()
        n = len(first)
        M = self.flat.new_empty(self.d, self.d, device=device)
        M[:n, :n] = first.triu() + first.triu(1).mT
        M[n:, n:] = second.tril() + second.tril(-1).mT
        M[:n, n:] = corner
        M[n:, :n] = M[:n, n:].mT
        return M
