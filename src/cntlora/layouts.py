"""Views of a base layer as an (out, in) matrix. A layer type is one row; everything else is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .sharded import full, is_sharded, refusal, write


@dataclass(frozen=True)
class Layout:
    """How a layer type stores W.

    Attributes:
        transposed: the stored weight is (in, out), as in GPT-2's Conv1D.
        matches: whether a base layer is of this type.
    """

    name: str
    transposed: bool
    matches: Callable[[nn.Module], bool]


def _is_conv1d(layer: nn.Module) -> bool:
    # transformers.pytorch_utils.Conv1D, recognised without importing transformers
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


LAYOUTS = (
    Layout("Linear", False, lambda layer: isinstance(layer, nn.Linear)),
    Layout("Conv1D", True, _is_conv1d),
)


def layout_of(layer: nn.Module) -> Layout:
    """The layout of a base layer.

    Raises:
        ValueError: the reason why its weight cannot be read as an (out, in) matrix.
    """
    layout = next((entry for entry in LAYOUTS if entry.matches(layer)), None)
    if layout is None:
        known = " or ".join(entry.name for entry in LAYOUTS)
        raise ValueError(
            f"its base layer is a {type(layer).__name__}, expected {known}; leave it out of target_modules"
        )
    weight: Any = layer.weight
    if weight.device.type == "meta":
        raise ValueError(
            "its weight is on the meta device (no values); load the pretrained weights before initialising "
            "(low_cpu_mem_usage/init_empty_weights off, or dispatch the checkpoint first)"
        )
    reason = refusal(weight)
    if reason is not None:
        raise ValueError(reason)
    plain = type(weight) in (Tensor, nn.Parameter) or is_sharded(weight)
    if not plain or weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"its weight is a {type(weight).__name__} of dtype {str(weight.dtype).removeprefix('torch.')}, expected a "
            "float64, float32, bfloat16 or float16 tensor; for a quantised base, initialise the adapter on the "
            "unquantised model, save it and load it on the other"
        )
    if weight.dim() != 2:
        raise ValueError(
            f"its weight has shape {tuple(weight.shape)}, expected two dimensions: DeepSpeed ZeRO-3 and the first FSDP "
            "keep flat parts of weights; initialise before the model is sharded, or shard it with fully_shard (FSDP2)"
        )
    return layout


def weight_matrix(layer: nn.Module) -> Tensor:
    """W (out, in), detached: a view of the stored weight, or all of it gathered where it is sharded (a collective)."""
    stored: Any = layer.weight
    return as_matrix(layer, full(stored))


def as_matrix(layer: nn.Module, stored: Tensor) -> Tensor:
    """(out, in) of a tensor that is laid out as the weight of a layer, or the other way round; a view."""
    return stored.mT if layout_of(layer).transposed else stored


def write_matrix(layer: nn.Module, W: Tensor) -> None:
    """Writes W (out, in) into the weight of a layer, sharded or not."""
    write(layer.weight, as_matrix(layer, W))
