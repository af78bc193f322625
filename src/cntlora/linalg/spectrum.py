"""The leading singular triplets of ΔW (k, d), or of the inputs, each by the cheapest way that is exact enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .filtered_svd import filtered_triplets
from .low_rank import Matrix, formed, frobenius
from .parallel import read_back
from .pseudo_inverse import eigh_descending, fix_signs
from .truncated_svd import TOLERANCE, gram_triplets, leading_triplets

EXACT_BELOW = 256
"""Up to so many rows or columns all singular values are computed; beyond, the leading ones alone."""
GRAM_BELOW = 640
"""Up to so many rows or columns one eigendecomposition in float32 is cheaper than the iteration."""
FILTERED = ("cuda",)
"""Types of devices on which larger matrices are tried by the filtered iteration too: it never waits, and its small
eigendecompositions do not grow as those of the Krylov space do."""


@dataclass(frozen=True)
class Spectrum:
    """ΔW = U S Vᵀ: singular values `S` descending, all or the first, and the first q triplets `U` (k, q), `Vh` (q, d).

    Attributes:
        norm: ‖ΔW‖_F; None where `S` are all the singular values.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    norm: float | None = None

    @property
    def triplets(self) -> int:
        """q, the number of singular vectors held."""
        return self.U.shape[1]

    @property
    def frobenius(self) -> float:
        """‖ΔW‖_F = (Σ s²)^½ over all singular values."""
        return float(torch.linalg.vector_norm(self.S)) if self.norm is None else self.norm

    def relative_variance(self) -> Tensor:
        """v_m = s_m² / Σ s² of eq. 19 for the values of `S`, descending; zeros for ΔW = 0."""
        total = self.frobenius**2
        return self.S.square() / total if total > 0 else self.S.square()


def spectrum(M: Matrix, q: int, exact: bool = False, product: bool = False, filtered: bool = True) -> Spectrum:
    """The first q singular triplets of M (k, d), signs fixed by the rows of Vᵀ, and at least so many singular values.

    Where M is large and q small, they come in the precision of M: from its smaller Gram matrix, or from a block Krylov
    iteration with an error bound (`truncated`) where that is cheaper. ‖M‖_F, which eq. 19 divides by, costs no SVD.
    Else, or with `exact`, from float64.

    Args:
        product: the product of the factors is what counts, see `leading_triplets`.
        filtered: whether the filtered iteration may be tried; False where it has been.
    """
    q = min(q, *M.shape)
    if not exact and _pays(M, q):
        norm = frobenius(M)
        small = _of_small(formed(M), q, norm if product else 0.0, filtered) if is_small(M) else None
        found = small or leading_triplets(M, q, norm=norm if product else None)
        if found is not None:
            return _signed(*found, norm)
    return _whole_spectrum(formed(M).double(), q)


def spectra(matrices: Sequence[Matrix], q: Sequence[int], exact: bool, product: Sequence[bool]) -> list[Spectrum]:
    """`spectrum` of each; those of one shape are factored as a stack, and the device is waited for once.

    Args:
        q, product: of each matrix.
    """
    stacks: dict[tuple[torch.Size, int], list[int]] = {}
    for i, M in enumerate(matrices):
        if not exact and (is_small(M) or _is_filtered(M)) and _pays(M, q[i]):
            stacks.setdefault((M.shape, q[i]), []).append(i)
    made = [
        _stacked([formed(matrices[i]) for i in same], count, [product[i] for i in same])
        for (_, count), same in stacks.items()
    ]
    known = read_back([torch.stack([trusted.double(), norms.double()]) for *_, trusted, norms in made])
    found: dict[int, Spectrum] = {}
    for same, (U, S, Vh, _, _), numbers in zip(stacks.values(), made, known, strict=True):
        for j, i in enumerate(same):
            if numbers[j]:
                found[i] = Spectrum(U[j].clone(), S[j].clone(), Vh[j].clone(), numbers[len(same) + j])
    return [
        found[i] if i in found else spectrum(M, q[i], exact, product[i], filtered=False) for i, M in enumerate(matrices)
    ]


def _stacked(
    matrices: Sequence[Tensor], q: int, product: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """U, S and Vᵀ of a stack with their signs, whether each may be trusted, and ‖M‖_F of each."""
    stack = torch.stack(list(matrices))
    norms = torch.linalg.matrix_norm(stack)
    U, S, Vh, trusted = filtered_triplets(stack, q, norms * norms.new_tensor(product))
    signs = torch.stack([fix_signs(rows.mT) for rows in Vh])
    return U * signs[:, None, :], S, Vh * signs[:, :, None], trusted, norms


def is_small(M: Matrix) -> bool:
    """Return whether the leading triplets come out of the smaller Gram matrix."""
    return isinstance(M, Tensor) and M.dtype == torch.float32 and min(M.shape) <= GRAM_BELOW


def _is_filtered(M: Matrix) -> bool:
    """Return whether a larger matrix is tried by the filtered iteration."""
    return isinstance(M, Tensor) and M.dtype == torch.float32 and M.device.type in FILTERED


def _of_small(M: Tensor, q: int, norm: float, filtered: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """The triplets by the filtered iteration, or by squares where that fails or is not to be tried.

    Args:
        norm: ‖M‖_F where the product of the factors is what counts; 0 where each triplet does.
    """
    if filtered:
        *triplets, trusted = filtered_triplets(M, q, torch.tensor(norm, device=M.device))
        if bool(trusted):
            U, S, Vh = triplets
            return U, S, Vh
    return gram_triplets(M, q)


def _signed(U: Tensor, S: Tensor, Vh: Tensor, norm: float) -> Spectrum:
    signs = fix_signs(Vh.mT)
    return Spectrum(U * signs, S, Vh * signs[:, None], norm)


def _pays(M: Matrix, q: int) -> bool:
    """Return whether the leading triplets alone are cheaper than all."""
    return 0 < q <= min(M.shape) // 8 and min(M.shape) > EXACT_BELOW


def _whole_spectrum(M: Tensor, q: int) -> Spectrum:
    """All singular values and the first q triplets.

    Works on the smaller Gram matrix, which costs a fraction of an SVD. That loses accuracy as (σ_1/σ_q)²·eps, so
    where σ_q falls under 1e-4·σ_1 the SVD itself is taken.
    """
    wide = M.shape[0] < M.shape[1]
    D, near = eigh_descending(M @ M.mT if wide else M.mT @ M)
    S = D.sqrt()
    if q == 0 or float(S[q - 1]) <= 1e-4 * float(S[0]):
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        U, Vh = U[:, :q], Vh[:q]
    elif wide:
        U = near[:, :q]
        Vh = (U.mT @ M) / S[:q, None]
    else:
        Vh = near[:, :q].mT
        U = (M @ Vh.mT) / S[:q]
    signs = fix_signs(Vh.mT)
    return Spectrum(U * signs, S, Vh * signs[:, None])


def input_spectrum(gram: Tensor, q: int, exact: bool = False) -> Spectrum:
    """Singular values and the first q right singular vectors of Xᵀ, by the eigenvectors of `gram` = X Xᵀ (d, d)."""
    norm = float(gram.diagonal().sum().clamp_min(0.0).sqrt())
    found = leading_triplets(gram, q, TOLERANCE[torch.float32]) if _pays(gram, q) and not exact else None
    if found is None:
        D, P = eigh_descending(gram)
        P = P[:, :q].clone()
    else:
        P, D = found[0], found[1]
    return Spectrum(gram.new_zeros(0, P.shape[1]), D.sqrt(), (P * fix_signs(P)).mT, norm)


def rows_spectrum(Y: Tensor, q: int, exact: bool = False) -> Spectrum:
    """The same by Y (n, d) with YᵀY = `gram`, where there are fewer tokens than features."""
    norm = float(torch.linalg.matrix_norm(Y))
    found = leading_triplets(Y, q, TOLERANCE[torch.float32]) if _pays(Y, q) and not exact else None
    if found is None:
        whole = _whole_spectrum(Y.double(), min(q, *Y.shape))
        return Spectrum(whole.U[:0], whole.S, whole.Vh, norm)
    _, S, Vh = found
    return Spectrum(Y.new_zeros(0, len(Vh)), S, fix_signs(Vh.mT)[:, None] * Vh, norm)
