"""The adapted layers that the loss depends on: read off the graph of one forward pass, without a backward pass.

A method that reads inputs runs without gradients, and so does not see that a layer will never train, as the pooler of a
model whose loss is taken of its tokens. Of what a forward pass keeps for the way back nothing is kept here, and one row
tells it: so it takes the time of a row and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .batches import loss_in
from .reading_mode import as_found

if TYPE_CHECKING:
    from ..model.sites import Site
    from .batches import Forward


def is_watched(model: nn.Module) -> bool:
    """Return whether a module has hooks that are called in a forward pass."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def unreached(model: nn.Module, sites: Iterable[Site], call: Forward, batch: Any) -> list[str]:
    """Names of the sites that are called and on whose output the loss of the first row does not depend.

    To what a layer gives a zero is added that can have a gradient; where the graph of the loss has no such zero of a
    site, that does not train. Sites that give no tensor are left out. The model and all random states are as found.
    Where the first tokens of a text call all sites and the loss depends on each, the rest of the row is not run.

    Returns:
        The names; none where it cannot be told: the output has no loss, no gradient, or the pass fails.
    """
    if torch.is_inference_mode_enabled():
        return []
    sites, row = list(sites), first_row(batch)
    short = first_tokens(row)
    if short is not row:
        depends = _dependence(model, sites, call, short)
        if sites and len(depends) == len(sites) and all(depends.values()):
            return []
    depends = _dependence(model, sites, call, row)
    return [name for name, does in depends.items() if not does] if any(depends.values()) else []


def _dependence(model: nn.Module, sites: Iterable[Site], call: Forward, batch: Any) -> dict[str, bool]:
    """Tell of each site that is called and gives tensors whether the loss depends on it; empty where the pass fails."""
    zeros: dict[str, list[Tensor]] = {}
    try:
        with ExitStack() as stack:
            stack.enter_context(as_found(model, ()))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda saved: None, _gone))
            for site in sites:
                handle = site.layer.register_forward_hook(_adding(zeros.setdefault(site.name, [])))
                stack.callback(handle.remove)
            found = _leaves(loss_in(call(model, batch), 0))
    except (RuntimeError, ValueError):  # no loss of one row, or operations that want what is not kept
        return {}
    return {name: any(id(zero) in found for zero in used) for name, used in zeros.items() if used}


FIRST_TOKENS = 16
"""Tokens of a text that are run first."""


def first_tokens(row: Any) -> Any:
    """The first tokens of a text, where all tensors of a batch of one row are (1, n) of one n, or (1,); else the row
    itself."""
    if not isinstance(row, Mapping):
        return row
    tensors = [value for value in row.values() if isinstance(value, Tensor) and value.dim() > 0]
    lengths = {value.shape[1:] for value in tensors if value.dim() > 1}
    if len(lengths) != 1 or len(length := lengths.pop()) != 1 or length[0] <= FIRST_TOKENS:
        return row
    return {
        name: value[:, :FIRST_TOKENS] if isinstance(value, Tensor) and value.dim() > 1 else value
        for name, value in row.items()
    }


def first_row(batch: Any) -> Any:
    """The first row of a batch, where all that it holds has as many; else the whole of it (patches of images)."""
    if isinstance(batch, Tensor):
        return batch[:1]
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(values, (list, tuple)):
        return batch
    rows = {len(value) for value in values if _has_rows(value)}
    if len(rows) != 1:
        return batch
    cut = [value[:1] if _has_rows(value) else value for value in values]
    return dict(zip(batch, cut, strict=True)) if isinstance(batch, Mapping) else tuple(cut)


def _has_rows(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim() > 0)


def _adding(used: list[Tensor]) -> Callable[..., Any]:
    def add(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        used.append(torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True))
        return output + used[-1]

    return add


def _gone(nothing: None) -> Tensor:
    raise RuntimeError("nothing is kept for a backward pass here")


def _leaves(loss: Tensor) -> set[int]:
    """Identities of the leaves that the graph of a loss has."""
    found, seen, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [following for following, _ in node.next_functions]
    return found
