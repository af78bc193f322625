"""Several passes over the batches, each for the sites whose statistics fit (`memory.Budget`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..data.memory import Budget
from ..model.sites import Site
from .assemble import Share

T = TypeVar("T")

Again = Callable[[list[Site]], None]
"""Reads the batches once more, for as many of the given sites as there is room for."""


@dataclass
class Passes:
    """Works on the sites whose statistics are there, and reads the batches again for the others (an `assemble.Share`).

    What needs several looks at a site, as adaptive ranks do, reads the batches again for each look. The first site that
    waits is always admitted next, so that it ends.

    Attributes:
        share: with whom the work on the sites that are ready is shared.
        budget: tells which are.
        again: reads the batches once more.
    """

    share: Share
    budget: Budget
    again: Again

    def mine(self, sites: list[Site]) -> list[Site]:
        return self.share.mine(sites)

    def each(self, sites: list[Site], make: Callable[[Site], T], streams: bool) -> dict[str, T]:
        made: dict[str, T] = {}
        todo = list(sites)
        while todo:
            ready = [site for site in todo if site.name in self.budget.admitted]
            if not ready:
                self.again(todo)
                continue
            made |= self.share.each(ready, make, streams)
            todo = [site for site in todo if site.name not in self.budget.admitted]
        return {site.name: made[site.name] for site in sites if site.name in made}

    def everyone(self, values: dict[str, T]) -> dict[str, T]:
        return self.share.everyone(values)
