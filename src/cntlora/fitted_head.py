"""`FittedHead`: the new values of a head, and what they were fitted to."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from .messages import counted


@dataclass(frozen=True)
class FittedHead:
    """A new head, fitted to the features that the model has before training, and how well it does on rows left out.

    Attributes:
        name: of the layer.
        weight, bias: (classes, features) and (classes,) or None, what is written into the layer.
        loss: "cross-entropy", "binary cross-entropy" or "squares".
        loss_before, loss_after: the mean of it over rows that the fit left out in turn, with the head as it was and
            fitted; equal where nothing lowers it, and the head is left as it was.
        ridge: of the fit, in units of the mean variance of a feature; None where the head is left as it was.
        rows, batches: that were read.
    """

    name: str
    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(repr=False)
    loss: str
    loss_before: float
    loss_after: float
    ridge: float | None
    rows: int
    batches: int

    def __str__(self) -> str:
        size = f"{counted(self.rows, 'row')} of {counted(self.batches, 'batch')}"
        if self.ridge is None:
            return f"head {self.name}: left as it was ({self.loss} {self.loss_before:.3f}; no fit to {size} is better)"
        return (
            f"head {self.name}: fitted to {size}, {self.loss} {self.loss_before:.3f} → {self.loss_after:.3f} on rows "
            "left out"
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values, without the tensors."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("weight", "bias")}
