"""From the target of a site to its factors: what an estimator gives, and how methods split it into B and A."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.factors import Spectrum, qr_factors, svd_factors
from ..linalg.low_rank import Matrix, formed


@dataclass(frozen=True)
class Target:
    """What the factors of one site are made from.

    Attributes:
        M: matrix (k, d) to be factored: ΔW, or what stands for it; None where `known` gives all that is needed.
        right: (d, d) that A is multiplied with after the factorisation of M; None for the identity.
        known: the first q singular triplets, where the method has its own way to them.
        is_delta: whether M is ΔW itself, so that its norm may be compared with that of W.
        importance: of the site, for a method that shares ranks out by it.
    """

    M: Matrix | None = None
    right: Tensor | None = None
    known: Callable[[int], Spectrum] | None = None
    is_delta: bool = False
    importance: float | None = None


@dataclass(frozen=True)
class RankFacts:
    """What is known of a site when adaptive ranks are shared out.

    Attributes:
        shape: (k, d).
        variances: v_m = s_m²/Σ s² of eq. 19, of those singular values that are known, descending.
        importance: see `Target`.
    """

    shape: tuple[int, int]
    variances: list[float]
    importance: float | None = None


@dataclass(frozen=True)
class SiteTarget:
    """The target of one site, with the rank and the size of the factors that are made from it.

    Attributes:
        name, shape: of the site; shape is (k, d).
        target: from the method's estimator.
        spectrum: the leading singular triplets of `target.M`.
        r: rank of the factors.
        scale: B·A = scale·[M]_r·right.
    """

    name: str
    shape: tuple[int, int]
    target: Target
    spectrum: Spectrum
    r: int
    scale: float


def product_factors(site: SiteTarget, decomposition: str = "svd", p: float = 0.5) -> tuple[Tensor, Tensor]:
    """B (k, r) and A (r, d) with B·A = scale·[M]_r·right, by SVD with the fraction p, or by QR."""
    M, right = site.target.M, site.target.right
    if decomposition == "svd":
        B, A = svd_factors(site.spectrum, site.r, p, site.scale)
    else:
        assert M is not None
        B, A = qr_factors(formed(M), site.r, decomposition == "qr_pivoted", site.scale)
    return B, A if right is None else A @ right


def zero_up(A: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """B = 0 (k, r) beside A (r, d): the start of LoRA and EVA."""
    return A.new_zeros(k, A.shape[0]), A


def site_generator(seed: int, name: str) -> torch.Generator:
    """The random stream of one site, by seed and site name alone."""
    # torch's CPU generator reads only the low 32 bits of its seed, so both must reach those
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
