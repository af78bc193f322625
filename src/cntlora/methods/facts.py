"""Facts of each site that the data tell, besides the sums of the estimators; one rule puts them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..linalg.parallel import read_back
from ..linalg.pseudo_inverse import coarser


@dataclass
class SiteFacts:
    """Facts of one site over a number of batches.

    Attributes:
        calls: batches in which its layer was called; batches: of those, the ones with a token that counts.
        tokens: that count, in all batches; largest_batch: in the batch that has most.
        masks: that were applied, as "stream (what it comes from)".
        unmasked: why no mask was applied, where one was given.
        effective_rank: smallest numerical rank of G over the batches, or that of all inputs together; None where no
            input is read.
        rtol: largest tolerance of †, where it follows from the inputs. A tensor () until `Facts.read_back`.
        precision: coarsest dtype of the inputs, where it is needed for the sum over batches.
        seconds: spent on its statistics; what several sites share is divided among them.
    """

    calls: int = 0
    batches: int = 0
    tokens: int = 0
    largest_batch: int = 0
    masks: set[str] = field(default_factory=set)
    unmasked: set[str] = field(default_factory=set)
    effective_rank: int | None = None
    rtol: Tensor | float | None = None
    precision: torch.dtype | None = None
    seconds: float = 0.0

    def merge(self, other: SiteFacts) -> None:
        """Take in the facts of other batches: the next ones, or those of another process."""
        self.calls += other.calls
        self.batches += other.batches
        self.tokens += other.tokens
        self.seconds += other.seconds
        self.largest_batch = max(self.largest_batch, other.largest_batch)
        self.masks |= other.masks
        self.unmasked |= other.unmasked
        known = [rank for rank in (self.effective_rank, other.effective_rank) if rank is not None]
        self.effective_rank = min(known, default=None)
        self.rtol = _largest(self.rtol, other.rtol)
        if other.precision is not None:
            self.precision = coarser(self.precision, other.precision)


@dataclass
class Facts:
    """Facts of all sites, by name.

    Attributes:
        batches: how many were read.
    """

    batches: int = 0
    _sites: dict[str, SiteFacts] = field(default_factory=dict)

    def __getitem__(self, name: str) -> SiteFacts:
        """The facts of a site; those of one that is not known yet are empty."""
        return self._sites.setdefault(name, SiteFacts())

    def add(
        self,
        names: Sequence[str],
        *,
        rank: int | None = None,
        rtol: Tensor | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        """Take in what an estimator found in the inputs of one batch, for the sites that saw them."""
        for name in names:
            self[name].merge(SiteFacts(effective_rank=rank, rtol=rtol, precision=precision))

    def merge(self, other: Facts) -> None:
        """Take in the facts of other batches."""
        self.batches += other.batches
        for name, facts in other._sites.items():
            self[name].merge(facts)

    def reread(self, other: Facts) -> None:
        """Take in the facts of another pass over the same batches, which are not counted twice."""
        self.batches = 0
        for name in other._sites:
            self[name].calls = self[name].batches = self[name].tokens = 0
        self.merge(other)

    def read_back(self) -> None:
        """Turn tensors into numbers; on a GPU the first thing that waits for them."""
        waiting = [facts for facts in self._sites.values() if isinstance(facts.rtol, Tensor)]
        found = read_back([facts.rtol[None] for facts in waiting if isinstance(facts.rtol, Tensor)])
        for facts, (rtol,) in zip(waiting, found, strict=True):
            facts.rtol = rtol


def _largest(one: Tensor | float | None, other: Tensor | float | None) -> Tensor | float | None:
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.maximum(one, other)  # and not max(), for which a GPU waits
    return max(float(one), float(other))
