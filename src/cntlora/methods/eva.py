"""EVA (Paischer et al. 2024; eq. 39): A = principal directions of the inputs, B zero.

Layout: C = X Xᵀ / n (d, d) over all tokens of all batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..linalg.low_rank import LowRank, root_rows
from ..linalg.parallel import once
from ..linalg.spectrum import input_spectrum, rows_spectrum
from .estimator import Estimator
from .factors import zero_up
from .method import Method, Settings, WeightOf
from .statistics import InputEstimator
from .target import SiteTarget, Target


@dataclass(frozen=True, kw_only=True)
class Eva(Method):
    """A = the right singular vectors of X with the largest singular values, B = 0.

    Attributes:
        center: subtract the mean token, as its own code does; False for eq. 39 as printed.
        batch_weights: one a batch, in the sums over tokens; None for 1 each.
    """

    name = "eva"
    summary = "A = principal directions of the inputs, B zero"
    source = "Paischer et al. 2024; eq. 39"
    reads = "inputs"
    zero_start = True

    center: bool = True
    batch_weights: tuple[float, ...] | None = None

    def estimator(self, weight_of: WeightOf, settings: Settings) -> Estimator:
        return InputEstimator(
            lambda gram, total, tokens: eva_target(gram, total, tokens, self.center, settings.exact_svd),
            lambda name, batches, target: target,
            self.center,
            by_rows=True,
            single=True,
        )

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        return zero_up(site.spectrum.Vh[: site.r], site.shape[0])


def eva_target(gram: Tensor | LowRank, total: Tensor, tokens: float, center: bool, exact: bool = False) -> Target:
    """Right singular vectors of X (EVA, Paischer et al. 2024; eq. 39), by the eigenvectors of X Xᵀ.

    Args:
        gram: X Xᵀ (d, d) over all tokens, or by these. total: Σ x (d,). tokens: their number n.
        center: subtract the mean token, as EVA's own code does (an incremental PCA); False is eq. 39 as printed.
        exact: all eigenvectors, also where the leading ones would do.
    """
    if isinstance(gram, LowRank):
        rows = root_rows(gram, total / tokens if center else 0.0)
        return Target(known=once(partial(rows_spectrum, rows, exact=exact)))
    if center:
        gram = torch.addr(gram, total, total, alpha=-1.0 / tokens)
    return Target(known=once(partial(input_spectrum, gram, exact=exact)))  # once for all sites that share the input
