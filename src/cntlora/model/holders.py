"""Finds what else holds the parameters of a model: optimizers, DDP wrappers, other adapters, other modules.

An optimizer or a wrapper that holds those of an adapter makes it too late to replace them.

PyTorch keeps no list of its optimizers, so that the only way to find one is a look at every Python object: 0.1 to 0.7 s
beside transformers. The reference count of a parameter says at once whether anything but its module holds it. Nothing
does as a rule, and the objects are looked through only where something may.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .lora_layers import adapters_of, factor_of, factor_slots
from .sharded import address, check_rank

if TYPE_CHECKING:
    from ..plan import InitPlan
    from .sites import Site


def check_holders(sites: list[Site], plan: InitPlan, replaced: Container[str] = ()) -> None:
    """Raise ValueError if an optimizer or DDP would go on with parameters that the model no longer uses.

    Args:
        replaced: sites that get new parameters also where their rank stays.
    """
    for site in sites:
        check_rank(site.name, site.A, plan.sites[site.name].file_rank)
    if not _held_elsewhere(sites):
        return
    ours = {id(p): s.name for s in sites for p in (s.A, s.B)}
    resized = {id(p) for s in sites for p in (s.A, s.B) if s.name in replaced or plan.sites[s.name].file_rank != s.rank}
    if not any(_concerns(holder, ours) for holder in _holders()):
        return
    gc.collect()  # one that the caller has dropped may still wait in a reference cycle
    for holder in _holders():
        if isinstance(holder, nn.Module):
            _check_wrapper(holder, ours, resized)
        else:
            _check_optimizer(holder, ours, resized)


def _held_elsewhere(sites: Iterable[Site]) -> bool:
    """Return whether a Python object besides the modules of the sites may hold one of their factors.

    An optimizer holds its parameters in lists, and so does DDP, so that the answer is never no where there is one. What
    else counts (a list of the caller, a graph that waits for its backward pass) costs a look at all objects, no more.
    """
    slots = {(id(owner), name): owner for site in sites for owner, name in factor_slots(site.layer, site.adapter)}
    places = Counter(id(factor_of(owner, name)) for (_, name), owner in slots.items())  # tied layers: more than one
    fresh = nn.Module()
    fresh.weight = nn.Parameter(torch.zeros(1))
    alone = _references(fresh, "weight")  # by one module, as this interpreter counts
    return any(
        _references(owner, name) != alone + places[id(factor_of(owner, name))] - 1 for (_, name), owner in slots.items()
    )


def _references(owner: Any, name: str) -> int:
    """The references to the parameter in one place, that of this call among them."""
    return sys.getrefcount(getattr(owner, name))


def _holders() -> list[Any]:
    """Every optimizer and DDP in this process; a list, since a generator that is left early holds every object."""
    found = []
    known: dict[type, bool] = {}  # each type is looked at once: there are hundreds of thousands of objects
    for candidate in gc.get_objects():
        kind = type(candidate)
        if kind not in known:
            known[kind] = issubclass(kind, (torch.optim.Optimizer, nn.parallel.DistributedDataParallel))
        if known[kind]:
            found.append(candidate)
    return found


def _concerns(holder: Any, ours: dict[int, str]) -> bool:
    """Return whether an optimizer or DDP holds any of our parameters."""
    if isinstance(holder, nn.Module):
        return any(id(p) in ours for p in holder.parameters())
    return any(id(p) in ours for group in holder.param_groups for p in group["params"])


def _check_optimizer(optimizer: Any, ours: dict[int, str], resized: set[int]) -> None:
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if id(parameter) in ours and (id(parameter) in resized or optimizer.state.get(parameter)):
            raise ValueError(
                f"site {ours[id(parameter)]}: an optimizer ({type(optimizer).__name__}) already holds its parameters, "
                "and would go on training the old ones; initialise first, then make the optimizer"
            )


def _check_wrapper(wrapper: nn.Module, ours: dict[int, str], resized: set[int]) -> None:
    """DDP averages the gradients of the parameters it found when it was made, so that new ones would drift apart."""
    name = next((ours[id(p)] for p in wrapper.parameters() if id(p) in resized), None)
    if name is not None:
        raise ValueError(
            f"site {name}: the model is already wrapped in {type(wrapper).__name__}, which would not synchronise its "
            "new parameters, of another rank; initialise first, then wrap (base='paired' keeps the rank)"
        )


def check_alone(model: nn.Module, sites: list[Site]) -> None:
    """Check that nothing else stands on the weights, which base "subtract" changes.

    Raises:
        ValueError: names another adapter of a layer, or another module that has its weight.
    """
    for site in sites:
        others = sorted(adapters_of(site.layer) - {site.adapter})
        if others:
            raise ValueError(
                f"site {site.name}: it also has adapter {others[0]!r}, and base 'subtract' changes the weight that "
                "both stand on; use base='offset', which leaves it alone"
            )
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(address(parameter), []).append(path)
    for site in sites:
        shared = owners.get(address(site.stored), [])
        if len(shared) > 1:
            raise ValueError(
                f"site {site.name}: its weight is shared with another module ({', '.join(shared)}), so base "
                "'subtract' would change that too; use base='offset' or leave it out of target_modules"
            )
