"""`compute_plan`: sites → what the method reads → factors and ranks → plan. Changes nothing."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .assemble import DTYPE, Work, plan_sites
from .batches import Forward, TokenMask
from .collect import Seen, collect
from .config import InitConfig
from .core.family import METHODS
from .core.solve import GradientEstimator
from .gradients import weight_gradients
from .notices import warn_caller
from .plan import InitPlan
from .sites import Site, config_holder, find_sites
from .version import VERSION

Loss = Callable[[nn.Module, Any], Any]

ON_MISSING = ("raise", "warn")


def compute_plan(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    config: InitConfig | None = None,
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
    token_mask: TokenMask = None,
    adapter_name: str = "default",
    on_missing: str = "raise",
    progress: bool = True,
) -> InitPlan:
    """Reads the weights and the first `config.num_batches` batches and works out the factors; changes nothing.

    Args:
        model: carries LoRA layers with the adapter `adapter_name`, freshly made (B = 0).
        batches: iterable of mappings, tuples or tensors, of any batch size; only its first batches are read. May be
            None for the methods that read the weights alone (lora, pissa, olora), which never look at it.
        config: the choices; None for the defaults.
        forward: how to call the model, `forward(model, batch)`; None for model(**batch), (*batch) or (batch).
        loss: for the methods that read gradients (lora_ga, lora_one): `loss(model, batch)`, a scalar; None for the loss
            in the model's own output, which transformers models give when the batch has labels.
        token_mask: which tokens count: None for the attention mask in the batch, "labels" for those with a label
            besides, "none" for all, or a function of the batch.
        adapter_name: of the adapter, where the model has several.
        on_missing: "raise" if a target cannot be initialised, or "warn" and leave it plain LoRA.
        progress: show a bar on a terminal.

    Raises:
        ValueError, TypeError: with the site or batch, what was expected, what came and what to change.
    """
    return plan_from(
        read(
            model,
            batches,
            config,
            forward=forward,
            loss=loss,
            token_mask=token_mask,
            adapter_name=adapter_name,
            on_missing=on_missing,
            progress=progress,
        )
    )


@dataclass
class Reading:
    """What `read` found, from which `plan_from` makes the plan.

    Attributes:
        sites, skipped: that can be initialised, and that cannot, with the reason.
        work, seen: the statistics of the data.
        on_missing: as given to `read`.
        started, seconds: the clock at the start, and the seconds of the data pass.
    """

    sites: list[Site]
    skipped: dict[str, str]
    work: Work
    seen: Seen
    on_missing: str
    started: float
    seconds: float


def read(
    model: nn.Module,
    batches: Iterable[Any] | None,
    config: InitConfig | None,
    *,
    forward: Forward | None,
    loss: Loss | None,
    token_mask: TokenMask,
    adapter_name: str,
    on_missing: str,
    progress: bool,
) -> Reading:
    """The first half of `compute_plan`: checks, and the data pass. Arguments and errors are its."""
    started = time.perf_counter()
    config = config or InitConfig()
    if on_missing not in ON_MISSING:
        raise ValueError(f"on_missing: expected one of {', '.join(ON_MISSING)}, got {on_missing!r}")
    sites, skipped = _usable_sites(model, adapter_name, config, on_missing)
    for site in sites:
        _check_adapter(site, config)
    by_name = {site.name: site for site in sites}
    work = Work(METHODS[config.method].estimator(lambda name: by_name[name].weight(DTYPE), config), config)
    seen = _read(model, sites, batches, work, (forward, loss, token_mask), progress)
    return Reading(sites, skipped, work, seen, on_missing, started, time.perf_counter() - started)


def plan_from(reading: Reading) -> InitPlan:
    """The second half of `compute_plan`: estimates, factors and ranks from what was read."""
    starved = _starved(reading.sites, reading.seen, reading.work)
    _report_missing(starved, reading.on_missing)
    fed = [site for site in reading.sites if site.name not in starved]
    return InitPlan(
        sites=plan_sites(fed, reading.work, reading.seen),
        config=reading.work.config,
        skipped={**reading.skipped, **starved},
        batches=reading.seen.batches,
        seconds=time.perf_counter() - reading.started,
        forward_seconds=reading.seconds,
        versions=_versions(),
    )


def _read(
    model: nn.Module,
    sites: list[Site],
    batches: Iterable[Any] | None,
    work: Work,
    call: tuple[Forward | None, Loss | None, TokenMask],
    progress: bool,
) -> Seen:
    """The data pass, if the method needs one."""
    config, (forward, loss, token_mask) = work.config, call
    reads = METHODS[config.method].reads
    if reads == "weights":
        return Seen()
    if batches is None:
        raise ValueError(
            f"batches: method {config.method!r} reads {reads}, so it needs some; give a DataLoader or a list"
        )
    if reads == "gradients" and token_mask is not None:
        raise ValueError(
            f"token_mask: has no effect with method {config.method!r}, which reads gradients: the loss decides which "
            "tokens count (label padding −100); leave it out"
        )
    with ExitStack() as stack:
        backward = None
        if reads == "gradients":
            backward = stack.enter_context(weight_gradients(model, sites, _gradient_sink(work)))
            forward = loss or forward
        step = stack.enter_context(_progress(config.num_batches, progress))
        seen = collect(
            model, sites, batches, work.absorb, num_batches=config.num_batches, gram=config.gram,
            forward=forward, token_mask=token_mask, on_output=backward, step=step,
        )  # fmt: skip
    if config.batch_weights is not None and len(config.batch_weights) != seen.batches:
        raise ValueError(
            f"batch_weights: expected one for each of {seen.batches} batches, got {len(config.batch_weights)}"
        )
    return seen


def _gradient_sink(work: Work) -> Callable[[int, str, Tensor], None]:
    estimator = work.estimator
    assert isinstance(estimator, GradientEstimator)

    def sink(index: int, name: str, G: Tensor) -> None:
        if not bool(torch.isfinite(G).all()):
            raise ValueError(f"site {name}, batch {index}: its gradient has NaN or Inf; check the batch and the dtype")
        estimator.add(name, G, work.weight(index))

    return sink


def _versions() -> dict[str, str]:
    return {"cntlora": VERSION, "torch": torch.__version__}


def _usable_sites(
    model: nn.Module, adapter: str, config: InitConfig, on_missing: str
) -> tuple[list[Site], dict[str, str]]:
    sites, refused = find_sites(model, adapter)
    holder = config_holder(model, adapter)
    lora: Any = None if holder is None else holder[1].peft_config[adapter]  # type: ignore[index,union-attr]
    started_by = getattr(lora, "init_lora_weights", True)
    if started_by not in (True, False, "gaussian"):
        raise ValueError(
            f"adapter {adapter!r} was made with init_lora_weights={started_by!r}; expected True, so that the base is "
            "untouched and no other initialisation is on top. Make the adapter again with init_lora_weights=True"
        )
    method = METHODS[config.method]
    factors_weight = method.reads != "gradients" and not method.zero_start
    for site in sites:
        check_fresh(site)
        if factors_weight and not bool(site.base.weight.detach().any()):
            refused[site.name] = "its pretrained weight is all zeros, so every estimate is zero; leave it out"
    _report_missing(refused, on_missing)
    return [site for site in sites if site.name not in refused], refused


def check_fresh(site: Site) -> None:
    """Raises ValueError if the adapter has been trained, initialised before, or merged: nothing may be lost."""
    if site.adapter in getattr(site.layer, "merged_adapters", ()):
        raise ValueError(
            f"site {site.name}: adapter {site.adapter!r} is merged into the base; call unmerge_adapter() first"
        )
    if bool((site.B.detach() != 0).any()):
        raise ValueError(
            f"site {site.name}: adapter {site.adapter!r} is not fresh (its lora_B is not zero), and initialising would "
            "overwrite it; make a new adapter with init_lora_weights=True"
        )


def _check_adapter(site: Site, config: InitConfig) -> None:
    """Raises ValueError where the rank or the scaling that the adapter has cannot hold the factors."""
    width = METHODS[config.method].width
    most = min(site.in_features, site.out_features) // width
    if site.rank > most and not config.adaptive_ranks:
        limit = "min(in, out)" if width == 1 else f"min(in, out)/{width}, which {config.method} needs"
        raise ValueError(f"site {site.name}: rank {site.rank} is above {limit} = {most}; lower r")
    if (site.scaling <= 0 and not config.fold_alpha) or config.strength_at(site.scaling) <= 0:
        raise ValueError(
            f"site {site.name}: scaling {site.scaling:g} cannot carry strength·[ΔW]_r; expected lora_alpha above 0 "
            "(or fold_alpha=True, which sets the scaling to 1, with a strength)"
        )


def _report_missing(problems: Mapping[str, str], on_missing: str) -> None:
    if not problems:
        return
    name, reason = next(iter(problems.items()))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    message = f"site {name} cannot be initialised: {reason}{more}"
    if on_missing == "raise":
        raise ValueError(f"{message}. Or leave such sites as plain LoRA with on_missing='warn'")
    warn_caller(f"{message}; left as plain LoRA")


def _starved(sites: list[Site], seen: Seen, work: Work) -> dict[str, str]:
    """Sites for which the data gave nothing, with the reason."""
    reads = METHODS[work.config.method].reads
    if reads == "weights":
        return {}
    starved = {s.name: _starved_reason(s.name, seen) for s in sites if not seen.site_batches.get(s.name)}
    if isinstance(work.estimator, GradientEstimator):
        silent = [s.name for s in sites if s.name not in starved and not work.estimator.has_gradient(s.name)]
        starved |= dict.fromkeys(silent, "the loss does not depend on it: its gradient is zero in every batch")
    return starved


def _starved_reason(name: str, seen: Seen) -> str:
    if name not in seen.tokens:
        return f"its layer was not called in any of {seen.batches} batches; does this data reach it?"
    return f"it saw no token that counts in {seen.batches} batches; read more batches or check the masks"


@contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[], None]]:
    """A bar over the batches on a terminal, nothing elsewhere."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda: None
        return
    state = random.getstate()  # rich draws a number when it is first imported
    from rich.console import Console
    from rich.progress import Progress

    random.setstate(state)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading batches", total=total)
        yield lambda: bar.advance(task)
