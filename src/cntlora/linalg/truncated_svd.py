"""The leading singular triplets of a large matrix, by a block Krylov iteration with an error bound that is checked.

Of a (k, d) matrix only products with thin blocks are needed, in its own precision. The start is drawn from a generator
of a fixed seed, so that nothing in it is drawn anew. Source: Musco and Musco 2015, with full
reorthogonalisation and Rayleigh–Ritz on the whole Krylov space. The matrix of the Rayleigh–Ritz step grows with the
space, and residuals come out of the recurrence (Golub and Underwood 1977), so that a look at them costs no product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .low_rank import Matrix

TOLERANCE = {torch.float32: 3e-4, torch.float64: 1e-7}
"""Residual of a triplet, relative to its singular value, at which it counts as found, by the dtype of the matrix."""

FIRST_LOOK = {"cuda": 6}
"""Steps before the first look at the triplets, by device; 2 elsewhere: a GPU must be waited for at each look."""

CHOLESKY_QR = ("cuda",)
"""Types of devices on which blocks are made orthonormal by a Cholesky factor: a QR takes column after column there."""


def leading_triplets(
    M: Matrix, q: int, tolerance: float | None = None, norm: float | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """U (k, q), S (q,) and Vᵀ (q, d) of M (k, d), or None where they do not come out of a small Krylov space.

    Each triplet meets ‖Mᵀu_i − s_i v_i‖ ≤ tolerance·s_i (M v_i = s_i u_i holds to rounding), so that a singular value
    lies within tolerance·s_i of every s_i, and [M]_q is known up to the gap behind s_q.

    Args:
        norm: ‖M‖_F, where [M]_q is what counts, and not each direction: ‖Mᵀu_i − s_i v_i‖ ≤ tolerance·‖M‖_F/√q will
            do where that is larger. Then the residuals together are at most tolerance·‖M‖_F, also of a flat spectrum.
    """
    tolerance = TOLERANCE[M.dtype] if tolerance is None else tolerance
    wide = M.shape[0] < M.shape[1]
    tall = M.mT if wide else M  # (m, n) with m ≥ n
    space = _Krylov(tall, _width(tall.shape[1], q))
    least = 0.0 if norm is None else norm / q**0.5
    look = FIRST_LOOK.get(M.device.type, 2)
    while True:
        residual = space.residual()
        if space.steps >= look:
            D, W = _leading_eigenpairs(space.gram, q)
            S = D.sqrt()
            norms = torch.linalg.vector_norm(residual @ W[-residual.shape[1] :], dim=0) / S
            last, first, near = torch.stack([S[-1], S[0], (norms / S.clamp_min(least)).amax()]).tolist()
            if last <= 1e-5 * first:
                return None  # nothing, or what rounding leaves of it, lies behind the first triplets
            if near <= tolerance:
                V, U = space.basis @ W.to(M.dtype), ((space.images @ W) / S).to(M.dtype)
                return (V, S.to(M.dtype), U.mT) if wide else (U, S.to(M.dtype), V.mT)
            look = space.steps + 1 + space.steps // 4
        if not space.grow():
            return None


def _width(n: int, q: int) -> int:
    """Columns of a block: products like wide ones, and a space of half of n dimensions should hold many."""
    return min(max(q + 4, min(2 * q, q + 16, n // 32)), n)


class _Krylov:
    """The space of Ω, MᵀM Ω, (MᵀM)² Ω, … for a random block Ω, orthonormal, and its images.

    Attributes:
        basis: (n, j), orthonormal. images: M·basis (m, j), float64, so that squaring them costs nothing.
        gram: imagesᵀ·images (j, j), float64. steps: blocks so far.
    """

    def __init__(self, tall: Matrix, block: int) -> None:
        self.tall, self.steps = tall, 1
        self.basis = _thin_qr(_thin_qr(_start(tall, block))[0])[0]
        self._next, self._last = self.basis, tall @ self.basis
        self.images = self._last.double()
        self.gram = self.images.mT @ self.images

    def residual(self) -> Tensor:
        """R (block, block) float64 of MᵀM·basis = basis·gram + next·[0 … 0 R], next being orthonormal to `basis`."""
        block, R = self.tall.mT @ self._last, None
        for _ in range(3):  # a third time for blocks that are nothing but rounding, once all directions are found
            block, factor = _thin_qr(block - self.basis @ (self.basis.mT @ block))
            R = factor.double() if R is None else factor.double() @ R
        self._next = block
        assert R is not None
        return R

    def grow(self) -> bool:
        """Take the next block into the space; False where it would take more than two thirds of all dimensions."""
        if self.basis.shape[1] + self._next.shape[1] > 2 * self.tall.shape[1] // 3:
            return False
        self._last = self.tall @ self._next
        wide = self._last.double()
        self.basis, self.images = torch.cat([self.basis, self._next], 1), torch.cat([self.images, wide], 1)
        column, j = self.images.mT @ wide, self.gram.shape[0]
        self.gram = torch.cat([torch.cat([self.gram, column[:j]], 1), torch.cat([column[:j].mT, column[j:]], 1)])
        self.steps += 1
        return True


def _thin_qr(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Q (n, j), near to orthonormal, and R (j, j) of Y = Q·R.

    Of a block whose columns are nearly dependent a Cholesky factor gives a Q that is orthonormal once this has been
    done twice (Fukaya et al. 2020, "Shifted Cholesky QR for computing the QR factorization of ill-conditioned
    matrices").
    """
    if Y.device.type not in CHOLESKY_QR:
        Q, R = torch.linalg.qr(Y)
        return Q, R
    wide = Y.double()
    size = torch.linalg.vector_norm(wide, dim=0).clamp_min(torch.finfo(Y.dtype).tiny)
    wide = wide / size
    gram = wide.mT @ wide
    gram.diagonal().add_(len(gram) * 1e-14)  # above the rounding of the products, so that there is a factor
    L, _ = torch.linalg.cholesky_ex(gram)
    Q = torch.linalg.solve_triangular(L, wide.mT, upper=False).mT
    return Q.to(Y.dtype), (L.mT * size).to(Y.dtype)


def gram_triplets(M: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The same from the eigenvectors of the smaller Gram matrix, or None where squaring has cost too much.

    Squaring leaves a residual of about eps·(σ_1/σ_q)² of σ_q, which stays under the tolerance while σ_q ≥ 0.03·σ_1.
    """
    wide = M.shape[0] < M.shape[1]
    tall = M.mT if wide else M
    D, V = _leading_eigenpairs(tall.mT @ tall, q)
    if float(D[-1]) <= 0.03**2 * float(D[0]):
        return None
    S = D.sqrt()
    U = (tall @ V) / S
    return (V, S, U.mT) if wide else (U, S, V.mT)


def _leading_eigenpairs(S: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """The q largest eigenvalues (q,), descending and not below zero, and their eigenvectors (n, q), of S (n, n)."""
    values, vectors = torch.linalg.eigh(S)
    return values[-q:].flip(0).clamp_min(0.0), vectors[:, -q:].flip(1)


def _start(tall: Matrix, block: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(tall.shape[0], block, generator=generator, dtype=torch.float64)
    return tall.mT @ drawn.to(device=tall.device, dtype=tall.dtype)
