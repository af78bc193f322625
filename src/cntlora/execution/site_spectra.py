"""The spectrum of each site's target: one at a time, or for several sites in stacks of one shape."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..linalg.spectrum import Spectrum, spectra, spectrum
from ..methods.target import RankFacts, Target

if TYPE_CHECKING:
    from ..config import InitConfig
    from ..model.sites import Site
    from .reading import Statistics


@dataclass(frozen=True)
class SiteSpectrum:
    """Spectrum of a site, kept between the allocation of ranks and its factors: no matrix of its size.

    Attributes:
        facts: by which ranks are shared out.
        may_have_more: whether there are singular values that are not.
    """

    spectrum: Spectrum
    target: Target | None
    facts: RankFacts
    may_have_more: bool


def longer_spectrum(statistics: Statistics, ranks: Mapping[str, int], site: Site) -> SiteSpectrum:
    return site_spectrum(site, statistics, ranks[site.name])


def site_spectrum(site: Site, statistics: Statistics, r: int) -> SiteSpectrum:
    """A site's spectrum, with the triplets that rank `r` needs."""
    start = time.perf_counter()
    config = statistics.config
    width = config.chosen.width
    target = statistics.target(site)
    known = spectrum_of(site, target, width * r, config.exact_svd)
    most = min(site.in_features, site.out_features, *(() if target.M is None else target.M.shape)) // width
    variances = known.relative_variance().tolist()[:most]
    statistics.facts[site.name].seconds += time.perf_counter() - start
    ranked = RankFacts((site.out_features, site.in_features), variances, target.importance)
    more = target.importance is None and len(variances) < most
    return SiteSpectrum(known, _without_matrix(target, config), ranked, more)


def _without_matrix(target: Target, config: InitConfig) -> Target | None:
    """The target without M, where the spectrum is all that the factors need; None where it has to be made again."""
    if config.chosen.needs_matrix or target.right is not None:
        return None
    return Target(is_delta=target.is_delta)


def spectrum_of(site: Site, target: Target, q: int, exact: bool) -> Spectrum:
    """The first q singular triplets of a target; none where the method does not look at them."""
    if target.known is not None:
        return target.known(q)
    if target.M is None:
        none = torch.zeros(0, dtype=torch.float64, device=site.adapter_device)
        return Spectrum(none.new_zeros(site.out_features, 0), none, none.new_zeros(0, site.in_features))
    with _named(site):
        return spectrum(target.M, q, exact, product=target.is_delta or target.is_product)


@contextmanager
def _named(site: Site) -> Iterator[None]:
    """Context in which an estimate without singular values is an error that names the site."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(
            f"site {site.name}: the estimate has no singular values: it is too large or not finite; raise rtol, or "
            "read more tokens a batch"
        ) from error


def part_spectra(part: Sequence[Site], targets: Sequence[Target], statistics: Statistics) -> list[Spectrum]:
    """The spectra of several sites at their ranks; matrices of one shape are factored as a stack."""
    config, width = statistics.config, statistics.config.chosen.width
    matrices = [target.M for target in targets if target.M is not None and target.known is None]
    if len(matrices) < len(targets):
        return [
            spectrum_of(site, target, site.rank * width, config.exact_svd)
            for site, target in zip(part, targets, strict=True)
        ]
    products = [target.is_delta or target.is_product for target in targets]
    with _named(part[0]):
        return spectra(matrices, [site.rank * width for site in part], config.exact_svd, products)
