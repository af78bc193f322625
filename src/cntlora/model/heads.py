"""Linear layers that train whole beside the adapter, as a new head does: found, and given other values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .sharded import is_sharded

if TYPE_CHECKING:
    from ..fitted_head import FittedHead


_PEFT = re.compile(r"^base_model\.model\.|\.modules_to_save\.[^.]+")
"""What PEFT puts into the name of a module that trains whole."""


def trained_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers whose own weight trains, by name: not those that LoRA adapts, not its factors.

    Names are those of the base model, without PEFT's own. Sharded weights are left out, and weights that another module
    has too, which would change with them.
    """
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {
        _PEFT.sub("", name): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and ".lora_" not in f".{name}"
        and not is_sharded(module.weight)
        and owners[id(module.weight)] == 1
    }


def check_head(model: nn.Module, head: FittedHead) -> None:
    """Check that a model has the layer of a fitted head.

    Raises:
        ValueError: says what the plan has and what the model has.
    """
    layer = trained_layers(model).get(head.name)
    if layer is None:
        raise ValueError(
            f"head {head.name}: the plan fits it, and the model trains no such linear layer; wrap it with the same "
            "modules_to_save"
        )
    both = ((layer.weight, layer.bias), (head.weight, head.bias))
    found, planned = [[None if p is None else tuple(p.shape) for p in one] for one in both]
    if found != planned:
        raise ValueError(f"head {head.name}: the plan is for weight and bias of {planned}, the layer's are {found}")


def write_head(model: nn.Module, head: FittedHead) -> None:
    """Write the weight and bias of a fitted head."""
    _write(trained_layers(model)[head.name], (head.weight, head.bias))


@contextmanager
def put_head(model: nn.Module, head: FittedHead | None) -> Iterator[None]:
    """Context in which a head has its fitted values; afterwards it has its own."""
    if head is None:
        yield
        return
    layer = trained_layers(model)[head.name]
    kept = [None if p is None else p.detach().clone() for p in (layer.weight, layer.bias)]
    _write(layer, (head.weight, head.bias))
    try:
        yield
    finally:
        _write(layer, kept)


@torch.no_grad()
def _write(layer: nn.Linear, values: Sequence[Tensor | None]) -> None:
    for parameter, value in zip((layer.weight, layer.bias), values, strict=True):
        if parameter is not None and value is not None:
            parameter.copy_(value)
