"""From what was read to the plan: the target of every site, its spectrum, the ranks, the factors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..config import InitConfig
from ..data.collect import Groups, Seen
from ..linalg.allocation import allocate
from ..linalg.factors import Spectrum, offset, paired, product_norm, spectrum
from ..linalg.moments import Moments
from ..linalg.parallel import side_by_side
from ..methods.estimator import Estimator, InputReader, absorb_batch
from ..methods.statistics import GradientSums, InputEstimator
from ..methods.target import SiteTarget, Target
from ..model.sites import Site
from ..plan import SitePlan, weight_sketch

DTYPE = torch.float64

T = TypeVar("T")


@dataclass
class Work:
    """What is known of each site while the plan is made.

    Attributes:
        sites: by name, where the estimator finds W; one with a sharded weight has it `gathered` while it is worked on.
        take: hands the inputs of a batch to the estimator, times w_j.
    """

    estimator: Estimator
    config: InitConfig
    sites: dict[str, Site] = field(default_factory=dict)
    take: Take = field(default=lambda work, groups, weight: _take(work, groups, weight))
    largest_batch: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def absorb(self, index: int, groups: Groups) -> None:
        """The distinct inputs of one batch, each with the sites that saw it."""
        start = time.perf_counter()
        if isinstance(self.estimator, InputReader):
            self.take(self, [group for group in groups if isinstance(group[1], Moments)], self.weight(index))
        share = (time.perf_counter() - start) / max(1, sum(len(names) for names, _ in groups))
        for names, X in groups:
            for name in names:
                self.largest_batch[name] = max(X.tokens, self.largest_batch.get(name, 0))
                self.seconds[name] = self.seconds.get(name, 0.0) + share

    def weight(self, index: int) -> float:
        """w_j of a batch."""
        weights = self.config.method.batch_weights
        if weights is not None and index >= len(weights):
            raise ValueError(
                f"batch_weights: expected one for each of the batches, which are more than {index}, got {len(weights)}"
            )
        return 1.0 if weights is None else weights[index]

    def slope(self, name: str, B: Tensor, A: Tensor, r: int, seen: Seen) -> float:
        """⟨∂L/∂W, B·A⟩ over the first r directions, L being the mean loss over the batches with their w_j."""
        assert isinstance(self.estimator, GradientSums)
        weights = self.config.method.batch_weights  # each process has as many
        total = seen.batches * (1.0 if weights is None else sum(weights) / len(weights))
        return self.estimator.slope(name, B[:, :r], A[:r]) / total

    def rtol(self, site: Site) -> float | None:
        """The largest tolerance of † at a site over the batches; None without †."""
        known = self.estimator.facts.rtols.get(site.name)  # where it follows from the inputs
        if known is not None:
            return known
        return self.config.method.rtol_at(site.out_features, site.in_features, self.largest_batch.get(site.name, 0))

    def target(self, site: Site, seen: Seen) -> Target:
        """What the factors of a site are made from."""
        return self.estimator.target(site.name, seen.site_batches.get(site.name, 0))


Take = Callable[[Work, Groups, float], None]


def _take(work: Work, groups: Groups, weight: float) -> None:
    assert isinstance(work.estimator, InputReader)
    absorb_batch(work.estimator, groups, weight)


class Share(Protocol):
    """How the work on the sites is shared with other processes."""

    def mine(self, sites: list[Site]) -> list[Site]:
        """Those that this process works on."""

    def each(self, sites: list[Site], make: Callable[[Site], T], streams: bool) -> dict[str, T]:
        """What `make` gives for those of `sites` that are this process's; `streams` as for `side_by_side`."""

    def everyone(self, values: dict[str, T]) -> dict[str, T]:
        """The plain values that all processes have for theirs, together."""


class Alone:
    """One process works on all sites."""

    def mine(self, sites: list[Site]) -> list[Site]:
        return sites

    def each(self, sites: list[Site], make: Callable[[Site], T], streams: bool) -> dict[str, T]:
        """Small sites side by side."""
        if not sites:
            return {}
        rows = [max(s.in_features, s.out_features) for s in sites]
        made = side_by_side(make, sites, rows, sites[0].device, streams)
        return {site.name: result for site, result in zip(sites, made, strict=True)}

    def everyone(self, values: dict[str, T]) -> dict[str, T]:
        return values


def working_weight(site: Site) -> Tensor:
    """W (k, d) in its own dtype, float32 at least."""
    return site.weight(torch.promote_types(site.dtype, torch.float32))


def plan_sites(sites: list[Site], work: Work, seen: Seen, share: Share) -> dict[str, SitePlan]:
    """The plan of every site of this process; with adaptive ranks the spectra come first, the factors after."""
    config = work.config
    streams = not isinstance(work.estimator, InputEstimator)  # whose neighbours share what is made for the first
    if not config.adaptive_ranks:
        return share.each(sites, lambda s: _plan_site(s, work, seen, s.rank, None), streams)
    # twice the usual rank is nearly always enough
    ranked = share.each(sites, lambda s: _ranked(s, work, seen, max(2 * s.rank, config.min_rank)), streams)
    budget = sum(s.rank for s in sites) if config.rank_budget is None else config.rank_budget
    while True:
        known = share.everyone({name: (found.variances, found.may_have_more) for name, found in ranked.items()})
        variances = {s.name: known[s.name][0] for s in sites}
        ranks = allocate(variances, budget, config.min_rank, config.max_rank)
        # all that such a site holds has won, so that what is not known of it yet might win too
        short = [s for s in sites if known[s.name][1] and ranks[s.name] >= len(variances[s.name])]
        if not short:
            break
        ranked |= share.each(
            short, partial(_ranked_for, work, seen, {s.name: 2 * ranks[s.name] for s in short}), streams
        )
    return share.each(sites, lambda s: _plan_site(s, work, seen, ranks[s.name], ranked[s.name]), streams)


def _ranked_for(work: Work, seen: Seen, ranks: Mapping[str, int], site: Site) -> _Ranked:
    return _ranked(site, work, seen, ranks[site.name])


def _ranked(site: Site, work: Work, seen: Seen, r: int) -> _Ranked:
    """A site's spectrum, with the triplets that rank `r` needs."""
    start = time.perf_counter()
    width = work.config.method.width
    target = work.target(site, seen)
    known = _spectrum(site, target, width * r, work.config.exact_svd)
    most = min(site.in_features, site.out_features) // width
    variances = known.relative_variance().tolist()[:most]
    work.seconds[site.name] = work.seconds.get(site.name, 0.0) + time.perf_counter() - start
    return _Ranked(known, _without_matrix(target, work.config), variances, len(variances) < most)


@dataclass(frozen=True)
class _Ranked:
    """What is kept of a site between the sharing out of ranks and its factors: no matrix of its size.

    Attributes:
        variances: v_m of eq. 19, of those singular values that are known.
        may_have_more: whether there are singular values that are not.
    """

    spectrum: Spectrum
    target: Target | None
    variances: list[float]
    may_have_more: bool


def _without_matrix(target: Target, config: InitConfig) -> Target | None:
    """The target without M, where the spectrum is all that the factors need; None where it has to be made again."""
    if config.method.needs_matrix or target.right is not None:
        return None
    return Target(is_delta=target.is_delta)


def _spectrum(site: Site, target: Target, q: int, exact: bool) -> Spectrum:
    """The first q singular triplets of a target; none where the method does not look at them."""
    if target.known is not None:
        return target.known(q)
    if target.M is None:
        none = torch.zeros(0, dtype=DTYPE, device=site.adapter_device)
        return Spectrum(none.new_zeros(site.out_features, 0), none, none.new_zeros(0, site.in_features))
    try:
        return spectrum(target.M, q, exact)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(
            f"site {site.name}: the estimate has no singular values: it is too large or not finite; raise rtol, or "
            "read more tokens a batch"
        ) from error


def _plan_site(site: Site, work: Work, seen: Seen, r: int, ranked: _Ranked | None) -> SitePlan:
    start = time.perf_counter()
    config, method = work.config, work.config.method
    enough = ranked is not None and ranked.spectrum.Vh.shape[0] >= r * method.width
    target = ranked.target if ranked and enough and ranked.target else work.target(site, seen)
    known = ranked.spectrum if ranked and enough else _spectrum(site, target, r * method.width, config.exact_svd)
    scaling = 1.0 if config.fold_alpha else site.scaling
    scale = method.strength_at(site.scaling) / scaling
    shape = (site.out_features, site.in_features)
    B, A = method.factors(SiteTarget(site.name, shape, target, known, r, scale), config)
    B, A = (M.to(device=site.adapter_device, dtype=site.A.dtype) for M in (B, A))
    base = config.effective_base
    W = site.weight(DTYPE)
    _check_fits(site, W, B, A, scaling, base)
    start_norm = abs(scaling) * product_norm(B.double(), A.double())
    slope = scaling * work.slope(site.name, B, A, r // 2 if base == "paired" else r, seen) if method.sized else None
    B, A = _arranged(B, A, r, base)
    use_rslora = site.use_rslora and not config.fold_alpha
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
        factored_norm=known.frobenius if known.S.numel() else None,
        delta_norm=known.frobenius if target.is_delta else None,
        weight_norm=float(torch.linalg.matrix_norm(W)),
        start_norm=start_norm,
        slope=slope,
        sketch=weight_sketch(W),
        tokens=seen.tokens.get(site.name, 0),
        batches=seen.site_batches.get(site.name, 0),
        masked=site.name in seen.masks,
        effective_rank=work.estimator.effective_rank(site.name),
        rtol=work.rtol(site),
        seconds=work.seconds.get(site.name, 0.0) + time.perf_counter() - start,
        mask=", ".join(sorted(seen.masks.get(site.name, ()))),
        unmasked="; ".join(sorted(seen.unmasked.get(site.name, ()))),
    )


def _check_fits(site: Site, W: Tensor, B: Tensor, A: Tensor, scaling: float, base: str) -> None:
    """Raises ValueError where an estimate is too large for the dtype that it is written in, which gives Inf or NaN."""
    fits, where = bool(B.isfinite().all() and A.isfinite().all()), f"an adapter of dtype {A.dtype}"
    if fits and base == "subtract":
        rest = W - scaling * (B.to(DTYPE) @ A.to(DTYPE))
        fits, where = (
            bool(rest.to(site.dtype).isfinite().all()),
            f"a base of dtype {site.dtype}",
        )
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
