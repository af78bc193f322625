"""One decision everywhere: several processes share the sites out, each factors its own, and all apply one plan.

Only sums of size d×d (gradients: k×d) travel, each once for all sites that share an input on every rank, and only to
the process that factors those sites; never activations. A weight that is sharded is gathered by its site's process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from ..linalg.sums import SharedSums
from ..messages import warn_caller
from ..methods.estimator import Estimator
from ..model.layouts import as_matrix
from ..model.sharded import full, full_at, is_sharded
from ..model.sites import Site
from ..plan import InitPlan
from .agreement import agreed, alone, answered, attempt, gathered, sent_by_each, summed_at
from .assemble import Alone, Work
from .compute import plan_from
from .reading import Reading

T = TypeVar("T")


def plan_together(reading: Reading) -> InitPlan:
    """The plan that one process would make of all batches, within rounding; every rank gets the same bits.

    Sums of ranks are added in another order than those of one process. One rank factors a site and sends its factors.

    Raises:
        Exception, RuntimeError: see `agreed`.
    """
    share = Shared(add_up(reading), reading.work)

    def again(sites: list[Site]) -> None:
        seen = agreed(attempt(lambda: reading.pass_over(sites)), "the end of another pass over its data")
        part = replace(reading, sites=sites, seen=seen)
        share.owners.update(add_up(part))
        reading.seen.update(part.seen)

    piece = plan_from(reading, share, again)
    return piece if alone() else _put_together(piece, [site.name for site in reading.sites])


def add_up(reading: Reading) -> dict[str, int]:
    """Deals the sites out, and makes the statistics of each those of all ranks together at the rank it went to.

    Ranks may have read different numbers of batches, and a site may have seen no token on some of them.

    Returns:
        Site name → the rank that factors it, the same on every rank.
    """
    names = [site.name for site in reading.sites]
    work = reading.work
    if alone():
        for sums in work.estimator.accumulated:
            for holders, total in sums.groups():
                sums.put(holders, full(total))
        return dict.fromkeys(names, 0)
    _warn_of_equal_data(work.estimator)
    _add_up_facts(reading)
    groups = [_groups(sums) for sums in work.estimator.accumulated]
    costs = {site.name: _cost(site, reading) for site in reading.sites}
    owners = deal(_linked(names, [g.names for of_one in groups for g in of_one]), costs, dist.get_world_size())
    devices = {site.name: site.device for site in reading.sites}
    for sums, of_one in zip(work.estimator.accumulated, groups, strict=True):
        for group in of_one:
            _send(sums, group, owners[group.names[0]], devices[group.names[0]])
    return owners


def _cost(site: Site, reading: Reading) -> float:
    """Of the factors, up to a constant; a site that waits for another pass is dealt again then."""
    waits = site.name in reading.budget.waiting
    return 0.0 if waits else float(site.in_features * site.out_features * min(site.in_features, site.out_features))


def deal(groups: Iterable[Sequence[str]], costs: Mapping[str, float], ranks: int) -> dict[str, int]:
    """Name → rank: each group as a whole, the dearest first, to the rank that has least to do so far."""
    loads = [0.0] * ranks
    owners: dict[str, int] = {}
    for group in sorted(groups, key=lambda group: -sum(costs[name] for name in group)):
        rank = loads.index(min(loads))
        loads[rank] += sum(costs[name] for name in group)
        owners.update(dict.fromkeys(group, rank))
    return owners


@dataclass(frozen=True)
class Shared:
    """Each process works on the sites that were dealt to it (an `assemble.Share`).

    Attributes:
        owners: site name → rank.
        work: where the estimator finds the weights of the sites.
    """

    owners: dict[str, int]
    work: Work

    def mine(self, sites: list[Site]) -> list[Site]:
        rank = 0 if alone() else dist.get_rank()
        return [site for site in sites if self.owners[site.name] == rank]

    def each(self, sites: list[Site], make: Callable[[Site], T], streams: bool) -> dict[str, T]:
        """Raises on every rank what was raised on one."""
        if any(is_sharded(site.stored) for site in sites):
            return agreed(self._in_rounds(sites, make))
        return agreed(attempt(lambda: Alone().each(self.mine(sites), make, streams)))

    def everyone(self, values: dict[str, T]) -> dict[str, T]:
        return values if alone() else {name: value for part in gathered(values) for name, value in part.items()}

    def _in_rounds(self, sites: list[Site], make: Callable[[Site], T]) -> dict[str, T] | Exception:
        """One site for every process a round: all send their parts of its weight to its process, which works on it.

        So no process ever holds more than one whole weight. One that fails goes on sending.
        """
        made: dict[str, T] = {}
        failure: Exception | None = None
        queues: dict[int, list[Site]] = {}
        for site in sites:
            queues.setdefault(self.owners[site.name], []).append(site)
        for round_ in zip_longest(*(queues[rank] for rank in sorted(queues))):
            own = self._gathered([site for site in round_ if site is not None])
            if own is not None and failure is None:
                outcome = attempt(partial(holding, self.work, own, make))
                if isinstance(outcome, Exception):
                    failure = outcome
                else:
                    made[own.name] = outcome
            del own
        return made if failure is None else failure

    def _gathered(self, sites: list[Site]) -> Site | None:
        """This process's one of `sites`, with its weight."""
        own = None
        for site in sites:
            with answered():
                stored = full_at(site.stored, self.owners[site.name])
            if stored is not None:
                own = replace(site, gathered=as_matrix(site.base, stored))
        return own


def holding(work: Work, site: Site, make: Callable[[Site], T]) -> T:
    """What `make` gives for a site whose weight is gathered; the estimator finds that weight meanwhile."""
    before = work.sites[site.name]
    work.sites[site.name] = site
    try:
        return make(site)
    finally:
        work.sites[site.name] = before


class _Group(NamedTuple):
    """Names that share one sum on every rank, and what it is like."""

    names: list[str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    sharded: bool


def _groups(sums: SharedSums) -> list[_Group]:
    """The distinct sums of all ranks; names share one where they share one on every rank."""
    everyone = gathered([(n, (tuple(total.shape), total.dtype, is_sharded(total))) for n, total in sums.groups()])
    kinds = {name: kind for part in everyone for names, kind in part for name in names}
    places = [{name: i for i, (names, _) in enumerate(part) for name in names} for part in everyone]
    found: dict[tuple[int | None, ...], list[str]] = {}
    for name in sorted(kinds):
        found.setdefault(tuple(place.get(name) for place in places), []).append(name)
    return [_Group(names, *kinds[names[0]]) for names in found.values()]


def _linked(names: Sequence[str], links: Iterable[Sequence[str]]) -> list[list[str]]:
    """The names in groups: those that any link joins are in the same."""
    label = {name: i for i, name in enumerate(names)}
    for link in links:
        joined = {label[name] for name in link}
        label.update({name: min(joined) for name, i in label.items() if i in joined})
    found: dict[int, list[str]] = {}
    for name, i in label.items():
        found.setdefault(i, []).append(name)
    return list(found.values())


def _send(sums: SharedSums, group: _Group, owner: int, device: torch.device) -> None:
    """The sum over ranks takes the place of a sum at its owner; the others forget theirs."""
    held = sums.get(group.names[0])
    if group.sharded:
        assert held is not None, "a sharded gradient is there on every rank or on none"
        with answered():
            whole = full_at(held, owner)
        total = None if whole is None else whole * dist.get_world_size()  # FSDP averages gradients over ranks
    else:
        new = torch.zeros(group.shape, dtype=group.dtype, device=device) if held is None else held.clone()
        total = summed_at(new, owner)
    if total is None:
        sums.drop(group.names)
    else:
        sums.put(group.names, total)


def _add_up_facts(reading: Reading) -> None:
    work, seen = reading.work, reading.seen
    facts = gathered(
        (work.estimator.facts.plain(), work.largest_batch, seen.tokens, seen.site_batches, seen, seen.batches)
    )
    noted, largest, tokens, batches, others, counts = zip(*facts, strict=True)
    for facts_of_one in noted:
        work.estimator.facts.update(facts_of_one)
    work.largest_batch.update(_merged(largest, max))
    seen.tokens.update(_merged(tokens, sum))
    seen.site_batches.update(_merged(batches, sum))
    for other in others:
        seen.note_masks(other)
    seen.batches = sum(counts)


def _merged(parts: Iterable[dict[str, int]], rule: Callable[[list[int]], int]) -> dict[str, int]:
    parts = list(parts)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: rule([part[name] for part in parts if name in part]) for name in names}


def _warn_of_equal_data(estimator: Estimator) -> None:
    """Every process should read its own share of the data; a loader that is not sharded gives all of them the same."""
    totals = [t for sums in estimator.accumulated for _, t in sums.groups() if not is_sharded(t)]
    marks = [float(total.double().sum()) for total in totals]
    everyone = gathered(marks)
    if marks and all(other == marks for other in everyone):
        warn_caller(
            "every process read the same batches, so that they count several times (eq. 18 depends on their number); "
            "shard the data, for example with a DistributedSampler or accelerator.prepare(loader)"
        )


def _put_together(piece: InitPlan, order: Sequence[str]) -> InitPlan:
    """The plan of all sites, in their order, from what each rank has; read from the same bytes on every rank."""
    data = agreed(attempt(piece.to_bytes))
    pieces = [InitPlan.from_bytes(part, f"the plan of rank {rank}") for rank, part in enumerate(sent_by_each(data))]
    sites = {name: site for part in pieces for name, site in part.sites.items()}
    return replace(pieces[0], sites={name: sites[name] for name in order if name in sites})
