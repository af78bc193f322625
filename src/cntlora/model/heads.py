"""Linear layers that train whole beside the adapter, as a new head does: found, and given other values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .lora_layers import base_name, naming_root
from .sharded import is_sharded
from .ties import owners_of

if TYPE_CHECKING:
    from ..fitted_head import FittedHead


_SAVED = re.compile(r"\.modules_to_save\.[^.]+")
"""What PEFT puts into the name of a module that trains whole."""


def trained_layers(model: nn.Module, adapter: str) -> dict[str, nn.Linear]:
    """The linear layers whose own weight trains, by name: not those that LoRA adapts, not its factors.

    Names are those of the base model. Sharded weights are left out, and weights that another module has too, which
    would change with them.
    """
    root, owners = naming_root(model, adapter), owners_of(model)
    return {
        _SAVED.sub("", base_name(path.removeprefix(root))): module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and ".lora_" not in f".{path}"
        and not is_sharded(module.weight)
        and len(owners[id(module.weight)]) == 1
    }


def check_head(model: nn.Module, head: FittedHead, adapter: str) -> None:
    """Check that a model has the layer of a fitted head.

    Raises:
        ValueError: says what the plan has and what the model has.
    """
    layer = trained_layers(model, adapter).get(head.name)
    if layer is None:
        raise ValueError(
            f"head {head.name}: the plan fits it, and the model trains no such linear layer; wrap it with the same "
            "modules_to_save"
        )
    both = ((layer.weight, layer.bias), (head.weight, head.bias))
    found, planned = [[None if p is None else tuple(p.shape) for p in one] for one in both]
    if found != planned:
        raise ValueError(f"head {head.name}: the plan is for weight and bias of {planned}, the layer's are {found}")


def write_head(model: nn.Module, head: FittedHead, adapter: str) -> None:
    """Write the weight and bias of a fitted head."""
    _write(trained_layers(model, adapter)[head.name], (head.weight, head.bias))


@contextmanager
def put_head(model: nn.Module, head: FittedHead | None, adapter: str) -> Iterator[None]:
    """Context in which a head has its fitted values; afterwards it has its own."""
    if head is None:
        yield
        return
    layer = trained_layers(model, adapter)[head.name]
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
