"""One call of a module: the argument that it works on, its own mask, and the tensors that it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .rows import Rows

MAIN = ("input_ids", "inputs_embeds", "hidden_states", "x", "input", "inputs")
"""Names of the argument that a module works on; else it is its first tensor that is no mask and no position."""
ASIDE = ("mask", "position", "label", "cache", "bias", "indices", "_ids")


@dataclass
class Call:
    """A module that is running.

    Attributes:
        main: its main input; lead, width: the leading shape and the features of that.
        rows: which of them count; None where nothing is known.
        picks: whether it hands rows of its input to modules inside (experts).
        others: of its further inputs that are known, the leading shape and the rows.
        made: leading shape → rows, of what modules inside have returned; last: of the last one.
    """

    module: nn.Module
    main: Callable[[], Tensor | None]
    lead: torch.Size | None
    width: int | None
    rows: Rows | None
    picks: bool
    others: list[tuple[torch.Size, Rows]]
    made: dict[torch.Size, Rows] = field(default_factory=dict)
    last: Rows | None = None

    def returns(self, x: Tensor, lead: torch.Size) -> Rows | None:
        """The rows of what it returns: those of its input in the same leading shape, or one a sequence."""
        assert self.rows is not None
        if self.rows.keep is None or lead == self.lead:
            return self.rows
        sequences = x.dim() == 2 and self.lead is not None and len(self.lead) == 2 and lead == self.lead[:1]
        return self.rows.per_sequence() if sequences else None


def call_inside(around: Call | None, module: nn.Module) -> Call:
    """A call without a tensor to go by: as the one around it."""
    if around is None:
        return Call(module, lambda: None, None, None, None, False, [])
    return replace(around, module=module)


def tensors_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that a module is called with, by the names of its arguments."""
    found = dict(zip(_parameters(type(module)), args, strict=False)) if args else {}  # type: ignore[arg-type]
    return {name: x for name, x in (*found.items(), *kwargs.items()) if isinstance(x, Tensor)}


@cache
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of a forward method that may be given by position."""
    names = []
    for name, parameter in list(inspect.signature(kind.forward).parameters.items())[1:]:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{name}{i}" for i in range(8)]
        elif parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            names.append(name)
    return tuple(names)


def picks_rows(module: nn.Module) -> bool:
    """Return whether a module hands some of its rows to each of the modules inside: experts, or what routes to them."""
    lists = (nn.ModuleList, nn.ModuleDict)
    if isinstance(module, lists):
        return True
    return _routes(type(module).__name__) and any(isinstance(child, lists) for child in module.children())


@cache
def _routes(kind: str) -> bool:
    return any(part in kind.lower() for part in ("expert", "moe", "sparse", "mixture"))


def main_of(arguments: dict[str, Tensor]) -> tuple[str, Tensor | None]:
    """The argument that a module works on, and its name; None if it has no tensor of that kind."""
    for name in MAIN:
        if name in arguments and arguments[name].dim() > 0:
            return name, arguments[name]
    for name, x in arguments.items():
        if x.dim() > 0 and not any(part in name for part in ASIDE):
            return name, x
    return "", None


def own_mask(arguments: dict[str, Tensor], lead: torch.Size) -> Tensor | None:
    """The (batch, tokens) mask that a module is called with for its main input."""
    for name in ("attention_mask", "padding_mask", "mask"):
        mask = arguments.get(name)
        if mask is not None and mask.dim() == 2 and mask.shape == lead:
            return mask
    return None


def counted_by(mask: Tensor) -> Tensor:
    """Return what counts by a mask of ones and zeros, or by one that is added to scores and so negative at padding."""
    if not mask.is_floating_point():
        return mask.bool()
    return torch.where((mask < 0).any(), mask >= 0, mask > 0)


def returned_by(output: Any) -> Iterator[Tensor]:
    """The tensors that a module returns."""
    values = output.values() if isinstance(output, Mapping) else output
    for value in values if isinstance(output, (Mapping, tuple, list)) else (output,):
        if isinstance(value, Tensor):
            yield value
