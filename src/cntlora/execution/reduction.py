"""Sums over processes: those that every rank shares alike are added up at the rank that factors their sites."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..messages import warn_caller
from ..model.sharded import full_at, is_sharded
from .processes import gather, lost_process_named, sum_at, world_size

if TYPE_CHECKING:
    from ..linalg.sums import SharedSums
    from ..methods.estimator import Estimator


class CommonSum(NamedTuple):
    """One sum that several names share on every rank."""

    names: list[str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    sharded: bool


def common_sums(sums: SharedSums) -> list[CommonSum]:
    """The distinct sums of all ranks; names share one where they share one on every rank."""
    parts = gather([(n, (tuple(total.shape), total.dtype, is_sharded(total))) for n, total in sums.groups()])
    kinds = {name: kind for part in parts for names, kind in part for name in names}
    places = [{name: i for i, (names, _) in enumerate(part) for name in names} for part in parts]
    found: dict[tuple[int | None, ...], list[str]] = {}
    for name in sorted(kinds):
        found.setdefault(tuple(place.get(name) for place in places), []).append(name)
    return [CommonSum(names, *kinds[names[0]]) for names in found.values()]


def add_at_owner(sums: SharedSums, common: CommonSum, owner: int, device: torch.device) -> None:
    """The sum over ranks takes the place of a sum at its owner; the others forget theirs."""
    held = sums.get(common.names[0])
    if common.sharded:
        assert held is not None, "a sharded gradient is there on every rank or on none"
        with lost_process_named():
            whole = full_at(held, owner)
        total = None if whole is None else whole * world_size()  # FSDP averages gradients over ranks
    else:
        new = torch.zeros(common.shape, dtype=common.dtype, device=device) if held is None else held.clone()
        total = sum_at(new, owner)
    if total is None:
        sums.drop(common.names)
    else:
        sums.put(common.names, total)


def warn_of_equal_data(estimator: Estimator) -> None:
    """Every process should read its own share of the data; a loader that is not sharded gives all of them the same."""
    totals = [t for sums in estimator.accumulated for _, t in sums.groups() if not is_sharded(t)]
    everyone = gather([size_of(total) for total in totals])
    if totals and len(everyone) > 1 and all(equal_sizes(everyone[0], other) for other in everyone):
        warn_caller(
            "every process read the same batches, so that they count several times (eq. 18 depends on their number); "
            "shard the data, for example with a DistributedSampler or accelerator.prepare(loader)"
        )


def size_of(total: torch.Tensor) -> tuple[float, float]:
    """Sum and norm of the entries."""
    total = total.double()
    return float(total.sum()), float(torch.linalg.vector_norm(total))


def equal_sizes(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> bool:
    """Return whether sums are those of the same batches, which another process may round in another way."""
    return len(one) == len(other) and all(
        abs(sum_one - sum_other) <= 1e-5 * norm and abs(norm - norm_other) <= 1e-5 * norm
        for (sum_one, norm), (sum_other, norm_other) in zip(one, other, strict=True)
    )
