"""The state of a model before the first step: its loss, and the gradients of A and B (appendix B of the paper)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .batches import default_forward, device_of, to_device, unwrapped
from .collect import as_found
from .gradients import gradients_of, scalar_loss
from .sites import find_sites


@dataclass(frozen=True)
class StartDiagnostics:
    """Of one batch, in eval mode.

    Attributes:
        loss: of the batch.
        gradient_A, gradient_B: Frobenius norms of ∂L/∂A and ∂L/∂B per site; of base "offset", of the half that trains.
    """

    loss: float
    gradient_A: dict[str, float]
    gradient_B: dict[str, float]


def start_diagnostics(
    model: nn.Module, batch: Any, *, loss: Callable[[nn.Module, Any], Any] | None = None, adapter_name: str = "default"
) -> StartDiagnostics:
    """The loss of one batch and the norms of the gradients of the factors; the model is left as found.

    Appendix B: ∂L/∂A = s·Bᵀ (∂L/∂Y) Xᵀ is zero while B is, ∂L/∂B = s·(∂L/∂Y) Xᵀ Aᵀ while A is.

    Args:
        model: with an adapter of LoRA layers.
        batch: one batch with labels, as the model takes it.
        loss: `loss(model, batch)`, a scalar; None for the loss in the model's own output.

    Raises:
        ValueError: without LoRA layers, or without a loss.
    """
    sites, _ = find_sites(model, adapter_name)
    factors = [p for site in sites for p in (site.A, site.B)]
    bare = unwrapped(model)
    with gradients_of(factors, bare), as_found(bare, ()), torch.enable_grad():
        bare.eval()
        value = scalar_loss((loss or default_forward)(bare, to_device(batch, device_of(bare))), 0)
        value.backward()  # type: ignore[no-untyped-call]
        norms = {id(p): float(p.grad.norm()) if p.grad is not None else 0.0 for p in factors}
    return StartDiagnostics(
        loss=float(value.detach()),
        gradient_A={s.name: norms[id(s.A)] for s in sites},
        gradient_B={s.name: norms[id(s.B)] for s in sites},
    )
