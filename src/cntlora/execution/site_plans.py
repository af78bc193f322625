"""Plans of the sites, made from the statistics: its target, the spectrum of that, the ranks, the factors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..linalg.factors import norm_of, offset, paired, product_square
from ..linalg.parallel import read_back
from ..methods.statistics import InputEstimator
from ..methods.target import SiteTarget
from ..site_plan import SitePlan, sketch_of, weight_sketch
from .site_spectra import SiteSpectrum, longer_spectrum, part_spectra, site_spectrum, spectrum_of

if TYPE_CHECKING:
    from ..linalg.spectrum import Spectrum
    from ..methods.target import Target
    from ..model.sites import Site
    from ..model.ties import Tied
    from ..plan import InitPlan
    from .reading import Statistics

DTYPE = torch.float64


def plan_sites(sites: list[Site], statistics: Statistics) -> dict[str, SitePlan]:
    """The plan of every site of this process; with adaptive ranks the spectra come first, the factors after."""
    config = statistics.config
    streams = not isinstance(statistics.estimator, InputEstimator)  # whose neighbours share what is made for the first
    if not config.adaptive_ranks:
        return statistics.map(
            sites,
            lambda site: _plan_site(site, statistics, site.rank, None),
            streams,
            lambda part: _plan_part(part, statistics),
        )
    # twice the usual rank is nearly always enough
    spectra = statistics.map(
        sites, lambda site: site_spectrum(site, statistics, max(2 * site.rank, config.min_rank)), streams
    )
    budget = sum(site.rank for site in sites) if config.rank_budget is None else config.rank_budget
    while True:
        known = statistics.merged({name: (found.facts, found.may_have_more) for name, found in spectra.items()})
        facts = {site.name: known[site.name][0] for site in sites}
        ranks = config.chosen.ranks(facts, budget, config.min_rank, config.max_rank)
        # all that such a site holds has won, so that what is not known of it yet might win too
        short = [s for s in sites if known[s.name][1] and ranks[s.name] >= len(facts[s.name].variances)]
        if not short:
            break
        longer = partial(longer_spectrum, statistics, {site.name: 2 * ranks[site.name] for site in short})
        spectra |= statistics.map(short, longer, streams)
    return statistics.map(
        sites, lambda site: _plan_site(site, statistics, ranks[site.name], spectra[site.name]), streams
    )


def _plan_site(site: Site, statistics: Statistics, r: int, found: SiteSpectrum | None) -> SitePlan:
    start = time.perf_counter()
    config, width = statistics.config, statistics.config.chosen.width
    enough = found is not None and found.spectrum.Vh.shape[0] >= r * width
    target = found.target if found and enough and found.target else statistics.target(site)
    known = found.spectrum if found and enough else spectrum_of(site, target, r * width, config.exact_svd)
    draft = _draft(site, statistics, r, target, known)
    return _plan(draft, statistics, read_back(draft.numbers), time.perf_counter() - start)


def _plan_part(part: Sequence[Site], statistics: Statistics) -> list[SitePlan]:
    """The plans of several sites: equal shapes are factored as stacks, and numbers are read back once."""
    start = time.perf_counter()
    targets = [statistics.target(site) for site in part]
    found = part_spectra(part, targets, statistics)
    drafts = [
        _draft(site, statistics, site.rank, target, known)
        for site, target, known in zip(part, targets, found, strict=True)
    ]
    read = iter(read_back([number for draft in drafts for number in draft.numbers]))
    numbers = [list(islice(read, len(draft.numbers))) for draft in drafts]
    spent = (time.perf_counter() - start) / len(part)
    return [_plan(draft, statistics, values, spent) for draft, values in zip(drafts, numbers, strict=True)]


@dataclass(frozen=True)
class _Draft:
    """The factors of a site, before what is known of them on the device has been read back.

    Attributes:
        B, A: of `rank`, in the dtype that they are written in.
        numbers: whether they are finite, ‖B·A‖², ‖W‖, the sketch of W, and the slope of the loss or None.
    """

    site: Site
    target: Target
    known: Spectrum
    rank: int
    W: Tensor
    B: Tensor
    A: Tensor
    numbers: tuple[Tensor | None, ...]


def _draft(site: Site, statistics: Statistics, r: int, target: Target, known: Spectrum) -> _Draft:
    config, method = statistics.config, statistics.config.chosen
    scaling = 1.0 if config.fold_alpha else site.scaling
    shape = (site.out_features, site.in_features)
    scale = method.strength_at(site.scaling) / scaling
    of_site = SiteTarget(site.name, shape, target, known, r, scale, len(statistics.sites))
    B, A = (M.to(device=site.adapter_device, dtype=site.A.dtype) for M in method.factors(of_site, config))
    W = site.working_weight()
    first = r // 2 if config.effective_base == "paired" else r
    slope = statistics.slope(site, B[:, :first], A[:first]) if method.has_step_size else None
    fits = B.isfinite().all() & A.isfinite().all()
    numbers = (fits, product_square(B.double(), A.double()), norm_of(W), sketch_of(W), slope)
    return _Draft(site, target, known, r, W, B, A, numbers)


def _plan(draft: _Draft, statistics: Statistics, numbers: Sequence[list[float]], seconds: float) -> SitePlan:
    site, known, r = draft.site, draft.known, draft.rank
    config, facts = statistics.config, statistics.facts[site.name]
    scaling, base = 1.0 if config.fold_alpha else site.scaling, config.effective_base
    (fine,), (square,), (weight_norm,), sketch, along = numbers
    _check_fits(site, draft.W, draft.B, draft.A, scaling, base, bool(fine))
    B, A = _arranged(draft.B, draft.A, r, base)
    use_rslora = site.use_rslora and not config.fold_alpha
    made = SitePlan(
        A=A.contiguous(),
        B=B.contiguous(),
        rank=r,
        scaling=scaling,
        alpha=scaling * (A.shape[0] ** 0.5 if use_rslora else A.shape[0]),
        use_rslora=use_rslora,
        found_rank=site.rank,
        found_scaling=site.scaling,
        singular_values=known.S.float(),
        factored_norm=known.frobenius if known.S.numel() else None,
        delta_norm=known.frobenius if draft.target.is_delta else None,
        weight_norm=weight_norm,
        start_norm=abs(scaling) * max(square, 0.0) ** 0.5,  # rounding may go below zero
        slope=scaling * along[0] if along else None,
        sketch=sketch,
        tokens=facts.tokens,
        batches=facts.batches,
        masked=bool(facts.masks),
        effective_rank=facts.effective_rank,
        rtol=statistics.rtol(site),
        seconds=facts.seconds + seconds,
        mask=", ".join(sorted(facts.masks)),
        unmasked="; ".join(sorted(facts.unmasked)),
    )
    return made if config.pace == 1.0 else made.at_pace(config.pace)


def _check_fits(site: Site, W: Tensor, B: Tensor, A: Tensor, scaling: float, base: str, fits: bool) -> None:
    """Raise ValueError where an estimate is too large for the dtype that it is written in, which gives Inf or NaN.

    Args:
        fits: whether the factors are finite.
    """
    where = f"an adapter of dtype {A.dtype}"
    if fits and base == "subtract":
        rest = W.to(DTYPE) - scaling * (B.to(DTYPE) @ A.to(DTYPE))
        fits, where = bool(rest.to(site.dtype).isfinite().all()), f"a base of dtype {site.dtype}"
    if not fits:
        raise ValueError(
            f"site {site.name}: the estimate is too large for {where}; raise rtol, lower strength, or use a dtype with "
            "a wider range (bfloat16, float32)"
        )


def _arranged(B: Tensor, A: Tensor, r: int, base: str) -> tuple[Tensor, Tensor]:
    """The factors as the `base` policy stores them. Done after the cast, so that the halves cancel exactly."""
    if base == "offset":
        return offset(B, A)
    if base == "paired":
        return paired(B, A, r)
    return B, A


def with_followers(plan: InitPlan, tied: Sequence[Tied], order: Sequence[str]) -> InitPlan:
    """The plan with the sites that follow others: the same factors, crossed where they are.

    A collective where the weights of those sites are sharded.
    """
    sites, skipped, shared = dict(plan.sites), dict(plan.skipped), {}
    for follower in tied:
        name, leader = follower.site.name, follower.leader.name
        if leader in sites:
            sites[name] = _follower_plan(sites[leader], follower)
            shared[name] = leader
        else:
            skipped[name] = f"it shares its factors with {leader}: {skipped[leader]}"
    return replace(plan, sites={n: sites[n] for n in order if n in sites}, skipped=skipped, shared=shared)


def _follower_plan(leader: SitePlan, tied: Tied) -> SitePlan:
    A, B = (leader.B.mT, leader.A.mT) if tied.crossed else (leader.A, leader.B)
    W = tied.site.weight()
    return replace(
        leader,
        A=A.contiguous(),
        B=B.contiguous(),
        weight_norm=float(W.norm()),
        sketch=weight_sketch(W),
        seconds=0.0,
    )
