"""The leading singular triplets of a large matrix, by a block Krylov iteration with an error bound that is checked.

Of a (k, d) matrix only products with thin blocks are needed, in its own precision. The start is drawn from a generator
of a fixed seed, so that nothing in it is drawn anew. Source: Musco and Musco 2015, with full
reorthogonalisation and Rayleigh–Ritz on the whole Krylov space (Golub and Kahan's bidiagonalisation, in blocks).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pseudo_inverse import eigh_descending

TOLERANCE = {torch.float32: 3e-4, torch.float64: 1e-7}
"""Residual of a triplet, relative to its singular value, at which it counts as found, by the dtype of the matrix."""

POWERS = {"cuda": 8}
"""Steps of subspace iteration before the first look at the triplets, by device: products and thin QRs cost a GPU
little, and the small eigendecomposition of each look a lot; on a CPU it is the other way round."""


def leading_triplets(M: Tensor, q: int, tolerance: float | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
    """U (k, q), S (q,) and Vᵀ (q, d) of M (k, d), or None where they do not come out of a small Krylov space.

    Each triplet meets ‖Mᵀu_i − s_i v_i‖ ≤ tolerance·s_i (M v_i = s_i u_i holds to rounding), so that a singular value
    lies within tolerance·s_i of every s_i, and [M]_q is known up to the gap behind s_q.
    """
    tolerance = TOLERANCE[M.dtype] if tolerance is None else tolerance
    wide = M.shape[0] < M.shape[1]
    tall = M.mT if wide else M  # (m, n) with m ≥ n
    powers = POWERS.get(M.device.type, 0)
    block = min(2 * q + 16 if powers else q + 4, tall.shape[1])
    basis = torch.linalg.qr(_start(tall, block)).Q  # (n, j)
    for _ in range(powers):
        basis = torch.linalg.qr(tall.mT @ torch.linalg.qr(tall @ basis).Q).Q
    images = tall @ basis
    while True:
        S, W = _ritz(images, block)
        if float(S[q - 1]) <= 1e-5 * float(S[0]):
            return None  # nothing, or what rounding leaves of it, lies behind the first triplets
        U, V = (images @ W) / S.clamp_min(torch.finfo(M.dtype).tiny), basis @ W
        residuals = tall.mT @ U - V * S  # (n, block)
        norms = torch.linalg.vector_norm(residuals, dim=0)
        open_ = (norms > tolerance * S).tolist()
        if not any(open_[:q]):
            return (V[:, :q], S[:q], U[:, :q].mT) if wide else (U[:, :q], S[:q], V[:, :q].mT)
        # what has been found to rounding gives no new direction, only noise
        fresh = residuals[:, (norms > 4 * torch.finfo(M.dtype).eps * S[0]) & (norms > 0.1 * tolerance * S)]
        if fresh.shape[1] == 0 or basis.shape[1] + fresh.shape[1] > tall.shape[1] // 2:
            return None
        new = _orthogonal_to(basis, fresh)
        basis, images = torch.cat([basis, new], dim=1), torch.cat([images, tall @ new], dim=1)


def gram_triplets(M: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The same from the eigenvectors of the smaller Gram matrix, or None where squaring has cost too much.

    Squaring leaves a residual of about eps·(σ_1/σ_q)² of σ_q, which stays under the tolerance while σ_q ≥ 0.03·σ_1.
    """
    wide = M.shape[0] < M.shape[1]
    tall = M.mT if wide else M
    D, V = eigh_descending(tall.mT @ tall)
    if float(D[q - 1]) <= 0.03**2 * float(D[0]):
        return None
    S, V = D[:q].sqrt(), V[:, :q]
    U = (tall @ V) / S
    return (V, S, U.mT) if wide else (U, S, V.mT)


def _ritz(images: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first singular values (count,) and right singular vectors (j, count) of the images (m, j) of the basis.

    By their Gram matrix, in float64 so that squaring costs nothing.
    """
    wide = images.double()
    D, W = eigh_descending(wide.mT @ wide)
    return D[:count].sqrt().to(images), W[:, :count].to(images)


def _start(tall: Tensor, block: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(tall.shape[0], block, generator=generator, dtype=torch.float64)
    return tall.mT @ drawn.to(tall)


def _orthogonal_to(basis: Tensor, block: Tensor) -> Tensor:
    """An orthonormal basis of what `block` adds to `basis`; twice is enough."""
    block = block / torch.linalg.vector_norm(block, dim=0)
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
    return block
