"""Origin of an adapter's start, in numbers and words: what a saved adapter can tell of its plan.

A plan is remembered by the LoRA layers that it was written into, without its matrices and as long as they live.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .lora_layers import lora_layers

if TYPE_CHECKING:
    from ..plan import InitPlan
    from ..site_plan import SitePlan

_STARTS: Any = WeakIdKeyDictionary()
_SUBTRACTED: Any = WeakIdKeyDictionary()
"""LoRA layer → {adapter: (A, B)} at step 0, where the base weight had s·B·A taken off."""


@dataclass(frozen=True)
class Start:
    """Facts of a plan.

    Attributes:
        method, base: of the configuration; base is "zero" for a method that starts at B = 0.
        options: those of `InitConfig` that differ from the defaults.
        reads: "inputs", "gradients" or "weights".
        batches: that were read. tokens: least and most that a site saw.
        fingerprint: digest of the statistics; None where no data were read.
        moved: smallest, median and largest ‖ΔW‖/‖W‖ over the sites that have one.
        skipped: how many sites stayed plain LoRA.
        versions: of cntlora and torch when the plan was made.
    """

    method: str
    base: str
    options: Mapping[str, Any]
    reads: str
    batches: int
    tokens: tuple[int, int]
    fingerprint: str | None
    moved: tuple[float, float, float] | None
    skipped: int
    versions: Mapping[str, str]

    @classmethod
    def of(cls, plan: InitPlan) -> Start:
        """Make it from a plan."""
        config, reads = plan.config, plan.config.chosen.reads
        default = type(config)(method=type(config.chosen)()).to_dict()
        options = {key: value for key, value in config.to_dict().items() if value != default[key] and key != "base"}
        tokens = [site.tokens for site in plan.sites.values()] or [0]
        return cls(
            method=config.chosen.name,
            base="zero" if config.chosen.zero_start else config.stated_base,
            options=options,
            reads=reads,
            batches=plan.batches,
            tokens=(min(tokens), max(tokens)),
            fingerprint=None if reads == "weights" else data_fingerprint(plan),
            moved=_moved(plan.sites.values()),
            skipped=len(plan.skipped),
            versions=dict(plan.versions),
        )


def _moved(sites: Iterable[SitePlan]) -> tuple[float, float, float] | None:
    known = [s.delta_norm / s.weight_norm for s in sites if s.delta_norm is not None and s.weight_norm > 0]
    return (min(known), median(known), max(known)) if known else None


def data_fingerprint(plan: InitPlan) -> str:
    """A SHA-256 over what the data left in the plan: tokens and batches of every site, and its singular values.

    Nothing of the data can be read out of it. The same batches, model and options give the same one on the same machine
    with the same versions and number of threads; singular values that round otherwise give another, and so do other
    batches.
    """
    digest = hashlib.sha256()
    for name, site in sorted(plan.sites.items()):
        counts = [name, site.tokens, site.batches, site.masked, site.effective_rank]
        digest.update(json.dumps(counts).encode())
        values = site.singular_values.detach().cpu().to(torch.float64)
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def remember(model: nn.Module, plan: InitPlan, adapter: str = "default") -> None:
    """Note that `plan` was written into the adapter's layers of a model."""
    start = Start.of(plan)
    for name, layer in lora_layers(model, adapter):
        if name in plan.sites:
            _STARTS.setdefault(layer, {})[adapter] = start


def start_of(model: nn.Module, adapter: str = "default") -> Start | None:
    """Return what is known of the start of an adapter; None if it was not initialised in this process."""
    for _, layer in lora_layers(model, adapter):
        known: dict[str, Start] = _STARTS.get(layer, {})
        if adapter in known:
            return known[adapter]
    return None


def remember_subtracted(layer: Any, adapter: str, A: Tensor, B: Tensor) -> None:
    """Note that s·B·A was taken off the weight of a layer (base "subtract")."""
    _SUBTRACTED.setdefault(layer, {})[adapter] = (A, B)


def subtracted_from(layer: Any, adapter: str) -> tuple[Tensor, Tensor] | None:
    """A and B at step 0 if s·B·A was taken off the weight of a layer in this process, else None."""
    known: tuple[Tensor, Tensor] | None = _SUBTRACTED.get(layer, {}).get(adapter)
    return known
