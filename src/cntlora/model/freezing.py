"""The frozen negative half of base "offset": gradients of A[r:] and B[:, r:] are zero, whatever the optimizer does."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .lora_layers import factor_of, factor_slots
from .sharded import is_sharded, part_of

if TYPE_CHECKING:
    from .sites import Site

_HANDLES: Any = WeakIdKeyDictionary()  # parameter → handle of its mask, so that a mask is never put on twice
_WATCHES: Any = WeakIdKeyDictionary()  # parameter → what puts the mask on the one that takes its place


def freeze_sites(sites: Iterable[Site]) -> None:
    """Masks the gradients of the second half of the rank of every site."""
    for site in sites:
        half = site.A.shape[0] // 2
        for dim, (owner, name) in enumerate(factor_slots(site.layer, site.adapter)):
            _freeze_half(owner, name, half, dim)


def _freeze_half(owner: Any, name: str, half: int, dim: int) -> None:
    """Masks the gradient of one parameter of `owner` from `half` on, and of the sharded one that may take its place."""
    parameter = factor_of(owner, name)
    if is_sharded(parameter):
        _mask_shard(parameter, half, dim)
    else:
        mask_gradient(parameter, _zero_from(half, dim))
    watch = weakref.finalize(parameter, _follow, weakref.ref(owner), name, half, dim)
    watch.atexit = False
    _WATCHES[parameter] = watch


def _follow(owner: weakref.ref[Any], name: str, half: int, dim: int) -> None:
    """`fully_shard` puts new parameters in the place of those it shards, and so does a move to the meta device."""
    weight = getattr(owner(), name, None)
    if isinstance(weight, nn.Parameter) and (is_sharded(weight) or weight.device.type == "meta"):
        _freeze_half(owner(), name, half, dim)


def mask_gradient(parameter: nn.Parameter, mask: Callable[[Tensor], Tensor]) -> None:
    """Put one gradient hook on a parameter, in place of an earlier one; a frozen parameter will do too."""
    _put_on(parameter, lambda: parameter.register_hook(mask))


def _mask_shard(parameter: Any, half: int, dim: int) -> None:
    """FSDP calls only the hook for after a gradient was reduced and accumulated; what was zero before stays zero so."""
    frozen = torch.zeros(parameter.shape, dtype=torch.bool)
    frozen.narrow(dim, half, parameter.shape[dim] - half).fill_(True)
    here: list[Tensor] = []  # this process's part, found at the first gradient: a parameter may have no values yet

    def zero(held: Any) -> None:
        if not here:
            here.append(part_of(frozen, held))
        held.grad.to_local().masked_fill_(here[0], 0.0)

    _put_on(parameter, lambda: parameter.register_post_accumulate_grad_hook(zero))


def _put_on(parameter: nn.Parameter, register: Callable[[], Any]) -> None:
    unmask(parameter)
    wanted = parameter.requires_grad
    parameter.requires_grad_(True)  # a hook can only be put on a tensor that requires a gradient
    _HANDLES[parameter] = register()
    parameter.requires_grad_(wanted)


def unmask(parameter: nn.Parameter) -> None:
    """Take our gradient hook off, if there is one."""
    handle, watch = _HANDLES.pop(parameter, None), _WATCHES.pop(parameter, None)
    if handle is not None:
        handle.remove()
    if watch is not None:
        watch.detach()


def _zero_from(start: int, dim: int) -> Callable[[Tensor], Tensor]:
    def zeroed(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.narrow(dim, start, gradient.shape[dim] - start).zero_()
        return gradient

    return zeroed
