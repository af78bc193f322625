"""Forward passes over weights that DeepSpeed ZeRO-3 has partitioned: each module gathers its own while it runs.

What gathers them is a collective: every process has to call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .sharded import gathered_parameters, is_partitioned


def gathering(call: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
    """A forward pass in which each module has its weights gathered while it runs."""

    def gathered_call(model: nn.Module, batch: Any) -> Any:
        with _module_by_module(model):
            return call(model, batch)

    return gathered_call


@contextmanager
def _module_by_module(model: nn.Module) -> Iterator[None]:
    """Context in which hooks gather what each module holds itself; afterwards they are gone and all is partitioned."""
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
