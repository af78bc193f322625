"""The state of a model before the first step: its loss, the gradients of A and B (appendix B), and the curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import default_forward, device_of, scalar_loss, to_device, unwrapped
from ..data.gradients import gradients_of
from ..data.reading_mode import as_found
from ..model.sites import Site, find_sites


@dataclass(frozen=True)
class StartDiagnostics:
    """Loss and gradients of one batch, in eval mode.

    Attributes:
        loss: of the batch.
        gradient_A, gradient_B: site name → Frobenius norm of ∂L/∂A and ∂L/∂B; for base "offset", of the half that
            trains.
    """

    loss: float
    gradient_A: dict[str, float]
    gradient_B: dict[str, float]


def start_diagnostics(
    model: nn.Module, batch: Any, *, loss: Callable[[nn.Module, Any], Any] | None = None, adapter_name: str = "default"
) -> StartDiagnostics:
    """Compute the loss of one batch and the norms of the gradients of A and B; the model is left as found.

    Appendix B of the paper: ∂L/∂A = s·Bᵀ (∂L/∂Y) Xᵀ is zero while B is zero, and ∂L/∂B = s·(∂L/∂Y) Xᵀ Aᵀ is zero while
    A is zero.

    Args:
        model: with an adapter of LoRA layers.
        batch: one batch with labels, as the model takes it.
        loss: `loss(model, batch)`, a scalar; None for the loss in the model's own output.
        adapter_name: of the adapter.

    Returns:
        The loss and the norms per site.

    Raises:
        ValueError: without LoRA layers, or without a loss.
    """
    sites, _ = find_sites(model, adapter_name)
    with _gradients(model, batch, loss, sites) as gradients:
        value, found = gradients()
        norms = {id(p): float(g.norm()) for p, g in zip(_factors(sites), found, strict=True)}
    return StartDiagnostics(
        loss=value,
        gradient_A={s.name: norms[id(s.A)] for s in sites},
        gradient_B={s.name: norms[id(s.B)] for s in sites},
    )


def start_curvature(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    adapter_name: str = "default",
    iterations: int = 30,
) -> float:
    """Compute the curvature at the start: the eigenvalue of largest magnitude of the Hessian of one batch's loss.

    The Hessian is taken by the factors that train. The eigenvalue comes from a power iteration that begins at the
    gradient. H·v is a central difference of gradients whose two points are so near that the gradients differ by at most
    a few percent, however large the factors are. Gradient descent with a learning rate above 2 over the eigenvalue
    diverges along its direction. The model is left as found.

    Args:
        model, batch, loss, adapter_name: as in `start_diagnostics`.
        iterations: upper bound; each takes two backward passes. It ends when the value changes by less than 1 %.

    Returns:
        The eigenvalue in units of loss over factor squared, with its sign; 0 where the gradient is 0.

    Raises:
        ValueError: as `start_diagnostics`.
    """
    sites, _ = find_sites(model, adapter_name)
    factors = _factors(sites)
    kept = [p.detach().clone() for p in factors]
    length = 1e-3 * float(_norm(kept))

    def put(direction: list[Tensor], amount: float) -> None:
        with torch.no_grad():
            for p, at, d in zip(factors, kept, direction, strict=True):
                p.copy_(at + amount * d)

    with _gradients(model, batch, loss, sites) as gradients:
        try:
            value, v = 0.0, gradients()[1]
            gradient = float(_norm(v))
            for _ in range(iterations):
                norm = float(_norm(v))
                if norm == 0.0:
                    return 0.0
                v = [part / norm for part in v]
                put(v, length)
                ahead = gradients()[1]
                put(v, -length)
                product = [(a - b) / (2 * length) for a, b in zip(ahead, gradients()[1], strict=True)]
                change = 2 * length * float(_norm(product)) / gradient
                if change > _NEAR:  # too far for a derivative: the same direction again, nearer
                    length *= _NEAR / (2 * change)
                    continue
                before, value = value, float(sum((a * b).sum() for a, b in zip(v, product, strict=True)))
                v = product
                if abs(value - before) < 0.01 * abs(value):
                    break
            return value
        finally:
            put(kept, 0.0)


_NEAR = 0.05
"""Largest change of the gradient, relative to itself, between the two points of a difference."""


def _factors(sites: list[Site]) -> list[nn.Parameter]:
    return [p for site in sites for p in (site.A, site.B)]


def _norm(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.detach().double().square().sum() for part in parts]).sum().sqrt()


@contextmanager
def _gradients(
    model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Any] | None, sites: list[Site]
) -> Iterator[Callable[[], tuple[float, list[Tensor]]]]:
    """Context in which the yielded function gives the loss in eval mode, and gradients by A and B (0 for none)."""
    factors, bare = _factors(sites), unwrapped(model)
    on_device = to_device(batch, device_of(bare))

    def gradients() -> tuple[float, list[Tensor]]:
        for p in factors:
            p.grad = None
        value = scalar_loss((loss or default_forward)(bare, on_device), 0)
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach()), [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in factors]

    with gradients_of(factors, bare), as_found(bare, ()), torch.enable_grad():
        bare.eval()
        yield gradients
