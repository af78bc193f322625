"""Symmetric matrices held by their blocks on and above the diagonal: little more than half of the numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def block_rows(d: int) -> int:
    """Rows of a block of a (d, d) matrix."""
    return max(128, -(-d // 8))


def held_numbers(d: int) -> int:
    """Count the numbers by which a symmetric (d, d) matrix is held."""
    step = block_rows(d)
    return sum(min(step, d - i) * (d - i) for i in range(0, d, step))


@dataclass(frozen=True)
class Symmetric:
    """A symmetric (d, d) matrix.

    Attributes:
        flat: its blocks of rows, each from the diagonal block on, one after another (n,). d: its rows.
    """

    flat: Tensor
    d: int

    @classmethod
    def of(cls, M: Tensor) -> Symmetric:
        """Copy the upper triangle of M (d, d)."""
        made = cls(M.new_empty(held_numbers(len(M))), len(M))
        for i, block in made._blocks():
            block.copy_(M[i : i + len(block), i:])
        return made

    def _blocks(self) -> list[tuple[int, Tensor]]:
        """The first row of each block, and the block (rows, d − first row), which may be edited."""
        found, start, step = [], 0, block_rows(self.d)
        for i in range(0, self.d, step):
            rows, columns = min(step, self.d - i), self.d - i
            found.append((i, self.flat[start : start + rows * columns].view(rows, columns)))
            start += rows * columns
        return found

    def add_(self, M: Tensor, weight: float = 1.0) -> Symmetric:
        """Add weight·M to it; returns itself."""
        for i, block in self._blocks():
            block.add_(M[i : i + len(block), i:], alpha=weight)
        return self

    def dense(self, device: torch.device | None = None) -> Tensor:
        """The matrix (d, d)."""
        M = self.flat.new_empty(self.d, self.d, device=device)
        for i, block in self._blocks():
            end = i + len(block)
            M[i:end, i:] = block
            M[end:, i:end] = M[i:end, end:].mT
        return M
