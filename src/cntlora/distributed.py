"""One decision everywhere: several processes add up what each has read, the first makes the plan, all apply it.

Only sums of size d×d (gradients: k×d) travel, once for all sites that share an input on every rank; never activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .compute import Reading
from .core.solve import Estimator, SharedSums
from .notices import warn_caller
from .plan import InitPlan

T = TypeVar("T")


def alone() -> bool:
    """Whether this process has no others to agree with."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def attempt(make: Callable[[], T]) -> T | Exception:
    """The result, or the exception: other processes must not wait for what does not come."""
    try:
        return make()
    except Exception as error:
        return error


def agreed(outcome: T | Exception) -> T:
    """The outcome, if no rank failed.

    Raises:
        Exception: the outcome, if it is one.
        RuntimeError: if there was one on another rank, with its message, so that no rank waits for one that failed.
    """
    messages: list[str | None] = [None]
    if not alone():
        failed = f"rank {dist.get_rank()}: {outcome}" if isinstance(outcome, Exception) else None
        messages = _gathered(failed)
    if isinstance(outcome, Exception):
        raise outcome
    failures = [message for message in messages if message is not None]
    if failures:
        raise RuntimeError(f"the initialisation failed on another rank, so no rank applies it: {failures[0]}")
    return outcome


def share_plan(outcome: InitPlan | Exception | None) -> InitPlan:
    """The plan of rank 0 on every rank of the default process group; the plan itself where there is none.

    Args:
        outcome: on rank 0 the plan, or the exception that was raised instead; elsewhere None.

    Raises:
        Exception, RuntimeError: see `agreed`.
    """
    plan = agreed(outcome)
    if alone():
        assert plan is not None
        return plan
    return _of_rank_0(plan)


def add_up(reading: Reading) -> None:
    """Makes the statistics those of all ranks together, as if one process had read all their batches.

    Ranks may have read different numbers of batches, and a site may have seen no token on some of them.
    """
    work, seen = reading.work, reading.seen
    devices = {site.name: site.base.weight.device for site in reading.sites}
    _warn_of_equal_data(work.estimator)
    for sums in work.estimator.accumulated:
        _add_up_sums(sums, devices)
    facts = _gathered((work.estimator.ranks, work.largest_batch, seen.tokens, seen.site_batches, seen.masked))
    ranks, largest, tokens, batches, masked = zip(*facts, strict=True)
    work.estimator.ranks.update(_merged(ranks, min))
    work.largest_batch.update(_merged(largest, max))
    seen.tokens.update(_merged(tokens, sum))
    seen.site_batches.update(_merged(batches, sum))
    seen.masked.update(*masked)
    seen.batches = sum(_gathered(seen.batches))


def _gathered(value: T) -> list[T]:
    """The value of every rank, in the order of ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _merged(parts: Iterable[dict[str, int]], rule: Callable[[list[int]], int]) -> dict[str, int]:
    parts = list(parts)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: rule([part[name] for part in parts if name in part]) for name in names}


def _warn_of_equal_data(estimator: Estimator) -> None:
    """Every process should read its own share of the data; a loader that is not sharded gives all of them the same."""
    marks = [[float(total.double().sum()) for _, total in sums.groups()] for sums in estimator.accumulated]
    everyone = _gathered(marks)
    if any(marks) and all(other == marks for other in everyone):
        warn_caller(
            "every process read the same batches, so that they count several times (eq. 18 depends on their number); "
            "shard the data, for example with a DistributedSampler or accelerator.prepare(loader)"
        )


def _add_up_sums(sums: SharedSums, devices: Mapping[str, torch.device]) -> None:
    """All-reduces each distinct sum once; names share one afterwards where they shared one on every rank."""
    mine = sums.groups()
    everyone = _gathered([(names, tuple(total.shape), total.dtype) for names, total in mine])
    shapes = {name: (shape, dtype) for part in everyone for names, shape, dtype in part for name in names}
    place = [{name: i for i, (names, *_) in enumerate(part) for name in names} for part in everyone]
    groups: dict[tuple[int | None, ...], list[str]] = {}
    for name in sorted(shapes):
        groups.setdefault(tuple(part.get(name) for part in place), []).append(name)
    for names in groups.values():
        shape, dtype = shapes[names[0]]
        held = sums.get(names[0])
        total = torch.zeros(shape, dtype=dtype, device=devices[names[0]]) if held is None else held.clone()
        sums.put(names, _all_reduced(total))


def _all_reduced(total: Tensor) -> Tensor:
    """The sum over ranks, on the device that `total` lies on; NCCL works on the GPU alone."""
    there = total.to(_device())
    dist.all_reduce(there)
    return there.to(total.device)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _of_rank_0(plan: InitPlan | None) -> InitPlan:
    device = _device()
    data = torch.frombuffer(bytearray(plan.to_bytes() if plan else b" "), dtype=torch.uint8).to(device)
    size = torch.tensor([data.numel()], device=device)
    dist.broadcast(size, src=0)
    if dist.get_rank() != 0:
        data = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(data, src=0)
    return InitPlan.from_bytes(data.cpu().numpy().tobytes(), "the plan of rank 0")
