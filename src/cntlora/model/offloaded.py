"""Weights that accelerate keeps on the CPU or the disk between calls, and on the meta device in the model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_offloaded(layer: nn.Module) -> bool:
    """Return whether a layer has a hook of accelerate that fetches its weights for each call."""
    hooks = sys.modules.get("accelerate.hooks")
    hook: Any = getattr(layer, "_hf_hook", None)
    if hooks is None or hook is None:
        return False
    parts = hook.hooks if isinstance(hook, hooks.SequentialHook) else (hook,)
    return any(isinstance(part, hooks.AlignDevicesHook) and part.offload for part in parts)


def execution_device(layer: Any) -> torch.device:
    """Return the device on which an offloaded layer computes."""
    parts = getattr(layer._hf_hook, "hooks", (layer._hf_hook,))
    device = next(part.execution_device for part in parts if getattr(part, "offload", False))
    return torch.device("cpu" if device is None else device)


@contextmanager
def fetched(layer: Any) -> Iterator[None]:
    """Context in which the weights of an offloaded layer are on the device that it computes on; others stay."""
    if not is_offloaded(layer):
        yield
        return
    hook = layer._hf_hook
    hook.pre_forward(layer)
    try:
        yield
    finally:
        hook.post_forward(layer, None)
