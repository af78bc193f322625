"""Values that a record keeps of each adapted layer: at the start, and how far it went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...analysis.comparison import compare_adapters, snapshot
from ...analysis.diagnostics import StartDiagnostics, start_diagnostics
from ...linalg.factors import halves_cancel, product_norm
from ...model.kinds import depth_of, kind_of
from ...model.sites import Site, find_sites
from ...plan import InitPlan
from ...site_plan import SitePlan
from ..record import SiteFacts
from .arms import Arm

KEPT_SINGULAR_VALUES = 64


@dataclass(frozen=True)
class SiteWatch:
    """The sites of a run, as at the start.

    Attributes:
        facts: per site, what is known before training.
        before: snapshot of the adapter, None where there is nothing to compare.
    """

    facts: Mapping[str, SiteFacts]
    before: Any

    @classmethod
    def at_start(cls, model: nn.Module, plan: InitPlan | None, batch: Mapping[str, Any], arm: Arm) -> SiteWatch:
        """Look at an initialised model; full fine-tuning and AdaLoRA have no factors A and B of the kind looked at."""
        if arm.full or arm.peft == "adalora":
            return cls({}, None)
        gradients = start_diagnostics(model, batch)
        sites = {site.name: site for site in find_sites(model, "default")[0]}
        planned = plan.sites if plan else {}
        # a site that won no rank has no adapter any more, and is told with rank 0
        facts = {name: _facts(name, sites.get(name), planned.get(name), gradients) for name in planned or sites}
        return cls(facts, snapshot(model))

    def at_end(self, model: nn.Module) -> dict[str, SiteFacts]:
        """The sites of the record: the facts, and the distance from start to end (table 2)."""
        if self.before is None:
            return {}
        compared = compare_adapters(self.before, snapshot(model)).sites
        found: dict[str, SiteFacts] = {}
        for name, facts in self.facts.items():
            site = compared.get(name)
            found[name] = {
                **facts,
                "cosine": site.cosine if site else None,
                "cosine_product": site.cosine_product if site else None,
                "spectral_norm": site.spectral_norm if site else None,
            }
        return found


def _facts(name: str, site: Site | None, planned: SitePlan | None, gradients: StartDiagnostics) -> SiteFacts:
    file_rank = site.rank if site else 0
    return {
        "kind": kind_of(name),
        "depth": depth_of(name),
        "rank": planned.rank if planned else file_rank,
        "file_rank": file_rank,
        "singular_values": (planned.singular_values[:KEPT_SINGULAR_VALUES].tolist() or None) if planned else None,
        "delta_norm": planned.delta_norm if planned else None,
        "weight_norm": planned.weight_norm if planned else None,
        "start_norm": _start_norm(site) if site else None,
        "tokens": planned.tokens if planned else None,
        "effective_rank": planned.effective_rank if planned else None,
        "gradient_A": gradients.gradient_A.get(name),
        "gradient_B": gradients.gradient_B.get(name),
    }


def _start_norm(site: Site) -> float:
    """‖s·B·A‖_F of the directions that train: of the first half where the second cancels it."""
    A, B = (factor.detach().double().flatten(1) for factor in (site.A, site.B))
    directions = site.rank // 2 if halves_cancel(B, A) else site.rank
    A, B = A[:directions], B[:, :directions]
    return site.scaling * product_norm(B, A)


def trainable_parameters(model: nn.Module, plan: InitPlan | None) -> int:
    """Elements that training changes: those that require gradients, without the frozen half of base "offset"."""
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if plan is None or plan.config.effective_base != "offset":
        return total
    frozen = sum((s.file_rank - s.rank) * (s.A.shape[1] + s.B.shape[0]) for s in plan.sites.values())
    return total - frozen
