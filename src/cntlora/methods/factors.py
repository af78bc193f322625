"""Factors that several methods make: B and A from the target of a site, A alone beside B = 0, and A drawn at random."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..linalg.factors import qr_factors, svd_factors
from ..linalg.low_rank import formed, times

if TYPE_CHECKING:
    from .target import SiteTarget


def product_factors(site: SiteTarget, decomposition: str = "svd", p: float = 0.5) -> tuple[Tensor, Tensor]:
    """B (k, r) and A (r, d) with B·A = scale·[M]_r·right, by SVD with the fraction p, or by QR."""
    M, right = site.target.M, site.target.right
    if decomposition == "svd":
        B, A = svd_factors(site.spectrum, site.r, p, site.scale)
    else:
        assert M is not None
        B, A = qr_factors(formed(M), site.r, decomposition == "qr_pivoted", site.scale)
    if right is None:
        return B, A
    A = times(A, right)
    return B.to(A), A


def zero_up(A: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """B = 0 (k, r) beside A (r, d): the start of LoRA and EVA."""
    return A.new_zeros(k, A.shape[0]), A


def site_generator(seed: int, name: str) -> torch.Generator:
    """The random stream of one site, by seed and site name alone."""
    # torch's CPU generator reads only the low 32 bits of its seed, so both must reach those
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


def lora_down(r: int, d: int, generator: torch.Generator) -> Tensor:
    """A (r, d) uniform in ±1/√d (LoRA, Hu et al. 2021; eq. 22), as its authors' code and PEFT draw it.

    Equation 22 prints N(0, I), which is larger by √(3d); `kaiming_uniform_(a=√5)` of the code is this.
    """
    return (2.0 * torch.rand(r, d, generator=generator, dtype=torch.float64) - 1.0) / math.sqrt(d)
