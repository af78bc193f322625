"""The passes over the data: from the model and its batches to the statistics of every site."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import InitConfig
from ..data.batches import REPEATABLE, Forward, default_forward, device_of, first_batches, unwrapped
from ..data.collect import Seen, collect
from ..data.gradients import loss_in, weight_gradients
from ..data.memory import Budget, MaxMemory, parse_limits
from ..data.padding import TokenMask
from ..data.reach import has_loss, is_watched, unreached
from ..messages import quoted
from ..methods.estimator import GradientReader, InputReader
from ..model.checks import check_adapter, usable_sites
from ..model.sharded import is_sharded, reshard
from ..model.sites import Site
from ..model.ties import Tied
from ..model.weight_files import WeightFiles
from .assemble import Take, Work, working_weight

Loss = Callable[[nn.Module, Any], Any]

ON_MISSING = ("raise", "warn")


@dataclass
class Request:
    """What is asked for: the arguments of `compute_plan`, and how several processes go about it.

    Attributes:
        take: hands the inputs of each batch to the estimator, in place of the usual way (`Work.take`).
        in_order: admit sites in the order of the model, which is the same for every process, and not as they are seen.
        weights: where W is read from, in place of the model.
    """

    model: nn.Module
    batches: Iterable[Any] | None = None
    config: InitConfig | None = None
    forward: Forward | None = None
    loss: Loss | None = None
    token_mask: TokenMask = None
    adapter_name: str = "default"
    on_missing: str = "raise"
    progress: bool = True
    max_memory: MaxMemory = None
    take: Take | None = None
    in_order: bool = False
    weights: str | os.PathLike[str] | None = None


@dataclass
class Reading:
    """What `read` found, from which `plan_from` makes the plan.

    Attributes:
        request: what was asked for.
        sites, skipped: that can be initialised, and that cannot, with the reason.
        tied: sites that share the factors of one of `sites`.
        unreached: sites that the loss of the first row does not depend on, once that was `looked` at.
        work, seen: the statistics of the data.
        budget: which sites they are of, and where they are held.
        started, seconds: the clock at the start, and the seconds of the data passes.
        losses: of the batches, for a method whose size is found by the loss.
    """

    request: Request
    sites: list[Site]
    skipped: dict[str, str]
    work: Work
    budget: Budget
    started: float
    seen: Seen = field(default_factory=Seen)
    seconds: float = 0.0
    tied: list[Tied] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    looked: bool = False
    losses: Losses = field(default_factory=lambda: Losses())

    def pass_over(self, sites: list[Site]) -> Seen:
        """Reads the batches, once more or for the first time, for as many of `sites` as there is room for.

        Returns:
            What of `sites` was seen, by this process alone.
        """
        start = time.perf_counter()
        self.budget.next_pass(sites)
        if self.request.in_order or self.budget.of_gradients:
            self.budget.admit_in_order(sites)
        facts = self.work.estimator.facts
        named = self.work.sites  # and not self: a cycle would keep the loader alive
        self.work.estimator = self.work.config.method.estimator(
            lambda name: working_weight(named[name]), self.work.config
        )
        self.work.estimator.facts.update(facts)
        for sums in self.work.estimator.accumulated:
            sums.place = self.budget.place
        seen = _read(self, sites)
        self.work.estimator.facts.plain()
        reshard(self.request.model)
        self.seconds += time.perf_counter() - start
        return seen

    def again(self, sites: list[Site]) -> None:
        """Another pass of this process alone."""
        self.seen.update(self.pass_over(sites))


def read(request: Request) -> Reading:
    """The first half of `compute_plan`: checks, and the first data pass. Errors are its."""
    started = time.perf_counter()
    config = request.config or InitConfig()
    if request.on_missing not in ON_MISSING:
        raise ValueError(f"on_missing: expected one of {', '.join(ON_MISSING)}, got {quoted(request.on_missing)}")
    limits = parse_limits(request.max_memory)
    sites, tied, skipped = usable_sites(request.model, request.adapter_name, config, request.on_missing)
    if request.weights is not None:
        files = WeightFiles(request.weights)
        sites = [files.serve(site) for site in sites]
        tied = [replace(t, site=files.serve(t.site)) for t in tied]
    for site in (*sites, *(t.site for t in tied)):
        check_adapter(site, config)
    by_name = {site.name: site for site in sites}
    method = config.method
    work = Work(method.estimator(lambda name: working_weight(by_name[name]), config), config, by_name)
    work.take = request.take or work.take
    budget = Budget(
        limits,
        of_gradients=method.reads == "gradients",
        of_inputs=isinstance(work.estimator, InputReader),
        own_sums=method.site_sums,
    )
    reading = Reading(request, sites, skipped, work, budget, started, tied=tied)
    try:
        reading.again(sites)
    except BaseException:
        budget.close()
        raise
    return reading


def _read(reading: Reading, sites: list[Site]) -> Seen:
    """One data pass, if the method needs one."""
    request, work = reading.request, reading.work
    config, reads = work.config, work.config.method.reads
    if reads == "weights":
        return Seen()
    inputs = isinstance(work.estimator, InputReader)
    _check_request(request, config.method.name, reads, inputs)
    with ExitStack() as stack:
        backward, forward = None, request.forward
        if reads == "gradients":
            backward = stack.enter_context(weight_gradients(request.model, sites, _gradient_sink(work)))
            forward = request.loss or forward
            if config.method.sized:
                reading.losses = Losses()
                forward = reading.losses.noted(forward or default_forward)
        totals = isinstance(work.estimator, InputReader) and work.estimator.totals
        step = stack.enter_context(_progress(config.num_batches, request.progress))
        seen = collect(
            request.model, sites, _batches(request, config, reading.budget), work.absorb,
            num_batches=config.num_batches, gram=config.method.gram, forward=forward, token_mask=request.token_mask,
            on_output=backward, on_first=_looking(reading, sites), step=step, inputs=inputs, totals=totals,
            admits=reading.budget.admits,
            by_loss=backward is not None and (request.loss is None or getattr(request.loss, "by_labels", False)),
        )  # fmt: skip
    if config.method.batch_weights is not None and len(config.method.batch_weights) != seen.batches:
        raise ValueError(
            f"batch_weights: expected one for each of {seen.batches} batches, got {len(config.method.batch_weights)}"
        )
    return seen


def _looking(reading: Reading, sites: list[Site]) -> Callable[[Any, Any], None] | None:
    """Notes from the first row which sites the loss does not depend on; for methods that run without gradients.

    Not where a forward pass with gradients changes the state of sharded weights, or where hooks or a function of the
    caller would be called once more; and not again in a second pass.
    """
    request = reading.request
    call = request.forward or default_forward
    if reading.work.config.method.reads != "inputs" or call not in REPEATABLE or reading.looked:
        return None
    if any(map(is_sharded, request.model.parameters())) or is_watched(request.model):
        return None
    leaders = {tied.leader.name for tied in reading.tied}  # which may train by what their followers give

    def look(batch: Any, output: Any) -> None:
        reading.looked = True
        if has_loss(output):
            found = unreached(unwrapped(request.model), sites, call, batch)
            reading.unreached = [name for name in found if name not in leaders]

    return look


def _batches(request: Request, config: InitConfig, budget: Budget) -> Iterable[Any]:
    """The batches; kept where they are needed again, since a loader that shuffles would give others then."""
    assert request.batches is not None
    if (budget.limited or config.method.finds_size) and not isinstance(request.batches, _Kept):
        request.batches = _Kept(request.batches, config.num_batches)
    return request.batches


class Losses:
    """The losses of the batches of a data pass, and whether they depend on torch's random generators.

    Attributes:
        noisy: whether a call drew random numbers, so that another one of the same batch gives another loss.
    """

    def __init__(self) -> None:
        self.noisy = False
        self._losses: list[Tensor] = []

    def noted(self, call: Forward) -> Forward:
        """`call`, whose losses are kept."""

        def noting(model: nn.Module, batch: Any) -> Any:
            before = _random_states(model)
            output = call(model, batch)
            self.noisy |= not all(map(torch.equal, before, _random_states(model)))
            self._losses.append(loss_in(output, len(self._losses)).detach())
            return output

        return noting

    def first(self, count: int) -> list[float]:
        """The first so many, read back from the device at once."""
        return torch.stack([loss.double().reshape(()) for loss in self._losses[:count]]).tolist() if count else []


def _random_states(model: nn.Module) -> list[Tensor]:
    """Of the CPU's generator, and of that of the GPU which the model is on."""
    device = device_of(model)
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


class _Kept:
    """Gives the first batches of a source, and later the very same again; else it is the source."""

    def __init__(self, source: Iterable[Any], count: int) -> None:
        self.source, self.count = source, count
        self.batches: list[Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)  # a DataLoader's generators, which are left as found

    def __iter__(self) -> Iterator[Any]:
        if self.batches is not None:
            yield from self.batches
            return
        self.batches = []
        for batch in first_batches(self.source, self.count):
            self.batches.append(batch)
            yield batch


def _check_request(request: Request, method: str, reads: str, reads_inputs: bool) -> None:
    if request.batches is None:
        raise ValueError(f"batches: method {method!r} reads {reads}, so it needs some; give a DataLoader or a list")
    if not reads_inputs and request.token_mask is not None:
        raise ValueError(
            f"token_mask: has no effect with method {method!r}, which reads gradients: the loss decides which "
            "tokens count (label padding −100); leave it out"
        )


def _gradient_sink(work: Work) -> Callable[[int, str, Tensor], None]:
    estimator = work.estimator
    assert isinstance(estimator, GradientReader)

    def sink(index: int, name: str, G: Tensor) -> None:
        estimator.add_gradient(name, G, work.weight(index))

    return sink


@contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[], None]]:
    """A counter of the batches on a terminal, nothing elsewhere."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda: None
        return
    count = 0

    def advance() -> None:
        nonlocal count
        count += 1
        sys.stderr.write(f"\rreading batches {count}/{total}")
        sys.stderr.flush()

    try:
        yield advance
    finally:
        sys.stderr.write("\r\033[K")  # the line is empty again
        sys.stderr.flush()
