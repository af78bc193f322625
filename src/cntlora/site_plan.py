"""`SitePlan`: the factors of one site, what they were computed from, and the check that they fit a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .model.sites import Site

FAR = 20.0
"""‖s·B·A‖/‖W‖ beyond which a start is said to be far: twice the largest that trained as well as smaller ones, ten times
what training adds at its best rate, and under all that trained worse (docs/math/rounding.md)."""
OTHER_MODEL = "it was made for another model or other target_modules: make a plan for this one"


@dataclass(frozen=True)
class SitePlan:
    """Factors of one site, and what they were computed from.

    Attributes:
        A, B: (file_rank, in) and (out, file_rank), exactly what is written into the layer, in its dtype;
            scaling·B·A is the function added at step 0 (zero for base "offset" and "paired").
        rank: the rank that trains, which the budget counts; with 0 the site loses its adapter.
        scaling, alpha, use_rslora: of the layer afterwards.
        found_rank, found_scaling: of the adapter that the plan was made for.
        singular_values: of the matrix that is factored, descending: ΔW, W (pissa, olora), W·C (corda), the gradient
            (lora_ga) or the inputs (eva); all of them for a small layer, the leading ones for a large one; none for
            lora.
        factored_norm: ‖·‖_F of that matrix, (Σ s²)^½ over all its singular values; None for lora.
        delta_norm, weight_norm: ‖ΔW‖_F, None where that matrix is not ΔW, and ‖W‖_F.
        start_norm: scaling·‖B'·A'‖_F of the directions that train: the distance of the start if nothing cancels it.
        slope: for descent ⟨∂L/∂W, scaling·B'·A'⟩, the first-order change of the mean loss along the start; else None.
        sketch: uᵀWv for four fixed random pairs u, v, which distinguishes another pretrained weight from a rounded one.
        tokens, batches: how many the site saw.
        masked: whether a mask was applied.
        mask: the stream of tokens that it saw and where their mask comes from, as "decoder (labels)"; "" without one.
        unmasked: why no mask was applied, in some batch, though one was given; else "".
        effective_rank: smallest numerical rank of G over the batches, or that of all inputs (corda, eva): the number of
            directions that the data determine; None if no inputs are read.
        rtol: the tolerance of the pseudo-inverse; None without one.
        seconds: time for the site's part of the statistics and for its factors.
    """

    A: Tensor
    B: Tensor
    rank: int
    scaling: float
    alpha: float
    use_rslora: bool
    found_rank: int
    found_scaling: float
    singular_values: Tensor
    factored_norm: float | None
    delta_norm: float | None
    weight_norm: float
    start_norm: float
    slope: float | None
    sketch: list[float]
    tokens: int
    batches: int
    masked: bool
    effective_rank: int | None
    rtol: float | None
    seconds: float
    mask: str = ""
    unmasked: str = ""

    @property
    def file_rank(self) -> int:
        """Number of rows of A: 2·rank for base "offset", else rank."""
        return self.A.shape[0]

    @property
    def captured(self) -> float | None:
        """Fraction of Σ s² in the first `rank` of `singular_values` (base "paired" holds half as many)."""
        if self.factored_norm is None:
            return None
        first = float(self.singular_values[: self.rank].double().square().sum())
        return min(first / self.factored_norm**2, 1.0) if self.factored_norm > 0 else 0.0

    def at_pace(self, factor: float) -> SitePlan:
        """The same start, which AdamW at a rate trains as it does this one at `factor` times that rate.

        AdamW moves every entry by about its rate. So A/f, B/f and f²·s at the rate lr/f learn what A, B and s do at lr.
        """
        A, B, square = self.A / factor, self.B / factor, factor**2
        return replace(self, A=A, B=B, scaling=self.scaling * square, alpha=self.alpha * square)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values, without the matrices."""
        values = {key: getattr(self, key) for key in PLAIN}
        return {**values, "file_rank": self.file_rank, "captured": self.captured}

    def check(self, site: Site) -> None:
        """Check that the plan was made for this site.

        Raises:
            ValueError: says what the plan has and what the layer has.
        """
        planned, found = (self.B.shape[0], self.A.shape[1]), (site.out_features, site.in_features)
        if planned != found:
            raise ValueError(
                f"site {site.name}: the plan is for (out, in) = {planned}, the layer is {found}; {OTHER_MODEL}"
            )
        adapter = (site.rank, round(site.scaling, 9))
        if adapter != (self.found_rank, round(self.found_scaling, 9)):
            raise ValueError(
                f"site {site.name}: the plan is for an adapter of rank {self.found_rank} and scaling "
                f"{self.found_scaling:g}, this one has rank {site.rank} and scaling {site.scaling:g}; use the "
                "same LoraConfig"
            )
        W = site.weight()
        if sketch_distance(weight_sketch(W), self.sketch) > site.rounding * max(self.weight_norm, 1e-12):
            raise ValueError(
                f"site {site.name}: the pretrained weight is not the one the plan was made for; {OTHER_MODEL}"
            )


TENSORS = ("A", "B", "singular_values")
PLAIN = tuple(f.name for f in fields(SitePlan) if f.name not in TENSORS)


def weight_sketch(W: Tensor) -> list[float]:
    """uᵀWv for four random pairs u, v: for another W they differ by about ‖W‖_F, for a rounded W by next to nothing."""
    values: list[float] = sketch_of(W).tolist()
    return values


def sketch_of(W: Tensor) -> Tensor:
    """`weight_sketch` (4,), in the precision of W."""
    generator = torch.Generator().manual_seed(W.shape[0] * 65_537 + W.shape[1])
    U, V = (torch.randn(4, n, generator=generator, dtype=torch.float64).to(W) for n in W.shape)
    return ((U @ W) * V).sum(dim=1)


def sketch_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference of two sketches."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
