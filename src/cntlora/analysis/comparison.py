"""Comparison of two states of an adapter: table 2 of the paper (section 4.2.1)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ..files.inspection import read_adapter
from ..linalg.factors import halves_cancel, product_inner, product_norm, product_spectrum
from ..model.kinds import kind_of
from ..model.sites import find_sites
from ..report import text_table


@dataclass(frozen=True)
class Factors:
    """Factors of one site in a snapshot: A (r, d), B (k, r) in float64, and the scaling s."""

    A: Tensor
    B: Tensor
    scaling: float


Snapshot = Mapping[str, Factors]
Adapter = nn.Module | Snapshot | str | os.PathLike[str]


@dataclass(frozen=True)
class SiteComparison:
    """Comparison of one site.

    Attributes:
        kind: projection by the site's name, such as "query" or "value".
        cosine: cosine similarity of the parameters, (A, B) as one vector; None if one of them is zero.
        cosine_product: cosine similarity of s·B·A (Frobenius); None if one of them is zero, as at the start of LoRA
            and EVA.
        spectral_norm: largest singular value of the difference of s·B·A: how far the function moved.
    """

    kind: str
    cosine: float | None
    cosine_product: float | None
    spectral_norm: float


@dataclass(frozen=True)
class AdapterComparison:
    """Result of `compare_adapters`; `print` shows the means by kind of projection.

    Attributes:
        sites: site name → its comparison.
    """

    sites: Mapping[str, SiteComparison]

    def by_kind(self) -> dict[str, dict[str, float | None]]:
        """Average over the sites of each kind (query, key, value, out, …), as in table 2 of the paper."""
        kinds = sorted({site.kind for site in self.sites.values()})
        return {kind: self._means([s for s in self.sites.values() if s.kind == kind]) for kind in kinds}

    @staticmethod
    def _means(sites: list[SiteComparison]) -> dict[str, float | None]:
        means: dict[str, float | None] = {}
        for key in ("cosine", "cosine_product", "spectral_norm"):
            values = [v for s in sites if (v := getattr(s, key)) is not None]
            means[key] = fmean(values) if values else None
        return means

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values, ready for JSON."""
        return {"sites": {name: asdict(site) for name, site in self.sites.items()}, "kinds": self.by_kind()}

    def __str__(self) -> str:
        heads = ("cosine (A, B)", "cosine s·B·A", "σ max of the change")
        rows = [
            (kind, *("–" if value is None else f"{value:.3f}" for value in means.values()))
            for kind, means in self.by_kind().items()
        ]
        return text_table(f"{len(self.sites)} sites, means by kind", heads, rows)


def snapshot(model: nn.Module, adapter_name: str = "default") -> dict[str, Factors]:
    """Copy the factors of an adapter to the CPU, to compare them later with `compare_adapters`.

    Args:
        model: with an adapter of LoRA layers; it may go on training.
        adapter_name: of the adapter.

    Returns:
        Site name → A and B in float64, and the scaling.

    Raises:
        ValueError: if the model has no such adapter.
    """
    sites, _ = find_sites(model, adapter_name)
    return {s.name: Factors(_copy(s.A).flatten(1), _copy(s.B).flatten(1), s.scaling) for s in sites}


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float64, copy=True)


def compare_adapters(before: Adapter, after: Adapter, adapter_name: str = "default") -> AdapterComparison:
    """Compare two states of an adapter site by site: cosine similarity, and spectral norm of the difference.

    The paper's table 2 compares the initialised adapter with the final one, without printing its formulas. It has a
    cosine for LoRA, whose B·A starts at zero, so the cosine here is that of the parameters (A, B); the spectral norm is
    that of the difference of the products s·B·A. Of an adapter of base "offset" only the half that trains is compared.
    DoRA's magnitude vector is not part of the comparison.

    Args:
        before, after: a model, an adapter folder, or a `snapshot`.
        adapter_name: of the adapter, where a model is given.

    Returns:
        The comparison; `print` shows it by kind of projection.

    Raises:
        ValueError: if the two do not have the same sites with the same ranks; names the first that differs.
    """
    first, second = _factors(before, adapter_name), _factors(after, adapter_name)
    for name in (*first, *second):
        shapes = [tuple(f[name].A.shape) + tuple(f[name].B.shape) if name in f else None for f in (first, second)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"site {name}: before it has A and B of shapes {shapes[0]}, after {shapes[1]}; expected two states of "
                "the same adapter"
            )
    halved = all(_second_half_stayed(first[name], second[name]) for name in first)
    return AdapterComparison({name: _compare(name, first[name], second[name], halved) for name in first})


def _factors(adapter: Adapter, adapter_name: str) -> Snapshot:
    if isinstance(adapter, nn.Module):
        return snapshot(adapter, adapter_name)
    if isinstance(adapter, Mapping):
        return adapter
    return {s.name: Factors(s.A, s.B, s.scaling) for s in read_adapter(adapter)}


def _compare(name: str, before: Factors, after: Factors, halved: bool) -> SiteComparison:
    change = product_spectrum(
        torch.cat([after.scaling * after.B, -before.scaling * before.B], dim=1), torch.cat([after.A, before.A])
    )
    r = before.A.shape[0] // 2 if halved else before.A.shape[0]
    one, other = (Factors(f.A[:r], f.B[:, :r], f.scaling) for f in (before, after))
    inner = float((one.A * other.A).sum() + (one.B * other.B).sum())
    sizes = [float(f.A.square().sum() + f.B.square().sum()) ** 0.5 for f in (one, other)]
    product = product_inner(one.B, one.A, other.B, other.A)
    norms = [product_norm(f.B, f.A) for f in (one, other)]
    return SiteComparison(
        kind=kind_of(name),
        cosine=_ratio(inner, sizes),
        cosine_product=_ratio(product, norms),
        spectral_norm=float(change.max()) if change.numel() else 0.0,
    )


def _ratio(inner: float, sizes: list[float]) -> float | None:
    bottom = sizes[0] * sizes[1]
    return None if bottom == 0 else max(-1.0, min(1.0, inner / bottom))


def _second_half_stayed(before: Factors, after: Factors) -> bool:
    """Return whether the second half cancelled the first and was only scaled since: base "offset", which freezes it."""
    h = before.A.shape[0] // 2
    if before.A.shape[0] % 2 or not halves_cancel(before.B, before.A):
        return False
    return _parallel(before.A[h:], after.A[h:]) and _parallel(before.B[:, h:], after.B[:, h:])


def _parallel(one: Tensor, other: Tensor) -> bool:
    """Return whether they differ by a positive factor alone (decoupled weight decay shrinks what is frozen)."""
    inner, norms = float((one * other).sum()), float(one.norm() * other.norm())
    return inner > (1.0 - 1e-11) * norms if norms else True
