"""While data is read, fresh adapters are left out of the forward pass: they add exactly zero and take time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sites import Site


@contextmanager
def bypassed(sites: list[Site]) -> Iterator[None]:
    """Context in which the layers of `sites` compute their base layer alone, where nothing else is active on them.

    Every site is known to be fresh (B = 0, not merged). A layer with another active or merged adapter is left as it is,
    and so is one that is not switched off in PEFT's way.
    """
    switched = [site.layer for site in sites if _adds_nothing(site)]
    try:
        for layer in switched:
            layer._disable_adapters = True  # `enable_adapters(False)` would freeze the parameters besides
        yield
    finally:
        for layer in switched:
            layer._disable_adapters = False


def _adds_nothing(site: Site) -> bool:
    layer: Any = site.layer
    if getattr(layer, "_disable_adapters", None) is not False or getattr(layer, "merged", False):
        return False
    return list(getattr(layer, "active_adapters", ())) == [site.adapter]
