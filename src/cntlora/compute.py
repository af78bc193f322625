"""`compute_plan`: sites → inputs → ΔW → factors → ranks → plan. Changes nothing."""

from __future__ import annotations

import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Forward, TokenMask
from .collect import Seen, collect
from .config import InitConfig
from .core.allocate import allocate
from .core.factor import Spectrum, offset, paired, qr_factors, spectrum, svd_factors
from .core.family import METHODS
from .core.linalg import default_rtol
from .core.moments import Moments
from .core.solve import Estimator
from .plan import InitPlan, SitePlan, weight_sketch
from .sites import Site, config_holder, find_sites
from .version import VERSION

ON_MISSING = ("raise", "warn")
DTYPE = torch.float64


@dataclass
class _Work:
    """What is known of each site while the plan is made."""

    estimator: Estimator
    config: InitConfig
    effective_rank: dict[str, int] = field(default_factory=dict)
    largest_batch: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def absorb(self, index: int, names: tuple[str, ...], X: Moments) -> None:
        """One input of one batch."""
        weights = self.config.batch_weights
        if weights is not None and index >= len(weights):
            raise ValueError(
                f"batch_weights: expected one for each of the batches, which are more than {index}, got {len(weights)}"
            )
        start = time.perf_counter()
        rank = self.estimator.absorb(names, X, 1.0 if weights is None else weights[index])
        share = (time.perf_counter() - start) / len(names)
        for name in names:
            self.effective_rank[name] = min(rank, self.effective_rank.get(name, rank))
            self.largest_batch[name] = max(X.tokens, self.largest_batch.get(name, 0))
            self.seconds[name] = self.seconds.get(name, 0.0) + share

    def rtol(self, site: Site) -> float:
        """The tolerance of † at a site, of its largest batch where that depends on the batch."""
        if self.config.rtol is not None:
            return self.config.rtol
        other = site.out_features if self.config.method == "shift" else self.largest_batch[site.name]
        return default_rtol(site.in_features, other, DTYPE)


def compute_plan(
    model: nn.Module,
    batches: Iterable[Any],
    config: InitConfig | None = None,
    *,
    forward: Forward | None = None,
    token_mask: TokenMask = None,
    adapter_name: str = "default",
    on_missing: str = "raise",
    progress: bool = True,
) -> InitPlan:
    """Reads the weights and the first `config.num_batches` batches and works out the factors; changes nothing.

    Args:
        model: carries LoRA layers with the adapter `adapter_name`, freshly made (B = 0).
        batches: iterable of mappings, tuples or tensors, of any batch size; only its first batches are read.
        config: the choices; None for the defaults.
        forward: how to call the model, `forward(model, batch)`; None for model(**batch), (*batch) or (batch).
        token_mask: which tokens count: None for the attention mask in the batch, "labels" for those with a label
            besides, "none" for all, or a function of the batch.
        adapter_name: of the adapter, where the model has several.
        on_missing: "raise" if a target cannot be initialised, or "warn" and leave it plain LoRA.
        progress: show a bar on a terminal.

    Raises:
        ValueError, TypeError: with the site or batch, what was expected, what came and what to change.
    """
    started = time.perf_counter()
    config = config or InitConfig()
    if on_missing not in ON_MISSING:
        raise ValueError(f"on_missing: expected one of {', '.join(ON_MISSING)}, got {on_missing!r}")
    sites, skipped = _usable_sites(model, adapter_name, on_missing)
    for site in sites:
        _check_adapter(site, config)
    weights = {site.name: site for site in sites}
    work = _Work(METHODS[config.method].estimator(lambda name: weights[name].weight(DTYPE), config), config)
    with _progress(config.num_batches, progress) as step:
        seen = collect(
            model, sites, batches, work.absorb, num_batches=config.num_batches, gram=config.gram,
            forward=forward, token_mask=token_mask, step=step,
        )  # fmt: skip
    if config.batch_weights is not None and len(config.batch_weights) != seen.batches:
        raise ValueError(
            f"batch_weights: expected one for each of {seen.batches} batches, got {len(config.batch_weights)}"
        )
    forward_seconds = time.perf_counter() - started
    starved = {s.name: _starved_reason(s.name, seen) for s in sites if not seen.site_batches.get(s.name)}
    _report_missing(starved, on_missing)
    fed = [s for s in sites if s.name not in starved]
    plans = _plan_sites(fed, work, seen, config)
    return InitPlan(
        sites=plans,
        config=config,
        skipped={**skipped, **starved},
        batches=seen.batches,
        seconds=time.perf_counter() - started,
        forward_seconds=forward_seconds,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    return {"cntlora": VERSION, "torch": torch.__version__}


def _usable_sites(model: nn.Module, adapter: str, on_missing: str) -> tuple[list[Site], dict[str, str]]:
    sites, refused = find_sites(model, adapter)
    holder = config_holder(model, adapter)
    config: Any = None if holder is None else holder[1].peft_config[adapter]  # type: ignore[index,union-attr]
    started_by = getattr(config, "init_lora_weights", True)
    if started_by not in (True, False, "gaussian"):
        raise ValueError(
            f"adapter {adapter!r} was made with init_lora_weights={started_by!r}; expected True, so that the base is "
            "untouched and no other initialisation is on top. Make the adapter again with init_lora_weights=True"
        )
    for site in sites:
        check_fresh(site)
        if not bool(site.base.weight.detach().any()):
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
    most = min(site.in_features, site.out_features)
    if site.rank > most and not config.adaptive_ranks:
        raise ValueError(f"site {site.name}: rank {site.rank} is above min(in, out) = {most}; lower r")
    if site.scaling <= 0 and not config.fold_alpha:
        raise ValueError(
            f"site {site.name}: scaling {site.scaling:g} cannot carry strength·[ΔW]_r; expected lora_alpha above 0 "
            "(or fold_alpha=True, which sets the scaling to 1)"
        )


def _report_missing(problems: Mapping[str, str], on_missing: str) -> None:
    if not problems:
        return
    name, reason = next(iter(problems.items()))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    message = f"site {name} cannot be initialised: {reason}{more}"
    if on_missing == "raise":
        raise ValueError(f"{message}. Or leave such sites as plain LoRA with on_missing='warn'")
    warnings.warn(f"{message}; left as plain LoRA", stacklevel=4)


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


def _plan_sites(sites: list[Site], work: _Work, seen: Seen, config: InitConfig) -> dict[str, SitePlan]:
    """ΔW, its spectrum, ranks and factors; with adaptive ranks the spectra come first, the factors after."""
    if not config.adaptive_ranks:
        return {s.name: _plan_site(s, work, seen, s.rank, None) for s in sites}
    budget = sum(s.rank for s in sites) if config.rank_budget is None else config.rank_budget
    spectra: dict[str, Spectrum] = {}
    for site in sites:
        start = time.perf_counter()
        # twice the usual rank is nearly always enough; where a site wins more, `_plan_site` extends it exactly
        spectra[site.name] = spectrum(_delta(site, work, seen), 2 * site.rank)
        work.seconds[site.name] += time.perf_counter() - start
    variances = {name: s.relative_variance().tolist() for name, s in spectra.items()}
    ranks = allocate(variances, budget, config.min_rank, config.max_rank)
    return {s.name: _plan_site(s, work, seen, ranks[s.name], spectra[s.name]) for s in sites}


def _delta(site: Site, work: _Work, seen: Seen) -> Tensor:
    return work.estimator.delta(site.name, seen.site_batches[site.name], work.config.initial_weight)


def _plan_site(site: Site, work: _Work, seen: Seen, r: int, known: Spectrum | None) -> SitePlan:
    start = time.perf_counter()
    config = work.config
    M = None
    if known is None or known.triplets < r or config.decomposition != "svd":
        M = _delta(site, work, seen)
    if known is None or known.triplets < r:
        assert M is not None
        known = spectrum(M, r)
    scaling = 1.0 if config.fold_alpha else site.scaling
    B, A = _factors(M, known, r, config, config.resolved_strength / scaling)
    B, A = B.to(site.A.dtype), A.to(site.A.dtype)
    _check_fits(site, B, A, scaling, config)
    B, A = _arranged(B, A, r, config.base)
    use_rslora = site.use_rslora and not config.fold_alpha
    W = site.weight(DTYPE)
    return SitePlan(
        A=A.contiguous(),
        B=B.contiguous(),
        rank=r,
        scaling=scaling,
        alpha=scaling * (A.shape[0] ** 0.5 if use_rslora else A.shape[0]),
        use_rslora=use_rslora,
        found_rank=site.rank,
        found_scaling=site.scaling,
        singular_values=known.S.float(),
        delta_norm=float(torch.linalg.vector_norm(known.S)),
        weight_norm=float(torch.linalg.matrix_norm(W)),
        sketch=weight_sketch(W),
        tokens=seen.tokens[site.name],
        batches=seen.site_batches[site.name],
        masked=site.name in seen.masked,
        effective_rank=work.effective_rank[site.name],
        rtol=work.rtol(site),
        seconds=work.seconds[site.name] + time.perf_counter() - start,
    )


def _check_fits(site: Site, B: Tensor, A: Tensor, scaling: float, config: InitConfig) -> None:
    """Raises ValueError where an estimate is too large for the dtype that it is written in, which gives Inf or NaN."""
    fits, where = bool(B.isfinite().all() and A.isfinite().all()), f"an adapter of dtype {A.dtype}"
    if fits and config.base == "subtract":
        W = site.weight(DTYPE) - scaling * (B.to(DTYPE) @ A.to(DTYPE))
        fits, where = bool(W.to(site.base.weight.dtype).isfinite().all()), f"a base of dtype {site.base.weight.dtype}"
    if not fits:
        raise ValueError(
            f"site {site.name}: the estimate is too large for {where}; raise rtol, lower strength, or use a dtype with "
            "a wider range (bfloat16, float32)"
        )


def _factors(M: Tensor | None, s: Spectrum, r: int, config: InitConfig, scale: float) -> tuple[Tensor, Tensor]:
    """B (k, r) and A (r, d) with B·A = scale·[ΔW]_r."""
    if config.decomposition == "svd":
        return svd_factors(s, r, config.p, scale)
    assert M is not None
    return qr_factors(M, r, config.decomposition == "qr_pivoted", scale)


def _arranged(B: Tensor, A: Tensor, r: int, base: str) -> tuple[Tensor, Tensor]:
    """The factors as the `base` policy stores them. Done after the cast, so that the halves cancel exactly."""
    if base == "offset":
        return offset(B, A)
    if base == "paired":
        return paired(B, A, r)
    return B, A
