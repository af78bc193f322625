"""Sums over batches, held once for all sites whose inputs have been the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class SharedSums:
    """One running sum a name; names whose sums have had the same terms hold the same tensor.

    A sum is contiguous wherever it is held. LAPACK returns inverses column by column, and a product with a transposed
    layout adds in another order: the last bits of a result would depend on where its sum was held.

    Attributes:
        place: gives the tensor in which a new sum is held: itself, or a copy in memory that is less scarce.
    """

    def __init__(self) -> None:
        self.place: Callable[[Tensor], Tensor] = lambda total: total
        self._sums: dict[str, Tensor] = {}
        self._homes: dict[str, torch.device] = {}  # where its terms came from

    def add(self, names: Sequence[str], term: Tensor, weight: float = 1.0) -> None:
        """Adds weight·`term` to each name's sum, once for all that share it; a sum that others hold too is not edited.

        The first `term` of a sum may become that sum: it is not to be used afterwards.
        """
        groups: dict[int, tuple[Tensor | None, list[str]]] = {}
        for name in names:
            old = self._sums.get(name)
            groups.setdefault(id(old), (old, []))[1].append(name)
        for old, sharing in groups.values():
            if old is None:
                new = term.clone(memory_format=torch.contiguous_format) if len(groups) > 1 else term.contiguous()
                new = self.place(new.mul_(weight) if weight != 1.0 else new)
            elif sum(held is old for held in self._sums.values()) == len(sharing):
                new = old.add_(term.to(old.device), alpha=weight)
            else:
                new = self.place(torch.add(old, term.to(old.device), alpha=weight))
            self._sums.update(dict.fromkeys(sharing, new))
            self._homes.update(dict.fromkeys(sharing, term.device))

    def get(self, name: str) -> Tensor | None:
        """The sum of `name` where its terms came from, or None before the first term. Not to be edited."""
        held = self._sums.get(name)
        return None if held is None else held.to(self._homes[name])

    def same(self, one: str, other: str) -> bool:
        """Whether two names hold the same sum."""
        return self._sums.get(one) is self._sums.get(other)

    def groups(self) -> list[tuple[list[str], Tensor]]:
        """The distinct sums, each with the names that hold it."""
        found: dict[int, tuple[list[str], Tensor]] = {}
        for name, total in self._sums.items():
            found.setdefault(id(total), ([], total))[0].append(name)
        return list(found.values())

    def put(self, names: Sequence[str], total: Tensor) -> None:
        """Replaces the sum of all `names` by one."""
        total = total.contiguous()
        self._sums.update(dict.fromkeys(names, total))
        self._homes.update(dict.fromkeys(names, total.device))

    def drop(self, names: Sequence[str]) -> None:
        """Forgets the sums of `names`."""
        for name in names:
            self._sums.pop(name, None)
