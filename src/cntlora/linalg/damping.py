"""Second moments C = X Xᵀ / n with damping, C̃ = C + μ·I: factors and inverses, formed or by the rows of few tokens.

Layout: C (d, d), or Y (n, d) with C = Yᵀ·Y where there are fewer tokens than features; μ = damping·mean(diag C).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .low_rank import LowRank, Shifted, Term
from .pseudo_inverse import default_rtol, eigh_descending, triangular_inverse
from .truncated_svd import TOLERANCE


def shift_of(C: Tensor, damping: float) -> Tensor:
    """μ () = damping·mean(diag C)."""
    return damping * C.diagonal().mean()


def damped(C: Tensor, damping: float) -> Tensor:
    """C̃ = C + damping·mean(diag C)·I."""
    regular = C.clone()
    regular.diagonal().add_(shift_of(C, damping))
    return regular


def damped_inverse(C: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """C̃ = C + damping·mean(diag C)·I and its inverse.

    Raises:
        ValueError: if C̃ is singular.
    """
    regular = damped(C, damping)
    return regular, torch.cholesky_inverse(_cholesky(regular, damping))


def whitening(C: Tensor, damping: float) -> Tensor:
    """L⁻¹ (d, d) of C + damping·mean(diag C)·I = L Lᵀ: L⁻¹ X / √n has orthonormal rows, up to the damping.

    Raises:
        ValueError: if that matrix is singular.
    """
    return triangular_inverse(_cholesky(damped(C, damping), damping), upper=False)


def _cholesky(regular: Tensor, damping: float) -> Tensor:
    L, info = torch.linalg.cholesky_ex(regular)
    if int(info) != 0:
        raise ValueError(_singular(damping))
    return L


def _singular(damping: float) -> str:
    return (
        f"damping: C + {damping:g}·mean(diag C)·I is singular, so that it has no inverse; raise damping, or read more "
        "tokens"
    )


@dataclass(frozen=True)
class DampedRows:
    """C̃ = Yᵀ·Y + μ·I (d, d) of few rows Y (n, d): C̃^p = μ^p·I + Uᵀ·((s + μ)^p − μ^p)·U, which is never formed.

    Attributes:
        U: (m, d), orthonormal rows, the eigenvectors of Yᵀ·Y. s: (m,), its eigenvalues above their rounding.
        mu: μ, above zero.
    """

    U: Tensor
    s: Tensor
    mu: float

    def power(self, p: float) -> Shifted:
        """C̃^p."""
        return Shifted(self.mu**p, LowRank((Term(self.U, (self.s + self.mu) ** p - self.mu**p),)))

    def within(self, G: Tensor) -> tuple[Tensor, Tensor] | None:
        """N (k, m) and R (m, d) = (s + μ)^(−½)·U with G·C̃^(−½) = N·U and so G·C̃⁻¹ = N·R, for G (k, d) in the span of U.

        The gradient of a layer by its weight is: its rows are sums of the tokens that it saw.

        Returns:
            None where a part of G outside of U, which μ^(−½) magnifies, is more of the result than the tolerance of its
            triplets: by four random directions, whose images have the norm of that part within some tens of percent.
        """
        U, root = self.U.to(G), (self.s + self.mu).rsqrt().to(G)
        inside = G @ U.mT
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(G.shape[1], 4, generator=generator, dtype=torch.float64).to(G)
        outside = torch.linalg.matrix_norm(G @ drawn - inside @ (U @ drawn)) / (2 * self.mu**0.5)
        N = inside * root
        return (N, root[:, None] * U) if bool(outside <= TOLERANCE[G.dtype] * torch.linalg.matrix_norm(N)) else None


def damped_rows(Y: Tensor, damping: float) -> DampedRows:
    """Return C̃ by the eigenvectors of the dual Y·Yᵀ (n, n).

    Raises:
        ValueError: if C̃ is singular.
    """
    n, d = Y.shape
    s, V = eigh_descending(Y @ Y.mT)
    mu = damping * float(s.sum()) / d
    if not mu > 0:
        raise ValueError(_singular(damping))
    kept = s > default_rtol(n, d, s.dtype) * s[0]
    s, V = s[kept], V[:, kept]
    return DampedRows((V / s.sqrt()).mT @ Y, s, mu)
