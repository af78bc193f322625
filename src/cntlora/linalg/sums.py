"""Sums over batches, held once for all sites whose inputs have been the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .low_rank import LowRank
from .symmetric import Symmetric

Held = Tensor | LowRank | Symmetric


class SharedSums:
    """One running sum a name; names whose sums have had the same terms hold the same tensor.

    A sum is contiguous wherever it is held. LAPACK returns inverses column by column, and a product with a transposed
    layout adds in another order: the last bits of a result would depend on where its sum was held.

    Args:
        symmetric: whether all terms are symmetric matrices; sums that are formed are then held by one triangle.

    Attributes:
        place: gives the tensor in which a new sum is held: itself, or a copy in memory that is less scarce.
        forms: whether every sum is formed; else one of low rank is held by its rows while that pays.
    """

    def __init__(self, symmetric: bool = False) -> None:
        self.symmetric = symmetric
        self.place: Callable[[Tensor], Tensor] = lambda total: total
        self.forms = False
        self._sums: dict[str, Held] = {}
        self._homes: dict[str, torch.device] = {}  # where its terms came from

    def add(self, names: Sequence[str], term: Tensor | LowRank, weight: float = 1.0) -> None:
        """Add weight·`term` to each name's sum, once for all that share it; a sum that others hold too is not edited.

        The first `term` of a sum may become that sum: it is not to be used afterwards.
        """
        groups: dict[int, tuple[Held | None, list[str]]] = {}
        for name in names:
            old = self._sums.get(name)
            groups.setdefault(id(old), (old, []))[1].append(name)
        if isinstance(term, LowRank):
            self._add_low_rank(list(groups.values()), term.scaled(weight))
            return
        for old, sharing in groups.values():
            alone = sum(held is old for held in self._sums.values()) == len(sharing)
            self._sums.update(dict.fromkeys(sharing, self._plus(old, term, weight, alone, len(groups) > 1)))
            self._homes.update(dict.fromkeys(sharing, term.device))

    def _plus(self, old: Held | None, term: Tensor, weight: float, alone: bool, term_stays: bool) -> Held:
        """A sum with one more term.

        Args:
            alone: whether no other name holds `old`, which may then be edited; term_stays: whether `term` may not be.
        """
        if isinstance(old, LowRank):
            return self._placed(old.dense().to(term).add_(term, alpha=weight))
        if isinstance(old, Symmetric):
            held = old if alone else Symmetric(self.place(old.flat.clone()), old.d)
            return held.add_(term.to(held.flat.device), weight)
        if old is None:
            new = term.clone(memory_format=torch.contiguous_format) if term_stays else term.contiguous()
            return self._placed(new.mul_(weight) if weight != 1.0 else new)
        if alone:
            return old.add_(term.to(old.device), alpha=weight)
        return self.place(torch.add(old, term.to(old.device), alpha=weight))

    def _placed(self, total: Tensor) -> Held:
        """A new sum where there is room for it."""
        if not self.symmetric:
            return self.place(total)
        half = Symmetric.of(total)
        return Symmetric(self.place(half.flat), half.d)

    def _add_low_rank(self, groups: Sequence[tuple[Held | None, list[str]]], term: LowRank) -> None:
        """Add a term that is known by its rows, which stays so while the sum pays."""
        formed: Tensor | None = None
        for old, sharing in groups:
            total = old.plus(term) if isinstance(old, LowRank) else term
            if not isinstance(old, (Tensor, Symmetric)) and total.pays and not self.forms:
                self._sums.update(dict.fromkeys(sharing, total))
                self._homes.update(dict.fromkeys(sharing, term.terms[0].rows.device))
            else:
                formed = term.dense() if formed is None else formed
                self.add(sharing, formed.clone() if len(groups) > 1 else formed)

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def held(self, name: str) -> Tensor | LowRank | None:
        """The sum of `name` as it is held, where its terms came from, or None before the first term."""
        total = self._sums.get(name)
        if isinstance(total, Symmetric):
            return total.dense(self._homes[name])
        return None if total is None else total.to(device=self._homes[name])

    def get(self, name: str) -> Tensor | None:
        """The sum of `name` where its terms came from, or None before the first term. Not to be edited."""
        total = self.held(name)
        return total.dense() if isinstance(total, LowRank) else total

    def key(self, name: str) -> int:
        """The same for names that hold the same sum, as long as nothing is added."""
        return id(self._sums.get(name))

    def same(self, one: str, other: str) -> bool:
        """Return whether two names hold the same sum."""
        return self._sums.get(one) is self._sums.get(other)

    def groups(self) -> list[tuple[list[str], Tensor]]:
        """The distinct sums, each with the names that hold it, ordered by these; all are formed.

        Threads add sums in any order, and processes compare these lists.
        """
        for whole in {id(held): held for held in self._sums.values() if not isinstance(held, Tensor)}.values():
            self.put([name for name, held in self._sums.items() if held is whole], self.place(whole.dense()))
        found: dict[int, tuple[list[str], Tensor]] = {}
        for name, total in self._sums.items():
            assert isinstance(total, Tensor)
            found.setdefault(id(total), ([], total))[0].append(name)
        return sorted(found.values(), key=lambda group: min(group[0]))

    def of_low_rank(self) -> list[LowRank]:
        """The distinct sums that are held by their rows."""
        return list({id(held): held for held in self._sums.values() if isinstance(held, LowRank)}.values())

    def put(self, names: Sequence[str], total: Tensor) -> None:
        """Replace the sum of all `names` by one."""
        total = total.contiguous()
        self._sums.update(dict.fromkeys(names, total))
        self._homes.update(dict.fromkeys(names, total.device))

    def drop(self, names: Sequence[str]) -> None:
        """Forget the sums of `names`."""
        for name in names:
            self._sums.pop(name, None)
