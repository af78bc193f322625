"""Estimators: each is fed one input of one batch at a time, and gives every site its target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..linalg.parallel import full_precision, read_back, side_by_side

if TYPE_CHECKING:
    from ..linalg.low_rank import LowRank
    from ..linalg.moments import Moments
    from ..linalg.sums import SharedSums
    from .facts import Facts
    from .target import Target

END_TO_END = ("cpu",)
"""Types of devices on which every input is worked on from end to end; on others several are queued together."""
QUEUED = 2**30
"""Bytes of d×d results that are queued on a GPU before anything is read back: every layer at once would double what the
sums take."""


@dataclass(frozen=True)
class Contribution:
    """The terms that one batch adds to the sums of the sites that saw it.

    Attributes:
        shared: to those of all sites, or of those in `sharing` where that is not None.
        counts: to what is counted besides, (2, d): Σ x, and n first in the second row.
        own: to those of single sites.
        rank: numerical rank of G of the batch, where it is known.
        rtol: the tolerance of † () there, where it follows from the inputs.
        precision: that of the inputs, where it is needed for the sum over batches.
    """

    shared: Tensor | LowRank | None = None
    sharing: tuple[str, ...] | None = None
    counts: Tensor | None = None
    own: Mapping[str, Tensor] = field(default_factory=dict)
    rank: int | None = None
    rtol: Tensor | None = None
    precision: torch.dtype | None = None


class Estimator(Protocol):
    """Accumulates what a method needs, for every site.

    Attributes:
        accumulated: all that has been summed; several processes add theirs up.
        facts: what is known of the inputs besides.
    """

    accumulated: tuple[SharedSums, ...]
    facts: Facts

    def target(self, name: str, batches: int) -> Target:
        """Make the target of one site, `batches` being those in which it saw a token."""


@runtime_checkable
class InputReader(Estimator, Protocol):
    """An estimator that reads the inputs of the layers.

    One input of one batch goes through `prepare` and `finish`, which depend on nothing that other inputs change, so
    that inputs may be worked on side by side, and then through `add`. On a GPU `prepare` only queues work; the numbers
    of all inputs of a batch are read back together.

    Attributes:
        totals: whether it needs Σ x of the inputs.
        single: whether float32 will do for X Xᵀ of inputs of float32.
        unit: whether every token is scaled to a mean square of 1 first.
        solved_in: the dtype in which eigenpairs of G are found; None for that of the sums.
        early: whether inputs simply add up, so that each may come as soon as all sites that see it are known, and those
            of several calls of one layer apart.
    """

    totals: bool
    single: bool
    unit: bool
    early: bool
    solved_in: torch.dtype | None

    def prepare(self, names: Sequence[str], X: Moments) -> tuple[Any, Tensor | None]:
        """The quick way, and the numbers (m,) float64 that tell whether it holds; None where it always does."""

    def asks_pairs(self, numbers: Sequence[float]) -> bool:
        """Return whether `finish` takes the eigenpairs of G, so that several G may be decomposed together before."""

    def finish(self, names: Sequence[str], X: Moments, prepared: Any, numbers: Sequence[float]) -> Contribution:
        """The contribution, by the quick way if `numbers` allow it."""

    def add(self, names: Sequence[str], contribution: Contribution, weight: float) -> None:
        """Add a contribution times w_j."""


@runtime_checkable
class GradientReader(Estimator, Protocol):
    """An estimator that reads the gradient of the loss by the weights; it may read inputs besides."""

    def add_gradient(self, name: str, G: Tensor, weight: float) -> None:
        """Add ∂L/∂W (k, d) of one batch, times w_j."""

    def has_gradient(self, name: str) -> bool:
        """Return whether a gradient other than zero has come."""


@runtime_checkable
class OutputGradientReader(GradientReader, Protocol):
    """An estimator that reads the gradient of the loss by the outputs of the layers besides."""

    def add_output_gradient(self, name: str, squares: Tensor, weight: float) -> None:
        """Add Σ over tokens of (∂ℓ/∂y)² (k,) of one batch, times w_j, ℓ being the loss of one sample."""


@runtime_checkable
class WeightReader(InputReader, Protocol):
    """An estimator that may need W of a site while it reads the inputs.

    Attributes:
        weight_facts: what the weights decide, site by site, as plain values.
    """

    weight_facts: dict[str, Any]

    def note_weight(self, name: str) -> None:
        """Store what W of a site decides, if it is not known yet."""

    def asks_weight(self, names: Sequence[str], numbers: Sequence[float]) -> tuple[str, ...]:
        """Those of `names` whose W `finish` needs."""


def absorb_batch(estimator: InputReader, groups: Sequence[tuple[Sequence[str], Any]], weight: float) -> None:
    """Add one batch, times w_j: for every distinct input the sites that saw it, and its `Moments`.

    On the CPU small inputs are worked on side by side, each from end to end, so that what it needed is free again.
    On a GPU the work of some is queued first, QUEUED bytes of it, and what decides how to go on is read back together;
    eigenpairs of equal shapes are found together.
    """
    if not groups:
        return
    device = groups[0][1].device
    if device.type in END_TO_END:
        lock = Lock()

        def absorb(group: tuple[Sequence[str], Any]) -> None:
            prepared, numbers = estimator.prepare(*group)
            contribution = estimator.finish(*group, prepared, [] if numbers is None else numbers.tolist())
            with lock:
                estimator.add(group[0], contribution, weight)

        side_by_side(absorb, groups, [X.dim for _, X in groups], device)
        return
    with full_precision(device):
        for part in _queues(groups):
            prepared = [estimator.prepare(*group) for group in part]
            known = read_back([numbers for _, numbers in prepared])
            asking = [X for (_, X), numbers in zip(part, known, strict=True) if estimator.asks_pairs(numbers)]
            if asking:
                asking[0].decompose(asking[1:], estimator.solved_in)
            work = [(*group, ready, numbers) for group, (ready, _), numbers in zip(part, prepared, known, strict=True)]
            contributions = side_by_side(lambda item: estimator.finish(*item), work, [X.dim for _, X in part], device)
            for (names, _), contribution in zip(part, contributions, strict=True):
                estimator.add(names, contribution, weight)


def _queues(groups: Sequence[tuple[Sequence[str], Any]]) -> Iterator[list[tuple[Sequence[str], Any]]]:
    """The inputs in turn, as many at a time as have d×d results of QUEUED bytes together, one at least."""
    part: list[tuple[Sequence[str], Any]] = []
    held = 0
    for names, X in groups:
        size = X.dim**2 * X.dtype.itemsize
        if part and held + size > QUEUED:
            yield part
            part, held = [], 0
        part.append((names, X))
        held += size
    if part:
        yield part
