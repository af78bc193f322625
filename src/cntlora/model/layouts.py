"""Views of a base layer as an (out, in) matrix. A layer type is one row; everything else is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import quantised
from .offloaded import fetched, is_offloaded
from .patches import convolution_refusal
from .sharded import WHY_FIXED, full, is_partitioned, is_sharded, refusal, shape_of, write


@dataclass(frozen=True)
class Layout:
    """The way in which a layer type stores W.

    Attributes:
        matches: whether a base layer is of this type.
        to_matrix: the stored weight as (out, in), a view.
        to_stored: the other way round, for a weight of the given shape.
        parameter: the name of the stored weight.
        dims: the dimensions that it has.
        refusal: why a layer of this type has no W that serves all its inputs alike, or None.
        unseen: why the inputs that W is multiplied with cannot be read; None where they can.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    to_matrix: Callable[[Tensor], Tensor] = lambda stored: stored
    to_stored: Callable[[Tensor, torch.Size], Tensor] = lambda W, shape: W
    parameter: str = "weight"
    dims: int = 2
    refusal: Callable[[Any], str | None] = lambda layer: None
    unseen: str | None = None


def _is_conv1d(layer: nn.Module) -> bool:
    # transformers.pytorch_utils.Conv1D, recognised without importing transformers
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def _kernel(name: str, kind: type[nn.Module], dims: int) -> Layout:
    """A convolution: W is (out, in·kernel), and its inputs are the patches that the kernel sees."""
    return Layout(
        name,
        lambda layer: isinstance(layer, kind),
        lambda stored: stored.flatten(1),
        lambda W, shape: W.reshape(shape),
        dims=dims,
        refusal=convolution_refusal,
    )


INSIDE_ATTENTION = (
    "nn.MultiheadAttention computes its projections inside one function, so that their inputs cannot be read; take a "
    "method that reads the weights alone (pissa, olora, lora)"
)
ONE_HOT = (
    "an Embedding looks up rows and has no inputs of the size of the vocabulary to read; take a method that reads the "
    "weights alone (pissa, olora, lora)"
)

LAYOUTS = (
    Layout("Linear", lambda layer: isinstance(layer, nn.Linear)),
    Layout("Conv1D", _is_conv1d, lambda stored: stored.mT, lambda W, shape: W.mT),
    _kernel("Conv1d", nn.Conv1d, 3),
    _kernel("Conv2d", nn.Conv2d, 4),
    _kernel("Conv3d", nn.Conv3d, 5),
    Layout(
        "Embedding",
        lambda layer: isinstance(layer, nn.Embedding),
        lambda stored: stored.mT,
        lambda W, shape: W.mT,
        unseen=ONE_HOT,
    ),
    Layout(
        "MultiheadAttention",
        lambda layer: isinstance(layer, nn.MultiheadAttention),
        parameter="in_proj_weight",
        unseen=INSIDE_ATTENTION,
    ),
)


def layout_of(layer: nn.Module) -> Layout:
    """The layout of a base layer.

    Raises:
        ValueError: the reason why its weight cannot be read as an (out, in) matrix.
    """
    layout = _row(layer)
    stored: Any = getattr(layer, layout.parameter)
    reason = layout.refusal(layer) or _storage_refusal(layer, stored)
    if reason is not None:
        raise ValueError(reason)
    shape = shape_of(stored)
    if len(shape) != layout.dims:
        raise ValueError(
            f"its weight has shape {tuple(shape)}, expected {layout.dims} dimensions: the first FSDP keeps flat parts "
            "of weights; initialise before the model is sharded, or shard it with fully_shard (FSDP2)"
        )
    return layout


def _row(layer: nn.Module) -> Layout:
    layout = next((entry for entry in LAYOUTS if entry.matches(layer)), None)
    if layout is None:
        known = ", ".join(entry.name for entry in LAYOUTS)
        raise ValueError(
            f"its base layer is a {type(layer).__name__}, expected one of {known}; leave it out of target_modules, "
            "or, where the layer is a quantised one, initialise the adapter on the unquantised model and load it here"
        )
    return layout


def _storage_refusal(layer: Any, stored: Any) -> str | None:
    """Return why the values of a weight cannot be read, or None."""
    if stored.device.type == "meta" and not is_offloaded(layer):
        return (
            "its weight is on the meta device (no values); load the pretrained weights before initialising "
            "(low_cpu_mem_usage/init_empty_weights off, or dispatch the checkpoint first)"
        )
    reason = refusal(stored)
    if reason is not None:
        return reason
    if quantised.kind_of(stored) is not None:
        return None if stored.device.type == "meta" else quantised.refusal(layer)
    plain = type(stored) in (Tensor, nn.Parameter) or is_sharded(stored)
    if plain and stored.dtype in quantised.FLOATS:
        return None
    return (
        f"its weight is a {type(stored).__name__} of dtype {str(stored.dtype).removeprefix('torch.')}, expected a "
        "float64, float32, bfloat16, float16 or 8-bit float tensor, or one of bitsandbytes or torchao; initialise the "
        "adapter on the unquantised model, save it and load it on the other"
    )


def stored_weight(layer: nn.Module) -> Any:
    """The parameter that holds W, as the layer stores it; it may be quantised, sharded or on the meta device."""
    return getattr(layer, _row(layer).parameter)


def weight_matrix(layer: nn.Module) -> Tensor:
    """W (out, in), detached.

    A view of the stored weight; unpacked, where it is quantised; fetched, where accelerate has offloaded it; or all of
    it gathered where it is sharded (a collective).
    """
    with fetched(layer):
        stored = stored_weight(layer)
        quantised_kind = quantised.kind_of(stored)
        return as_matrix(layer, full(stored) if quantised_kind is None else quantised.dequantised(layer))


def as_matrix(layer: nn.Module, stored: Tensor) -> Tensor:
    """(out, in) of a tensor that is laid out as the weight of a layer; a view."""
    return _row(layer).to_matrix(stored)


def write_matrix(layer: nn.Module, W: Tensor) -> None:
    """Write W (out, in) into the weight of a layer, sharded or not."""
    stored = stored_weight(layer)
    write(stored, _row(layer).to_stored(W, stored.shape))


def why_fixed(layer: nn.Module) -> str | None:
    """Return why the weight of a layer can neither be written nor have a gradient, or None."""
    if is_partitioned(stored_weight(layer)):
        return WHY_FIXED
    kind = quantised.kind_of(stored_weight(layer))
    if kind is not None:
        return f"its weight is quantised ({kind})"
    return "its weight is offloaded (accelerate), in memory during a call only" if is_offloaded(layer) else None


def shaped_like(factor: Tensor, value: Tensor) -> Tensor:
    """A (rank, d) or B (k, rank), of any rank, in the shape of a factor: (rank, channels, *kernel), or (k, rank, 1, …).

    The kernel of B has one position, so that its shape after the second dimension is all ones.
    """
    rest = factor.shape[1:] if factor.shape[1:].numel() == value.shape[1] else (value.shape[1], *factor.shape[2:])
    return value.reshape(value.shape[0], *rest)
