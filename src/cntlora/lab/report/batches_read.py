"""The steps of a training on batches that the initialisation had read: they are the first ones of its data."""

from __future__ import annotations

import math

from ...methods.method import METHODS
from ..record import RunRecord
from .study import Estimate, Group

_PEFT_READS = ("peft:eva", "peft:corda", "peft:lora_ga")
_READ_BESIDES = frozenset({"fitted", "head"})
_OTHER_DATA = frozenset({"unseen", "foreign"})


def steps_on_read_batches(run: RunRecord) -> int:
    """Steps, from the first, whose batches the initialisation of a run had read; 0 where it reads none of them."""
    config = run.get("config") or {}
    base, *modifiers = str(run["method"]).split("+")
    if _OTHER_DATA.intersection(modifiers):
        return 0
    besides = _READ_BESIDES.intersection(modifiers)
    if base in _PEFT_READS or (base == "lora" and besides):
        batches = config.get("num_batches") or 0
    elif _reads_data(base) or besides:
        batches = (config.get("init") or {}).get("num_batches") or 0
    else:
        return 0
    accumulated = (config.get("train") or {}).get("gradient_accumulation") or 1
    return math.ceil(batches / accumulated)


def _reads_data(base: str) -> bool:
    """Return whether a method reads batches; of a function that is not loaded here this is assumed."""
    if base in METHODS:
        return METHODS[base].reads != "weights"
    return ":" in base and not base.startswith("peft:")


def later_against(group: Group, other: Group) -> Estimate:
    """Compare as `Group.against`, over the steps whose batches the initialisation of neither had read."""
    found = []
    for run, one in group.pairs(other):
        first = max(steps_on_read_batches(run), steps_on_read_batches(one))
        mine, its = ([loss for loss in r["losses"][first:] if loss is not None] for r in (run, one))
        if mine and len(mine) == len(its):
            found.append(math.fsum(mine) / len(mine) - math.fsum(its) / len(its))
    return Estimate.of(found)
