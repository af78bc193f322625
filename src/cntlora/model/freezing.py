"""The frozen negative half of base "offset": gradients of A[r:] and B[:, r:] are zero, whatever the optimizer does."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .lora_layers import factor_of, factor_slots
from .provenance import start_of
from .sharded import full, is_sharded, part_of, reshard
from .sites import Site, find_sites

_HANDLES: Any = WeakIdKeyDictionary()  # parameter → handle of its mask, so that a mask is never put on twice
_WATCHES: Any = WeakIdKeyDictionary()  # parameter → what puts the mask on the one that takes its place


def freeze_offset(model: nn.Module, adapter_name: str = "default") -> int:
    """Freeze the negative half of an adapter of base "offset": its gradients are zero from now on.

    `initialize` and `apply_plan` do this themselves, and loading a checkpoint into such a model keeps it. Call it

    - if the adapter is loaded from a file into a new model (`PeftModel.from_pretrained(..., is_trainable=True)`),
      because a file of an ordinary LoRA cannot say that half of it is frozen;
    - after `copy.deepcopy(model)` or `load_state_dict(..., assign=True)`, which make new parameters.

    Calling it twice does no harm. After `fully_shard` (FSDP2) it is not needed: the sharded parameters take the mask.

    Gradients are masked before they are accumulated, so gradient accumulation, clipping and DDP see the masked ones.
    Decoupled weight decay (AdamW) shrinks both halves alike, so that the directions that did not train keep cancelling.

    Call it for adapters of base "offset" only: a file does not distinguish them from those of "paired", whose halves
    both train.

    Returns:
        The number of sites.

    Raises:
        ValueError: if a site has an odd rank, so that it has no two halves, or a second half of B that is zero, or the
            adapter was initialised in this process with another base.
    """
    reshard(model)
    sites, _ = find_sites(model, adapter_name)
    for site in sites:
        if site.A.shape[0] % 2:
            raise ValueError(
                f"site {site.name}: rank {site.A.shape[0]} is odd; base 'offset' writes 2r. Is it another base?"
            )
        if not bool(full(site.B)[:, site.A.shape[0] // 2 :].any()):
            raise ValueError(
                f"site {site.name}: the second half of its lora_B is zero, where base 'offset' writes −B; an adapter "
                "that starts at B = 0 (plain LoRA, eva) has no half to freeze"
            )
    start = start_of(model, adapter_name)
    if start is not None and start.base != "offset":
        how = "starts at B = 0" if start.base == "zero" else f"was initialised with base {start.base!r}"
        raise ValueError(
            f"adapter {adapter_name!r} {how}, where all of the rank trains; freeze_offset is for base 'offset' alone"
        )
    freeze_sites(sites)
    return len(sites)


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
    """Puts one gradient hook on a parameter, in place of an earlier one; works on a frozen parameter too."""
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
    """Takes our gradient hook off, if there is one."""
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
