"""The data that pass from an estimator to the factors of a site: `Target`, `RankFacts`, `SiteTarget`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ..linalg.low_rank import Matrix, Shifted
    from ..linalg.spectrum import Spectrum


@dataclass(frozen=True)
class Target:
    """The matrix, or its spectrum, that the factors of one site are made from.

    Attributes:
        M: matrix (k, d) to be factored: ΔW, or what stands for it, and then also (k, m) where `right` is (m, d); None
            where `known` gives all that is needed.
        right: (d, d) that A is multiplied with after the factorisation of M; None for the identity.
        known: the first q singular triplets, where the method has its own way to them.
        is_delta: whether M is ΔW itself, so that its norm may be compared with that of W.
        is_product: whether [M]_r is what counts, and not each of its directions.
        importance: of the site, for a method that shares ranks out by it.
        size: of the site's outputs, for a method that makes A in units of them.
        shift: μ of C + μ·I, for a method that takes it off again.
    """

    M: Matrix | None = None
    right: Tensor | Shifted | None = None
    known: Callable[[int], Spectrum] | None = None
    is_delta: bool = False
    is_product: bool = False
    importance: float | None = None
    size: float = 1.0
    shift: float = 0.0


@dataclass(frozen=True)
class RankFacts:
    """Facts of a site by which adaptive ranks are allocated.

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
        sites: how many sites the call initialises.
    """

    name: str
    shape: tuple[int, int]
    target: Target
    spectrum: Spectrum
    r: int
    scale: float
    sites: int
