"""The sites that the data reached. The others stay plain LoRA, each with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..messages import counted, warn_caller
from ..methods.estimator import GradientReader
from ..model.checks import check_any_left, report_missing

if TYPE_CHECKING:
    from ..model.sites import Site
    from .reading import Statistics


def reached_sites(statistics: Statistics) -> tuple[list[Site], dict[str, str]]:
    """The sites for which there is what the method reads, and the others with the reason.

    Raises:
        ValueError: if there are such others and the call does not allow them, or nothing else is left.
    """
    missing = statistics.request.on_missing
    left_plain = _without_tokens(statistics)
    report_missing(left_plain, missing)
    rest = [site for site in statistics.sites if site.name not in left_plain]
    without = _without_gradient(rest, statistics)
    left_plain |= _plain_without_gradient(without, len(rest) - len(without), statistics.facts.batches, missing)
    rest = [site for site in rest if site.name not in left_plain]
    check_any_left(rest, left_plain)
    return rest, left_plain


def _without_tokens(statistics: Statistics) -> dict[str, str]:
    """Sites that the data did not reach, with the reason."""
    if statistics.config.chosen.reads == "weights":
        return {}
    found, facts = {}, statistics.facts
    read = counted(facts.batches, "batch")
    for site in statistics.sites:
        if not facts[site.name].calls:
            found[site.name] = f"its layer was not called in any of {read}; give batches that reach it"
        elif not facts[site.name].batches:
            found[site.name] = f"it saw no token that counts in {read}; read more batches or check the masks"
    return found


def _without_gradient(sites: list[Site], statistics: Statistics) -> list[str]:
    """Sites without a gradient, for the methods that read them."""
    estimator = statistics.estimator
    if not isinstance(estimator, GradientReader):
        return []
    admitted = statistics.budget.admitted
    own = [site.name for site in statistics.executor.own(sites) if site.name in admitted]
    has_gradient = statistics.merged({name: estimator.has_gradient(name) for name in own})
    for part in statistics.executor.gather({name: bool(has) for name, has in statistics.with_gradient.items()}):
        for name, has in part.items():  # of those that wait for another pass, of which each process has seen its part
            has_gradient[name] = has_gradient.get(name, False) or has
    return [site.name for site in sites if not has_gradient.get(site.name, False)]


def _plain_without_gradient(without: Sequence[str], others: int, batches: int, on_missing: str) -> dict[str, str]:
    """The sites without a gradient, each with the reason why it is left as plain LoRA.

    Some models have a few of them by their build: the last layer's queries of a classifier that reads one token through
    another attention (Longformer), the first decoder layer whose input is zero (DETR). Plain LoRA starts there as well
    as anything can. Where they are most, something else is wrong.

    Args:
        others: how many sites have a gradient.

    Raises:
        ValueError: if more sites have none than have one, unless `on_missing` is "warn".
    """
    reason = "the loss does not depend on it: its gradient is zero in every batch"
    if not without:
        return {}
    if len(without) > others:
        report_missing(
            dict.fromkeys(
                without,
                f"{reason}, as are those of {len(without)} of {len(without) + others} sites; "
                "is the adapter on layers that reach the loss, and is it the loss of the training?",
            ),
            on_missing,
        )
    else:
        more = f" (and {len(without) - 1} more)" if len(without) > 1 else ""
        warn_caller(
            f"site {without[0]}{more} of {len(without) + others}: {reason} of {batches}; left as plain LoRA, which may "
            "still train where the loss of other batches depends on it"
        )
    return dict.fromkeys(without, reason)
