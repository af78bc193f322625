"""The leading singular triplets of small matrices, alone or a stack of one shape, by a filtered subspace iteration.

Layout: M (…, k, d); `tall` (…, m, n) is M or Mᵀ with m ≥ n, and S = tallᵀ·tall (…, n, n) is formed.

A block of more columns than are wanted is multiplied with a Chebyshev polynomial of S that is small on the eigenvalues
below those of the block, and made orthonormal: a few such rounds find what power steps would take dozens for, which
matters where a spectrum is flat, as that of ΔW is. Source: Zhou and Saad 2006, "A Chebyshev–Davidson algorithm for
large symmetric eigenproblems". Here a polynomial of a block of fixed width, and a degree that the spread of each
spectrum bounds. Nothing waits for the device before the last check, and eigenvalues are those of small matrices.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

EXTRA = 16
"""Columns of the block beyond those that are wanted."""
ROUNDS, DEGREE = 4, 6
"""Filters, and the largest degree of one."""
SPREAD = 7.0
"""Digits by which a filter may spread the wanted directions: the last would drown in the rounding of the first beyond.
A smaller degree is taken for a spectrum that falls further."""
TOLERANCE = 1e-4
"""Residual of a triplet at which it counts as found: a third of that of the Krylov iteration, as a round costs little.
On layers of MiniLM and SmolLM2 B·A was then within 3e-4 of ‖ΔW‖."""
FREE_LOOKS = ("cpu",)
"""Types of devices on which a look at a number costs nothing: there the iteration ends as soon as it may."""
LOWEST = 0.05
"""Least upper end of what is filtered out, as a share of the last wanted eigenvalue of S."""


def filtered_triplets(M: Tensor, q: int, norm: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U (…, k, q), S (…, q), Vᵀ (…, q, d) of M (…, k, d) in float32, and whether they may be trusted (…).

    ‖Mᵀu_i − s_i v_i‖ ≤ tolerance·max(s_i, ‖M‖_F/√q) for each of them, as for `leading_triplets` with a norm: [M]_q is
    what counts. With a norm of 0 each triplet does. On a CPU there are fewer rounds where fewer do.

    Args:
        norm: ‖M‖_F, or 0 (…).
    """
    wide = M.shape[-2] < M.shape[-1]
    tall = M.mT if wide else M
    S = tall.mT @ tall
    Q = _orthonormal(tall.mT @ _start(tall, min(q + EXTRA, tall.shape[-1])))
    Q = _orthonormal(S @ Q)
    for left in reversed(range(ROUNDS + 1)):
        D, Q, images = _ritz(tall, Q)
        product = S @ Q
        values = D[..., :q].sqrt()
        tiny = torch.finfo(values.dtype).tiny
        residual = torch.linalg.vector_norm(product - Q * D[..., None, :].to(Q), dim=-2)[..., :q] / values.clamp_min(
            tiny
        )
        near = (residual / torch.maximum(values, norm[..., None].to(values) / q**0.5)).amax(dim=-1)
        trusted = (near <= TOLERANCE) & (values[..., -1] > 1e-5 * values[..., 0])
        if left == 0 or (M.device.type in FREE_LOOKS and left <= ROUNDS - 2 and bool(trusted.all())):
            break
        Q = _orthonormal(_filtered(S, Q, product, D, q))
    s = values.to(M.dtype)
    V, U = Q[..., :q], images[..., :q] / values.clamp_min(tiny)[..., None, :].to(M.dtype)
    return (V, s, U.mT, trusted) if wide else (U, s, V.mT, trusted)


def _filtered(S: Tensor, Q: Tensor, product: Tensor, D: Tensor, q: int) -> Tensor:
    """T_m((2·S − a)/a)·Q by its recurrence, a being the upper end of what is filtered out and m the degree of each.

    Args:
        product: S·Q. D: eigenvalues that go with the columns of Q, descending.
    """
    tiny = torch.finfo(D.dtype).tiny
    last = D[..., q - 1].clamp_min(tiny)
    half = (torch.maximum(D[..., -1], LOWEST * last) / 2)[..., None, None].to(Q.dtype).clamp_min(1e-30)
    spread = (D[..., 0] / last).log10().clamp_min(1e-3)
    degree = (SPREAD / spread).clamp(1, DEGREE).floor()[..., None, None]
    before, block = Q, product / half - Q
    for step in range(1, int(degree.amax()) if Q.device.type in FREE_LOOKS else DEGREE):
        after = (2.0 / half) * (S @ block) - 2.0 * block - before
        going = step < degree
        before, block = torch.where(going, block, before), torch.where(going, after, block)
    return block


def _ritz(tall: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (…, j) float64 of (tall·Q)ᵀ(tall·Q), descending, the basis turned to them and its images."""
    images = tall @ Q
    wide = images.double()
    D, V = torch.linalg.eigh(wide.mT @ wide)
    V = V.flip(-1).to(Q.dtype)
    return D.flip(-1).clamp_min(0.0), Q @ V, images @ V


def _orthonormal(Y: Tensor) -> Tensor:
    """An orthonormal basis of the columns by Cholesky–QR in float64, twice; zeros where there is none."""
    wide = Y.double()
    for _ in range(2):
        wide = wide / torch.linalg.vector_norm(wide, dim=-2, keepdim=True)
        L, info = torch.linalg.cholesky_ex(wide.mT @ wide)
        L = torch.where((info == 0)[..., None, None], L, torch.eye(L.shape[-1], dtype=L.dtype, device=L.device))
        wide = torch.linalg.solve_triangular(L, wide.mT, upper=False).mT
        found = (info == 0) & torch.isfinite(wide).all(dim=-1).all(dim=-1)
        wide = torch.where(found[..., None, None], wide, 0.0)
    return wide.to(Y.dtype)


def _start(tall: Tensor, block: int) -> Tensor:
    return _drawn(tall.shape[-2], block).to(device=tall.device, dtype=tall.dtype)


@lru_cache(maxsize=4)
def _drawn(rows: int, columns: int) -> Tensor:
    """A random block of a fixed seed, kept for the next matrix of this shape: it takes as long as a product."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
