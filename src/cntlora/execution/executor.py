"""The executor: it decides how the work is spread over processes. Chosen once, when a call begins (`choose_executor`).

Everything that differs between one process and several is a method here. `LocalExecutor` does all work in this process;
`distributed.DistributedExecutor` shares it with the other processes of the process group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..linalg.parallel import side_by_side
from ..methods.estimator import absorb_batch

if TYPE_CHECKING:
    from ..data.batches import Forward
    from ..data.collect import Groups
    from ..methods.estimator import Estimator
    from ..methods.facts import Facts
    from ..model.sites import Site
    from ..plan import InitPlan

T = TypeVar("T")


Together = Callable[[Sequence["Site"]], list[T]]
STACKING = ("cuda",)
"""Types of devices on which small sites are factored as stacks: a CPU works on each of them as fast."""
STACKED = 2**26
"""Entries of the weights of sites that are factored together, at most: 256 MiB in float32."""


class Executor(Protocol):
    """The way in which the work is spread over processes.

    Where there are several, all call the same methods in the same order.

    Attributes:
        in_model_order: whether sites are admitted to a data pass in the order of the model, which is the same on every
            process, and not in the order in which their inputs are seen.
    """

    in_model_order: bool

    def model_call(self, call: Forward, check: Callable[[Any, int], Any] | None = None) -> Forward:
        """`call`, begun on all processes together where that is needed; `check` as in `processes.synchronised`."""

    def run(self, make: Callable[[], T], stage: str = "") -> T:
        """Return what `make` gives; what one process raises is raised on all."""

    def with_weight(self, site: Site) -> Site:
        """The site as this process holds its weight at the moment."""

    def absorb(self, estimator: Estimator, groups: Groups, weight: float, sites: Sequence[Site]) -> None:
        """Hand the inputs of a batch to an `InputReader`, times w_j."""

    def add_up(
        self, estimator: Estimator, facts: Facts, sites: Sequence[Site], waiting: Callable[[str], bool]
    ) -> Facts:
        """Add up the statistics of all processes after a data pass, and assign the sites to processes.

        Args:
            waiting: whether a site waits for another pass over the batches.

        Returns:
            The facts of all batches that all processes read.
        """

    def own(self, sites: Sequence[Site]) -> list[Site]:
        """The sites that were assigned to this process."""

    def map(
        self, sites: Sequence[Site], make: Callable[[Site], T], streams: bool, together: Together[T] | None = None
    ) -> dict[str, T]:
        """Site name → what `make` gives, for the sites of this process; `streams` as for `side_by_side`.

        Args:
            together: the same for several sites at once, where a device gains from that.
        """

    def gather(self, value: T) -> list[T]:
        """The plain value of every process."""

    def join(self, part: InitPlan, order: Sequence[str]) -> InitPlan:
        """The plan of all sites, in this order, from the parts that the processes made; the same on all of them."""


class LocalExecutor:
    """One process does all work (an `Executor`)."""

    in_model_order = False

    def model_call(self, call: Forward, check: Callable[[Any, int], Any] | None = None) -> Forward:
        return call

    def run(self, make: Callable[[], T], stage: str = "") -> T:
        return make()

    def with_weight(self, site: Site) -> Site:
        return site

    def absorb(self, estimator: Any, groups: Groups, weight: float, sites: Sequence[Site]) -> None:
        absorb_batch(estimator, groups, weight)

    def add_up(
        self, estimator: Estimator, facts: Facts, sites: Sequence[Site], waiting: Callable[[str], bool]
    ) -> Facts:
        return facts

    def own(self, sites: Sequence[Site]) -> list[Site]:
        return list(sites)

    def map(
        self, sites: Sequence[Site], make: Callable[[Site], T], streams: bool, together: Together[T] | None = None
    ) -> dict[str, T]:
        """Small sites side by side; on a GPU some together."""
        if not sites:
            return {}
        if together is not None and sites[0].device.type in STACKING:
            parts = list(_parts(sites))
            found = side_by_side(together, parts, [0] * len(parts), sites[0].device, streams)
            return {
                site.name: one
                for part, of_part in zip(parts, found, strict=True)
                for site, one in zip(part, of_part, strict=True)
            }
        rows = [max(site.in_features, site.out_features) for site in sites]
        made = side_by_side(make, sites, rows, sites[0].device, streams)
        return {site.name: result for site, result in zip(sites, made, strict=True)}

    def gather(self, value: T) -> list[T]:
        return [value]

    def join(self, part: InitPlan, order: Sequence[str]) -> InitPlan:
        return part


def _parts(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """The sites in turn, as many at a time as have STACKED entries together, one at least."""
    part: list[Site] = []
    held = 0
    for site in sites:
        size = site.in_features * site.out_features
        if part and held + size > STACKED:
            yield part
            part, held = [], 0
        part.append(site)
        held += size
    if part:
        yield part
