"""Gradients of the loss by the pretrained weights, for the methods that read them; the model is left as found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .layouts import layout_of
from .sites import Site

OnGradient = Callable[[int, str, Tensor], None]
"""Called for each batch and site: batch index, name of the site, ∂L/∂W (k, d)."""


@contextmanager
def weight_gradients(model: nn.Module, sites: list[Site], sink: OnGradient) -> Iterator[Callable[[int, Any], None]]:
    """Inside, the weights of the sites are the only parameters with gradients; the yielded function runs backward.

    It takes the index of the batch and what the model gave for it, and hands ∂L/∂W of every site to `sink`. The
    gradients and the `requires_grad` of all parameters are as before afterwards, also after an exception.
    """
    parameters = list({id(p): p for p in model.parameters()}.values())
    found = [(p, p.requires_grad, p.grad) for p in parameters]
    weights = {site.name: site.base.weight for site in sites}

    def backward(index: int, output: Any) -> None:
        scalar_loss(output, index).backward()  # type: ignore[no-untyped-call]
        for site in sites:
            gradient = weights[site.name].grad
            if gradient is not None:
                sink(index, site.name, gradient.mT if layout_of(site.base).transposed else gradient)
        for weight in weights.values():
            weight.grad = None

    try:
        for p in parameters:
            p.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
            weight.grad = None
        yield backward
    finally:
        for p, wanted, gradient in found:
            p.requires_grad_(wanted)
            p.grad = gradient


def scalar_loss(output: Any, index: int) -> Tensor:
    """The loss in what a model gave: itself, `output.loss`, `output["loss"]`, or the first of a tuple.

    Raises:
        ValueError: if there is none, or it does not depend on the weights.
    """
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif hasattr(output, "loss"):
        loss = output.loss
    elif isinstance(output, (tuple, list)) and output:
        loss = output[0]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            f"batch {index}: this method reads gradients and so needs a loss, and the model's output "
            f"({type(output).__name__}) has none; put labels into the batches, or give loss=, a function of the model "
            "and the batch that returns a scalar"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"batch {index}: the loss does not depend on the weights of the adapted layers, so it has no gradient; is "
            "the model called under torch.no_grad(), or the adapter on layers that do not reach the loss?"
        )
    if not bool(loss.isfinite()):
        raise ValueError(
            f"batch {index}: the loss is {float(loss.detach())}, expected a finite number; check the batch and dtype"
        )
    return loss
