"""Convolutions as matrix products: W (out, in·kernel) times the patches of the input that the kernel sees."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

SMALLEST = 2**18
"""Numbers in a block of patches, if that is more than d rows of d: d×d is what their sum takes."""


def convolution_refusal(layer: Any) -> str | None:
    """Return why PEFT's LoRA of a convolution is not the low-rank part of its W, or None.

    Its A is a convolution of the same kernel, stride and padding; groups, dilation and the mode of the padding are not
    passed on (PEFT 0.21).
    """
    kind = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, kind))
    if type(layer).forward is not kind.forward or type(layer)._conv_forward is not kind._conv_forward:
        return f"it is a {type(layer).__name__} with a forward of its own, expected that of {kind.__name__}"
    if layer.groups > 1:
        return (
            f"it is a {type(layer).__name__} with groups={layer.groups}, whose LoRA mixes the channels that its W "
            "keeps apart; leave it out of target_modules"
        )
    if any(d != 1 and k != 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)):
        return (
            f"it is a {type(layer).__name__} with dilation {layer.dilation}, which PEFT's LoRA of it has not; leave it "
            "out of target_modules"
        )
    if layer.padding_mode != "zeros" and any(_padding(layer)):
        return (
            f"it is a {type(layer).__name__} with padding_mode={layer.padding_mode!r}, while PEFT's LoRA of it pads "
            "with zeros; leave it out of target_modules"
        )
    return None


def is_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, _ConvNd)


def geometry(layer: Any) -> tuple[Any, ...]:
    """Return what decides the patches that a convolution makes of an input."""
    return layer.kernel_size, layer.stride, tuple(_padding(layer))


def patches(layer: Any, x: Tensor) -> Iterator[Tensor]:
    """The patches of x (batch, channels, *size) or (channels, *size), in blocks of rows (n, channels·kernel).

    The features of a patch are in the order of the weight: `layer(x)` is patches·Wᵀ + bias, one row a position.
    """
    sizes = len(layer.kernel_size)
    windows = F.pad(x.unsqueeze(0) if x.dim() == sizes + 1 else x, _padding(layer))
    for i, (width, step) in enumerate(zip(layer.kernel_size, layer.stride, strict=True)):
        windows = windows.unfold(2 + i, width, step)  # a view (batch, channels, *positions, *kernel)
    d = windows.shape[1] * math.prod(layer.kernel_size)
    positions = windows.shape[2 : 2 + sizes]
    rows = max(d, SMALLEST // d)
    images = max(1, rows // math.prod(positions))
    lines = max(1, rows // math.prod(positions[1:])) if images == 1 else positions[0]
    order = (0, *range(2, 2 + sizes), 1, *range(2 + sizes, 2 + 2 * sizes))
    for some in windows.split(images):
        for block in some.split(lines, dim=2):
            yield block.permute(order).reshape(-1, d)


def _padding(layer: Any) -> list[int]:
    """Return the padding as F.pad takes it: (left, right) of the last dimension first."""
    if isinstance(layer.padding, str):
        if layer.padding == "valid":
            return [0] * (2 * len(layer.kernel_size))
        both = [(d * (k - 1) // 2, d * (k - 1)) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [n for left, total in reversed(both) for n in (left, total - left)]
    return [n for amount in reversed(layer.padding) for n in (amount, amount)]
