"""The sections `[lora]` and `[sweep]` of an experiment file, the same for every task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..recipes.values import at_least, one_of, within
from .arms import parse_arm


@dataclass(frozen=True)
class LoraSettings:
    """`[lora]`: the adapter of every arm, as in `peft.LoraConfig`.

    Attributes:
        rank: directions that train at each site.
        alpha: LoRA's alpha; the scaling is alpha/rank.
        dropout: of the adapter's input.
        targets: names of the layers to adapt; a single one that starts with "re:" is a regular expression for full
            module names; empty for the task's own choice.
        bias: which biases train too: "none", "all" or "lora_only".
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    bias: str = "none"

    def __post_init__(self) -> None:
        at_least("lora", self, rank=1)
        within("lora.alpha", self.alpha, 0.0, math.inf, "such as 2·rank", open_low=True)
        within("lora.dropout", self.dropout, 0.0, 1.0, "0 for none")
        one_of("lora.bias", self.bias, ("none", "all", "lora_only"))
        if len(self.targets) > 1 and any(name.startswith("re:") for name in self.targets):
            raise ValueError("lora.targets: a regular expression (re:…) stands alone; join several with |")


@dataclass(frozen=True)
class Override:
    """`[sweep.overrides.METHOD]`: another grid for one method; None keeps the sweep's.

    Attributes:
        learning_rates, seeds: instead of the sweep's.
    """

    learning_rates: tuple[float, ...] | None = None
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SweepSettings:
    """`[sweep]`: the runs, every method with every learning rate and every seed.

    Attributes:
        methods: names of arms, see `cntlora.lab.experiments.arms.parse_arm`.
        learning_rates: the largest of a run, reached after the warm-up.
        seeds: of the new head, of the factor A, of the order of the data and of dropout.
        best: the lowest seed is run at every learning rate, the others at the `best` best of them; 0 for all at all.
        overrides: by method, another grid for it.
    """

    methods: tuple[str, ...] = ("lora", "self")
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seeds: tuple[int, ...] = (0, 1, 2)
    best: int = 0
    overrides: Mapping[str, Override] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arms = [parse_arm(name) for name in self.methods]
        for i, arm in enumerate(arms):
            same = next((other for other in arms[:i] if other.meaning == arm.meaning), None)
            if same:
                raise ValueError(f"sweep.methods: {same.name!r} and {arm.name!r} are the same arm; keep one of them")
        _check_grid("sweep", self)
        at_least("sweep", self, best=0)
        for name, override in self.overrides.items():
            parse_arm(name)
            _check_grid(f"sweep.overrides.{name}", override)


def _check_grid(where: str, grid: SweepSettings | Override) -> None:
    """Learning rates and seeds: some, each once, in their range."""
    for name in ("methods", "learning_rates", "seeds"):
        values = getattr(grid, name, None)
        if values is None:
            continue
        if not values:
            raise ValueError(f"{where}.{name}: expected at least one, got none")
        if len(set(values)) < len(values):
            raise ValueError(f"{where}.{name}: {next(v for v in values if values.count(v) > 1)!r} comes twice")
    for rate in grid.learning_rates or ():
        within(f"{where}.learning_rates", rate, 0.0, math.inf, "such as 1e-3", open_low=True)
    for seed in grid.seeds or ():
        if seed < 0:
            raise ValueError(f"{where}.seeds: expected at least 0, got {seed}")
