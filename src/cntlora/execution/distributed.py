"""Several processes: the sites are shared out, each process factors its own, and all apply one plan.

Only sums of size d×d (gradients: k×d) travel, each once for all sites that share an input on every rank, and only to
the process that factors those sites; never activations. A weight that is sharded is gathered by its site's process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from ..methods.facts import Facts
from ..model.layouts import as_matrix
from ..model.sharded import full, full_at, is_sharded, partitioned, shards
from ..model.zero3 import gathering
from .executor import Executor, LocalExecutor, Together
from .processes import (
    exchange_bytes,
    gather,
    lost_process_named,
    outcome_of,
    raise_together,
    rank,
    run_together,
    synchronised,
    world_size,
)
from .reduction import add_at_owner, common_sums, warn_of_equal_data
from .sharded_inputs import absorb_with_weights

if TYPE_CHECKING:
    from ..data.batches import Forward
    from ..data.collect import Groups
    from ..methods.estimator import Estimator
    from ..model.sites import Site
    from ..plan import InitPlan

T = TypeVar("T")


class DistributedExecutor:
    """All processes of the group share the work (an `Executor`). The plan is that of one process within rounding.

    Sums of ranks are added in another order than those of one process. One rank factors a site and sends its factors,
    so that every rank gets the same bits. Every method raises on all ranks what was raised on one.

    Args:
        local: does the work of this process.
        model: where its weights are sharded, else None.
    """

    in_model_order = True

    def __init__(self, local: Executor, model: nn.Module | None = None) -> None:
        self.local, self.sharded = local, model is not None
        self._gathers_modules = model is not None and partitioned(model) > 0
        self._owners: dict[str, int] = {}  # site name → rank
        self._gathered: dict[str, Site] = {}  # sites whose whole weight this process holds at the moment

    def model_call(self, call: Forward, check: Callable[[Any, int], Any] | None = None) -> Forward:
        if not self.sharded:
            return call
        return synchronised(gathering(call) if self._gathers_modules else call, check)

    def run(self, make: Callable[[], T], stage: str = "") -> T:
        return run_together(make, stage)

    def with_weight(self, site: Site) -> Site:
        return self._gathered.get(site.name, site)

    def absorb(self, estimator: Any, groups: Groups, weight: float, sites: Sequence[Site]) -> None:
        if self.sharded:
            absorb_with_weights(self, estimator, groups, weight, sites)
        else:
            self.local.absorb(estimator, groups, weight, sites)

    def add_up(
        self, estimator: Estimator, facts: Facts, sites: Sequence[Site], waiting: Callable[[str], bool]
    ) -> Facts:
        """Ranks may have read different numbers of batches, and a site may have seen no token on some of them."""
        warn_of_equal_data(estimator)
        total = Facts()
        for part in gather(facts):
            total.merge(part)
        groups = [common_sums(sums) for sums in estimator.accumulated]
        names = [site.name for site in sites]
        costs = {site.name: 0.0 if waiting(site.name) else _cost(site) for site in sites}
        linked = linked_names(names, [group.names for of_one in groups for group in of_one])
        self._owners.update(distribute(linked, costs, world_size()))
        devices = {site.name: site.device for site in sites}
        for sums, of_one in zip(estimator.accumulated, groups, strict=True):
            for group in of_one:
                add_at_owner(sums, group, self._owners[group.names[0]], devices[group.names[0]])
        return total

    def own(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in sites if self._owners[site.name] == rank()]

    def map(
        self, sites: Sequence[Site], make: Callable[[Site], T], streams: bool, together: Together[T] | None = None
    ) -> dict[str, T]:
        if any(is_sharded(site.stored) for site in sites):
            return self.map_sharded(sites, make, self._owners)
        return run_together(lambda: self.local.map(self.own(sites), make, streams, together))

    def gather(self, value: T) -> list[T]:
        return gather(value)

    def join(self, part: InitPlan, order: Sequence[str]) -> InitPlan:
        """Every rank reads the plan from the same bytes."""
        if world_size() == 1:
            return part
        data = run_together(part.to_bytes)
        plans = [part.from_bytes(bits, f"the plan of rank {n}") for n, bits in enumerate(exchange_bytes(data))]
        sites = {name: site for plan in plans for name, site in plan.sites.items()}
        return replace(plans[0], sites={name: sites[name] for name in order if name in sites})

    # --- sharded weights -------------------------------------------------------------------------------------

    def map_sharded(self, sites: Sequence[Site], make: Callable[[Site], T], owners: Mapping[str, int]) -> dict[str, T]:
        """One site for every process a round: all send their parts of its weight to its process, which works on it.

        So no process ever holds more than one whole weight. One that fails goes on sending.

        Args:
            owners: site name → the rank that works on it.
        """
        made: dict[str, T] = {}
        failure: Exception | None = None
        queues: dict[int, list[Site]] = {}
        for site in sites:
            queues.setdefault(owners[site.name], []).append(site)
        for round_ in zip_longest(*(queues[owner] for owner in sorted(queues))):
            own = _sent_to_owners([site for site in round_ if site is not None], owners)
            if own is not None and failure is None:
                outcome = outcome_of(partial(self._make_with, own, make))
                if isinstance(outcome, Exception):
                    failure = outcome
                else:
                    made[own.name] = outcome
            del own
        return raise_together(made if failure is None else failure)

    def on_all(self, site: Site, make: Callable[[Site], T] | None) -> T | Exception | None:
        """Return what `make` gives for a site whose weight all processes gather; None where this one only helps."""
        with lost_process_named():
            whole = replace(site, gathered=as_matrix(site.base, full(site.stored)))
        return None if make is None else outcome_of(partial(self._make_with, whole, make))

    def _make_with(self, site: Site, make: Callable[[Site], T]) -> T:
        """Return what `make` gives for a site whose weight is gathered; the estimator finds that weight meanwhile."""
        self._gathered[site.name] = site
        try:
            return make(site)
        finally:
            del self._gathered[site.name]


def _sent_to_owners(sites: Iterable[Site], owners: Mapping[str, int]) -> Site | None:
    """Return this process's one of `sites`, with its weight."""
    own = None
    for site in sites:
        with lost_process_named():
            stored = full_at(site.stored, owners[site.name])
        if stored is not None:
            own = replace(site, gathered=as_matrix(site.base, stored))
    return own


def distribute(groups: Iterable[Sequence[str]], costs: Mapping[str, float], ranks: int) -> dict[str, int]:
    """Name → rank: each group as a whole, the dearest first, to the rank that has least to do so far."""
    loads = [0.0] * ranks
    owners: dict[str, int] = {}
    for group in sorted(groups, key=lambda group: -sum(costs[name] for name in group)):
        least = loads.index(min(loads))
        loads[least] += sum(costs[name] for name in group)
        owners.update(dict.fromkeys(group, least))
    return owners


def linked_names(names: Sequence[str], links: Iterable[Sequence[str]]) -> list[list[str]]:
    """The names in groups: those that any link joins are in the same."""
    label = {name: i for i, name in enumerate(names)}
    for link in links:
        joined = {label[name] for name in link}
        label.update({name: min(joined) for name, i in label.items() if i in joined})
    found: dict[int, list[str]] = {}
    for name, i in label.items():
        found.setdefault(i, []).append(name)
    return list(found.values())


def _cost(site: Site) -> float:
    """The cost of the factors, up to a constant."""
    return float(site.in_features * site.out_features * min(site.in_features, site.out_features))


def choose_executor(model: nn.Module) -> Executor:
    """The executor for a model: this process, or all processes of the group.

    A model with sharded weights is read together also in a group of one.

    Raises:
        ValueError: if the model is parallel by other means than `fully_shard` or ZeRO-3.
    """
    if shards(model):
        return DistributedExecutor(LocalExecutor(), model)
    return DistributedExecutor(LocalExecutor()) if world_size() > 1 else LocalExecutor()
