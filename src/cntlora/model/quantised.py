"""Weights that are stored in few bits: W of one layer, made when it is asked for and not kept.

Each kind is known by the names of its classes, so that no library is imported which the model does not use already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOAT8 = tuple(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"))
ROUNDING = {"4-bit": 0.4, "8-bit": 0.15}
"""By bits: how far the sketch of a weight may move when it is quantised, in units of ‖W‖; another W moves it by 1.4."""


def kind_of(weight: Any) -> str | None:
    """Return what a weight is stored as, if that is not a plain tensor of `FLOATS`; None too for what is not known."""
    name = type(weight).__name__
    if name in ("Params4bit", "Int8Params"):
        return "bitsandbytes 4-bit" if name == "Params4bit" else "bitsandbytes 8-bit"
    if type(weight).__module__.startswith("torchao.") and hasattr(weight, "dequantize"):
        return f"torchao {name}"
    plain = type(weight) in (Tensor, nn.Parameter)
    return "8-bit float" if plain and weight.dtype in FLOAT8 else None


def refusal(layer: Any) -> str | None:
    """Return why the quantised weight of a layer cannot be read, or None."""
    weight = layer.weight
    kind = kind_of(weight)
    if kind == "bitsandbytes 4-bit":
        return _refusal_4bit(layer)
    if kind == "bitsandbytes 8-bit" and _row_maxima(layer) is None and weight.dtype == torch.int8:
        return "its bitsandbytes 8-bit weight has no scales (SCB); move the model to its device before initialising"
    if kind == "8-bit float" and not _scales_known(layer):
        return (
            f"its weight is {weight.dtype} with scales in {', '.join(_scale_names(layer))}, a layout that is not "
            "known; expected none, or `weight_scale_inv` as in transformers' FP8Linear; initialise the adapter on the "
            "unquantised model, save it and load it on this one"
        )
    return None


def _refusal_4bit(layer: Any) -> str | None:
    state = _state_4bit(layer)
    if state is None:
        return "its bitsandbytes 4-bit weight is not quantised yet; move the model to its device before initialising"
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "its bitsandbytes 4-bit weight was repacked for inference by an earlier call in eval mode on the CPU, and "
            "bitsandbytes can neither read nor train it so; load the model again and initialise before any evaluation"
        )
    return None


def dequantised(layer: Any) -> Tensor:
    """W (out, in) of a layer whose weight `kind_of` knows, a new tensor; float32 where the kind has no own dtype.

    The only place where a quantised weight is unpacked.
    """
    weight = layer.weight
    kind = kind_of(weight)
    if kind == "bitsandbytes 4-bit":
        from bitsandbytes.functional import dequantize_4bit

        unpacked: Tensor = dequantize_4bit(weight.data, _state_4bit(layer))
        return unpacked
    if kind == "bitsandbytes 8-bit":
        maxima = _row_maxima(layer)
        if maxima is None:
            return weight.data.float()  # kept in float16
        return weight.data.float() * (maxima.to(weight.device).float() / 127.0)[:, None]
    if kind == "8-bit float":
        return _scaled(layer)
    whole: Tensor = weight.detach().dequantize()
    return whole.detach()


def dtype_of(weight: Any) -> torch.dtype:
    """The precision that W is worth: its own dtype, or that of a plain layer where it has fewer bits."""
    if kind_of(weight) == "bitsandbytes 4-bit" and getattr(weight, "quant_state", None) is not None:
        own: torch.dtype = weight.quant_state.dtype
        return own
    dtype: torch.dtype = weight.dtype
    return dtype if dtype in FLOATS else torch.float32


def rounding_of(weight: Any) -> float:
    """Bound the distance of the sketches of W and of the unquantised weight, in units of ‖W‖; 0 for plain ones."""
    kind = kind_of(weight)
    if kind is None:
        return 0.0
    few = "4bit" in kind or "4-bit" in kind or "Int4" in kind or "Intx" in kind
    return ROUNDING["4-bit" if few else "8-bit"]


@contextmanager
def left_unpacked(model: nn.Module) -> Iterator[None]:
    """Context in which a call in eval mode leaves 4-bit weights of bitsandbytes as they are.

    On CPUs with AVX512-BF16 bitsandbytes repacks them for good at the first one, and cannot train them then.
    """
    switched: list[Any] = [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
    try:
        for module in switched:
            module.support_avx512bf16_for_cpu = False
        yield
    finally:
        for module in switched:
            module.support_avx512bf16_for_cpu = True


def _state_4bit(layer: Any) -> Any:
    state = getattr(layer.weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if state is None else state


def _row_maxima(layer: Any) -> Any:
    """Largest magnitude of each row (out,), which is 127 in the stored integers."""
    found = getattr(layer.weight, "SCB", None)
    return getattr(getattr(layer, "state", None), "SCB", None) if found is None else found


def _scale_names(layer: nn.Module) -> list[str]:
    named = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    return [name for name, _ in named if "scale" in name and "activation" not in name and "input" not in name]


def _scales_known(layer: Any) -> bool:
    names = _scale_names(layer)
    if names != ["weight_scale_inv"]:
        return not names
    return layer.weight_scale_inv.numel() == 1 or getattr(layer, "block_size", None) is not None


def _scaled(layer: Any) -> Tensor:
    """W of 8-bit floats, times the scale of each block (out, in) of `block_size` where there are any."""
    W: Tensor = layer.weight.detach().float()
    scale = getattr(layer, "weight_scale_inv", None)
    if scale is None:
        return W
    scale = scale.detach().float()
    if scale.numel() > 1:
        rows, columns = layer.block_size
        scale = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: W.shape[0], : W.shape[1]]
    return W * scale
