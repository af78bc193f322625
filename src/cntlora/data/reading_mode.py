"""The state of a model while its data is read, and everything as it was found afterwards."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..model.bypass import bypassed
from ..model.quantised import left_unpacked

if TYPE_CHECKING:
    from ..model.sites import Site


@contextmanager
def as_found(model: nn.Module, batches: Iterable[Any]) -> Iterator[None]:
    """Restore modes of modules, `requires_grad` of parameters and random generators, also after an exception.

    What the caller's loss does with the model counts too: PEFT's `disable_adapter`, by which a trainer of preferences
    gets its reference, takes `requires_grad` from adapters that are left out of the forward pass and does not give it
    back.
    """
    training = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    numpy = sys.modules.get("numpy")
    own = list(_generators(batches))
    states = [g.get_state() for g in own]
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            for module, mode in training:
                module.training = mode
            for parameter, wants in gradients:
                if parameter.requires_grad != wants:
                    parameter.requires_grad_(wants)
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
            for generator, state in zip(own, states, strict=True):
                generator.set_state(state)


def _generators(batches: object) -> Iterator[torch.Generator]:
    """The generators that a DataLoader draws its order from."""
    found = {}
    batch_sampler = getattr(batches, "batch_sampler", None)
    for owner in (batches, getattr(batches, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
    yield from found.values()


@contextmanager
def reading_mode(model: nn.Module, sites: list[Site], batches: Iterable[Any]) -> Iterator[None]:
    """Context in which the model is in eval mode, its fresh adapters are left out, and all is as found afterwards."""
    with as_found(model, batches), bypassed(sites), left_unpacked(model), read_eagerly(model), without_cache(model):
        model.eval()
        yield


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Context in which transformers' models keep no keys and values, which only further tokens would need."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = list({id(config): config for config in found if getattr(config, "use_cache", None) is True}.values())
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextmanager
def read_eagerly(model: nn.Module) -> Iterator[None]:
    """Context in which compiled modules (torch.compile) run as they are written, so that hooks are called."""
    if not any(map(_is_compiled, model.modules())):
        yield
        return
    if not hasattr(torch.compiler, "set_stance"):  # torch before 2.6
        raise ValueError("the model is compiled (torch.compile); initialise first, then compile it, or use torch 2.6")
    with torch.compiler.set_stance("force_eager"):
        yield


def _is_compiled(module: nn.Module) -> bool:
    """Return whether torch.compile(module), or module.compile() in place, has compiled it."""
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
