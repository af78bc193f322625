"""The statistics of a call: what is read of the data for every site, in one pass over the batches or several."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from ..config import InitConfig
from ..data.batches import (
    REPEATABLE,
    KeptBatches,
    body_forward,
    default_forward,
    has_loss,
    has_spare_logits,
    scalar_loss,
    unwrapped,
)
from ..data.collect import collect
from ..data.free_memory import free_bytes
from ..data.gradients import weight_gradients
from ..data.memory import Budget, parse_limits
from ..data.reach import is_watched, unreached
from ..linalg.moments import Moments
from ..messages import counted, quoted
from ..methods.estimator import GradientReader, InputReader, OutputGradientReader
from ..methods.facts import Facts
from ..methods.statistics import GradientSums
from ..model.checks import check_adapter, usable_sites
from ..model.sharded import is_sharded, reshard
from ..model.sites import find_sites
from ..model.weight_files import WeightFiles
from .losses import Losses, loss_alone

if TYPE_CHECKING:
    from ..data.collect import Groups
    from ..methods.estimator import Estimator
    from ..methods.target import Target
    from ..model.sites import Site
    from ..model.ties import Tied
    from .arguments import Request
    from .executor import Executor, Together

T = TypeVar("T")

ON_MISSING = ("raise", "warn")


@dataclass
class Statistics:
    """Statistics that were read of the data, and all that is needed to read it once more.

    Attributes:
        request: the arguments of the call; batches: those of it, kept where they are needed again.
        config: the configuration in force.
        executor: spreads the work over processes.
        sites, skipped: that can be initialised, and that cannot, with the reason.
        tied: sites that share the factors of one of `sites`.
        budget: of which sites the statistics are there, and where they are held.
        estimator: the sums over the batches of the last pass.
        facts: the rest that is known of each site.
        losses: of the batches, for a method whose size the loss finds.
        with_gradient: of sites that waited for another pass, whether they had one other than zero in the first ().
        unreached: sites that the loss of the first row does not depend on; None until that was looked at.
        started, seconds: the clock at the start, and the seconds of the data passes.
    """

    request: Request
    config: InitConfig
    executor: Executor
    sites: list[Site]
    skipped: dict[str, str]
    tied: list[Tied]
    budget: Budget
    started: float
    estimator: Estimator = field(init=False)
    facts: Facts = field(default_factory=Facts)
    losses: Losses = field(default_factory=Losses)
    with_gradient: dict[str, Tensor] = field(default_factory=dict)
    unreached: list[str] | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.batches = self.request.batches
        self.estimator = self._new_estimator()

    def _new_estimator(self) -> Estimator:
        named, executor = {site.name: site for site in self.sites}, self.executor  # not self: a cycle keeps the loader
        estimator = self.config.chosen.estimator(
            lambda name: executor.with_weight(named[name]).working_weight(), self.config
        )
        for sums in estimator.accumulated:
            sums.place, sums.forms = self.budget.place, self.budget.limited and not self.budget.use.free
        return estimator

    # --- passes over the batches -----------------------------------------------------------------------------

    def read(self, sites: list[Site], stage: str) -> None:
        """Read the batches, once more or for the first time, for as many of `sites` as there is room for.

        Args:
            stage: names the moment at which another process may have failed.
        """
        facts = self.executor.run(lambda: self._pass_over(sites), stage)
        total = self.executor.add_up(self.estimator, facts, sites, lambda name: name in self.budget.waiting)
        self.facts.reread(total)
        self.estimator.facts = self.facts

    def _pass_over(self, sites: list[Site]) -> Facts:
        """One pass of this process alone."""
        start = time.perf_counter()
        self.budget.next_pass(sites)
        if self.executor.in_model_order or self.budget.of_gradients:
            self.budget.admit_in_order(sites)
        self.estimator = self._new_estimator()
        facts = self.estimator.facts
        if self.config.chosen.reads != "weights":
            self._collect(sites, facts)
        facts.read_back()
        reshard(self.request.model)
        self.seconds += time.perf_counter() - start
        return facts

    def _collect(self, sites: list[Site], facts: Facts) -> None:
        request, method = self.request, self.config.chosen
        reader = self.estimator if isinstance(self.estimator, InputReader) else None
        _check_request(request, method.name, method.reads, reader is not None)
        spare = self._head_is_spare()
        gradients = method.reads == "gradients"
        loss = request.loss if gradients else None
        with ExitStack() as stack:
            call = loss or request.forward or (body_forward if spare else default_forward)
            call = self.executor.model_call(call, scalar_loss if gradients else None)
            backward = None
            if gradients:
                outputs = self._add_output_gradient if isinstance(self.estimator, OutputGradientReader) else None
                # those that wait for another pass are looked at once, for whether they have a gradient
                read = [s for s in sites if self.budget.use.passes == 1 or s.name in self.budget.admitted]
                backward = stack.enter_context(weight_gradients(request.model, read, self._add_gradient, outputs))
                self.losses, call = Losses(), loss_alone(call)
                call = self.losses.recording(call) if method.has_step_size else call
            collect(
                request.model, sites, self._kept_batches(), partial(self._absorb, facts),
                num_batches=self.config.num_batches, gram=method.gram, forward=call, token_mask=request.token_mask,
                on_output=backward, on_first=self._look(sites, spare),
                step=stack.enter_context(_progress(self.config.num_batches, request.progress)),
                inputs=reader is not None, totals=reader is not None and reader.totals,
                single=reader is not None and reader.single, unit=reader is not None and reader.unit,
                early=reader is not None and reader.early, admits=self.budget.admits,
                by_loss=gradients and (loss is None or getattr(loss, "by_labels", False)), facts=facts,
            )  # fmt: skip
        if method.batch_weights is not None and len(method.batch_weights) != facts.batches:
            raise ValueError(
                f"batch_weights: expected one for each of {counted(facts.batches, 'batch')}, "
                f"got {len(method.batch_weights)}"
            )

    def _absorb(self, facts: Facts, index: int, groups: Groups) -> None:
        """Hand the distinct inputs of one batch to the estimator, each with the sites that saw it."""
        start = time.perf_counter()
        if isinstance(self.estimator, InputReader):
            read = [group for group in groups if isinstance(group[1], Moments)]
            self.executor.absorb(self.estimator, read, self.weight(index), self.sites)
        names = [name for of_one, _ in groups for name in of_one]
        for name in names:
            facts[name].seconds += (time.perf_counter() - start) / len(names)

    def _add_gradient(self, index: int, name: str, G: Tensor) -> None:
        assert isinstance(self.estimator, GradientReader)
        if name in self.budget.admitted:
            self.estimator.add_gradient(name, G, self.weight(index))
        else:
            self.with_gradient[name] = G.any() | self.with_gradient.get(name, False)

    def _add_output_gradient(self, index: int, name: str, squares: Tensor) -> None:
        assert isinstance(self.estimator, OutputGradientReader)
        if name in self.budget.admitted:
            self.estimator.add_output_gradient(name, squares, self.weight(index))

    def _kept_batches(self) -> Iterable[Any]:
        """The batches; kept where they are needed again, since a loader that shuffles would give others then."""
        assert self.batches is not None
        if (self.budget.limited or self.config.chosen.finds_step_size) and not isinstance(self.batches, KeptBatches):
            self.batches = KeptBatches(self.batches, self.config.num_batches)
        return self.batches

    def _head_is_spare(self) -> bool:
        """Return whether the batches can be read without the head of the model, which nobody notices."""
        model = self.request.model
        if self.config.chosen.reads != "inputs" or self.request.forward is not None or is_watched(model):
            return False
        return has_spare_logits(model, [site.layer for site in self.sites])

    def _look(self, sites: list[Site], unasked: bool) -> Callable[[Any, Any], None] | None:
        """Note from the first row which sites the loss does not depend on; for methods that run without gradients.

        Not where a forward pass with gradients changes the state of sharded weights, or where hooks or a function of
        the caller would be called once more; and not again in a second pass.

        Args:
            unasked: whether the loss is not computed although there may be labels (`body_forward`).
        """
        model, call = self.request.model, self.request.forward or default_forward
        if self.config.chosen.reads != "inputs" or call not in REPEATABLE or self.unreached is not None:
            return None
        if any(map(is_sharded, model.parameters())) or is_watched(model):
            return None
        leaders = {tied.leader.name for tied in self.tied}  # which may train by what their followers give

        def look(batch: Any, output: Any) -> None:
            looks = has_loss(output) or (unasked and isinstance(batch, Mapping) and "labels" in batch)
            found = unreached(unwrapped(model), sites, call, batch) if looks else []
            self.unreached = [name for name in found if name not in leaders]

        return look

    def map(
        self, sites: list[Site], make: Callable[[Site], T], streams: bool, together: Together[T] | None = None
    ) -> dict[str, T]:
        """Return what `make` gives for the sites of this process, whose batches are read again where there was no room.

        What needs several looks at a site, as adaptive ranks do, reads the batches again for each look. The first site
        that waits is always admitted next, so that it ends.
        """
        if self.config.chosen.reads == "weights":
            return self.executor.map(sites, make, streams, together)
        made: dict[str, T] = {}
        todo = list(sites)
        while todo:
            ready = [site for site in todo if site.name in self.budget.admitted]
            if not ready:
                self.read(todo, "the end of another pass over its data")
                continue
            made |= self.executor.map(ready, make, streams, together)
            todo = [site for site in todo if site.name not in self.budget.admitted]
        return {site.name: made[site.name] for site in sites if site.name in made}

    def merged(self, values: dict[str, T]) -> dict[str, T]:
        """The plain values that all processes have for their sites, together."""
        return {name: value for part in self.executor.gather(values) for name, value in part.items()}

    # --- what was read of one site ---------------------------------------------------------------------------

    def weight(self, index: int) -> float:
        """w_j of a batch."""
        weights = self.config.chosen.batch_weights
        if weights is not None and index >= len(weights):
            raise ValueError(
                f"batch_weights: expected one for each of the batches, which are more than {index}, got {len(weights)}"
            )
        return 1.0 if weights is None else weights[index]

    def target(self, site: Site) -> Target:
        """The matrix, or its spectrum, that the factors of a site are made from."""
        return self.estimator.target(site.name, self.facts[site.name].batches)

    def has_gradient(self, name: str) -> bool:
        """Return whether a gradient other than zero has come, where gradients are read."""
        if not isinstance(self.estimator, GradientReader):
            return True
        return self.estimator.has_gradient(name) if name in self.budget.admitted else name in self.with_gradient

    def rtol(self, site: Site) -> float | None:
        """The largest tolerance of † at a site over the batches; None without †."""
        facts = self.facts[site.name]
        if facts.rtol is not None:  # where it follows from the inputs
            return float(facts.rtol)
        return self.config.chosen.rtol_at(site.out_features, site.in_features, facts.largest_batch)

    def slope(self, site: Site, B: Tensor, A: Tensor) -> Tensor:
        """⟨∂L/∂W, B·A⟩ (), L being the mean loss over the batches with their w_j."""
        assert isinstance(self.estimator, GradientSums)
        weights = self.config.chosen.batch_weights  # each process has as many
        total = self.facts.batches * (1.0 if weights is None else sum(weights) / len(weights))
        if total <= 0:
            raise ValueError(f"batch_weights: expected a sum above 0, as of a mean of losses, got {quoted(weights)}")
        return self.estimator.slope(site.name, B, A) / total


def read_statistics(request: Request, executor: Executor) -> Statistics:
    """Check the arguments and the model, and make the first pass over the batches.

    Raises:
        ValueError, TypeError: with the site or batch, what was expected, what came and what to change.
    """
    statistics = executor.run(lambda: prepared(request, executor), "the end of its data")
    bound_by_free(statistics)
    try:
        statistics.read(statistics.sites, "the end of its data")
    except BaseException:
        statistics.budget.close()
        raise
    return statistics


def bound_by_free(statistics: Statistics) -> float:
    """Set the limit of the statistics by what is free, where the caller has set none; returns that.

    Where there are several processes, all have to call it: the least that one of them has counts for all.
    """
    devices = {site.device for site in statistics.sites}
    free = min(statistics.executor.gather(min(map(free_bytes, devices), default=float("inf"))))
    if statistics.request.max_memory is None and statistics.config.chosen.reads != "weights":
        statistics.budget.bound_by_free(statistics.sites, free)
    return free


def prepared(request: Request, executor: Executor) -> Statistics:
    """Check the arguments and the model; nothing is read yet."""
    started = time.perf_counter()
    config = request.config or InitConfig()
    if request.on_missing not in ON_MISSING:
        raise ValueError(f"on_missing: expected one of {', '.join(ON_MISSING)}, got {quoted(request.on_missing)}")
    limits = parse_limits(request.max_memory)
    adapter = request.adapter_name
    found = find_sites(request.model, adapter)
    sites, tied, skipped = usable_sites(request.model, found, adapter, config, request.on_missing)
    if request.weights is not None:
        files = WeightFiles(request.weights)
        sites = [files.serve(site) for site in sites]
        tied = [replace(t, site=files.serve(t.site)) for t in tied]
    for site in (*sites, *(t.site for t in tied)):
        check_adapter(site, config)
    budget = Budget(limits, of_gradients=config.chosen.reads == "gradients", own_sums=config.chosen.site_sums)
    statistics = Statistics(request, config, executor, sites, skipped, tied, budget, started)
    reader = statistics.estimator
    budget.of_inputs = isinstance(reader, InputReader)
    if isinstance(reader, InputReader):
        budget.single, budget.early, budget.solved_in = reader.single, reader.early, reader.solved_in
    return statistics


def _check_request(request: Request, method: str, reads: str, reads_inputs: bool) -> None:
    if request.batches is None:
        raise ValueError(f"batches: method {method!r} reads {reads}, so it needs some; give a DataLoader or a list")
    if not reads_inputs and request.token_mask is not None:
        raise ValueError(
            f"token_mask: has no effect with method {method!r}, which reads gradients: the loss decides which "
            "tokens count (label padding −100); leave it out"
        )


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
