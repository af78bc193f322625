"""The frozen negative half of base "offset": gradients of A[r:] and B[:, r:] are zero, whatever the optimizer does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .sites import Site, find_sites

_HANDLES: Any = WeakIdKeyDictionary()  # parameter → handle of its mask, so that a mask is never put on twice


def freeze_offset(model: nn.Module, adapter_name: str = "default") -> int:
    """Freezes the negative half of an adapter of base "offset": its gradients are zero from now on.

    `initialize` and `apply_plan` do this themselves, and loading a checkpoint into such a model keeps it. Call it where
    the adapter comes from a file into a new model (`PeftModel.from_pretrained(..., is_trainable=True)`), since a file
    of an ordinary LoRA cannot say that half of it is frozen, and after `copy.deepcopy(model)` or
    `load_state_dict(..., assign=True)`, which make new parameters. Calling it twice does no harm.

    Gradients are masked before they are accumulated, so gradient accumulation, clipping and DDP see the masked ones.
    Decoupled weight decay (AdamW) shrinks both halves alike, so that what did not train keeps cancelling.

    Call it for adapters of base "offset" only: nothing in a file tells them from those of "paired", whose halves train.

    Returns:
        The number of sites.

    Raises:
        ValueError: if a site has an odd rank, so that it has no two halves, or a second half of B that is zero.
    """
    sites, _ = find_sites(model, adapter_name)
    for site in sites:
        if site.A.shape[0] % 2:
            raise ValueError(
                f"site {site.name}: rank {site.A.shape[0]} is odd; base 'offset' writes 2r. Is it another base?"
            )
        if not bool(site.B.detach()[:, site.A.shape[0] // 2 :].any()):
            raise ValueError(
                f"site {site.name}: the second half of its lora_B is zero, where base 'offset' writes −B; an adapter "
                "that starts at B = 0 (plain LoRA, eva) has no half to freeze"
            )
    freeze_sites(sites)
    return len(sites)


def freeze_sites(sites: Iterable[Site]) -> None:
    """Masks the gradients of the second half of the rank of every site."""
    for site in sites:
        half = site.A.shape[0] // 2
        mask_gradient(site.A, _zero_from(half, 0))
        mask_gradient(site.B, _zero_from(half, 1))


def mask_gradient(parameter: nn.Parameter, mask: Callable[[Tensor], Tensor]) -> None:
    """Puts one gradient hook on a parameter, in place of an earlier one; works on a frozen parameter too."""
    unmask(parameter)
    wanted = parameter.requires_grad
    parameter.requires_grad_(True)  # a hook can only be put on a tensor that requires a gradient
    _HANDLES[parameter] = parameter.register_hook(mask)
    parameter.requires_grad_(wanted)


def unmask(parameter: nn.Parameter) -> None:
    """Takes our gradient hook off, if there is one."""
    handle = _HANDLES.pop(parameter, None)
    if handle is not None:
        handle.remove()


def _zero_from(start: int, dim: int) -> Callable[[Tensor], Tensor]:
    def zeroed(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.narrow(dim, start, gradient.shape[dim] - start).zero_()
        return gradient

    return zeroed
