"""Weights that DeepSpeed ZeRO-3 has partitioned: gathered one module at a time. DeepSpeed itself is not imported.

Such a parameter is empty, and carries its shape and its part. What gathers it is a collective: every process has to
call it, in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

WHY_FIXED = "its weight is partitioned over processes (DeepSpeed ZeRO-3)"
"""Why a weight can neither be written nor have a gradient here."""


def is_partitioned(tensor: Any) -> bool:
    """Whether a parameter is one of ZeRO-3's, gathered at the moment or not."""
    return hasattr(tensor, "ds_id") and hasattr(tensor, "ds_tensor")


def shape_of(tensor: Any) -> torch.Size:
    """The shape of a parameter, of the whole one where it is partitioned."""
    return torch.Size(tensor.ds_shape if is_partitioned(tensor) else tensor.shape)


def gathered_parameters(parameters: Sequence[Any]) -> Any:
    """A context in which partitioned parameters are whole on every process. A collective."""
    zero = sys.modules["deepspeed"].zero  # whoever made them has imported it
    return zero.GatheredParameters(list(parameters))


def full_copy(parameter: Any) -> Tensor:
    """A copy of all of a partitioned parameter. A collective."""
    with gathered_parameters([parameter]):
        copy: Tensor = parameter.detach().clone()
    return copy


def full_copy_where(parameter: Any, here: bool) -> Tensor | None:
    """`full_copy` where `here`, None on the processes that only take part. A collective."""
    with gathered_parameters([parameter]):
        return parameter.detach().clone() if here else None


def gathering(call: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
    """A forward pass in which each module has its weights gathered while it runs."""

    def gathered_call(model: nn.Module, batch: Any) -> Any:
        with _module_by_module(model):
            return call(model, batch)

    return gathered_call


@contextmanager
def _module_by_module(model: nn.Module) -> Iterator[None]:
    """Inside, hooks gather what each module holds itself; they are removed and all is partitioned again afterwards."""
    running: list[tuple[nn.Module, ExitStack]] = []
    handles = []

    def begin(module: nn.Module, *_: Any) -> None:
        stack = ExitStack()
        absent = [p for p in _own(module) if p.ds_status.name == "NOT_AVAILABLE"]
        if absent:
            stack.enter_context(gathered_parameters(absent))
        running.append((module, stack))

    def end(module: nn.Module, *_: Any) -> None:
        if running and running[-1][0] is module:  # else its `begin` was not reached
            running.pop()[1].close()

    try:
        for module in model.modules():
            if _own(module):
                handles.append(module.register_forward_pre_hook(begin, prepend=True))
                handles.append(module.register_forward_hook(end, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        while running:
            running.pop()[1].close()


def _own(module: nn.Module) -> list[Any]:
    """The partitioned parameters that a module reads itself; attention reads those of its projections besides."""
    deep = isinstance(module, nn.MultiheadAttention)
    return [p for p in module.parameters(recurse=deep) if is_partitioned(p)]
