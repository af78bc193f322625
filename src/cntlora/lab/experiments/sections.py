"""The sections of an experiment file that are the same for every task: `[lora]`, `[train]` and `[sweep]`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..recipes.train_options import PRECISIONS, SCHEDULES
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
class TrainSettings:
    """`[train]`: the training of every arm with AdamW.

    Attributes:
        steps: updates; 100 if neither this nor `epochs` is given.
        epochs: passes over the training data, instead of `steps`.
        eval_at: when the held-out data is scored: updates, or epochs where `epochs` is given; 0 is the start, and the
            end always is one of them.
        sample_at: when the task writes pictures or texts, counted as in `eval_at`.
        warmup: updates of linear warm-up.
        warmup_epochs: the same in epochs, instead of `warmup`.
        schedule: after the warm-up: "linear" or "cosine" down to 0, or "constant".
        weight_decay: AdamW's.
        max_grad_norm: the norm of all gradients together is clipped to it.
        precision: of the forward pass: "float32", or "bfloat16" by autocast.
        gradient_accumulation: batches an update.
        layer_decay: for full fine-tuning: the learning rate of a layer in terms of that of the layer above; 0 for none.
        save_every: updates between checkpoints, from which an interrupted run goes on; 0 for none.
    """

    steps: int | None = None
    epochs: float | None = None
    eval_at: tuple[int, ...] = ()
    sample_at: tuple[int, ...] = ()
    warmup: int | None = None
    warmup_epochs: float | None = None
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "float32"
    gradient_accumulation: int = 1
    layer_decay: float = 0.0
    save_every: int = 0

    def __post_init__(self) -> None:
        self._check_length()
        at_least("train", self, gradient_accumulation=1, save_every=0)
        within("train.weight_decay", self.weight_decay, 0.0, math.inf, "0 for none")
        within("train.max_grad_norm", self.max_grad_norm, 0.0, math.inf, "1 is usual", open_low=True)
        within("train.layer_decay", self.layer_decay, 0.0, 1.0, "such as 0.75, 0 for none")
        one_of("train.schedule", self.schedule, SCHEDULES)
        one_of("train.precision", self.precision, PRECISIONS)

    def _check_length(self) -> None:
        """Steps or epochs, and the moments within them; the defaults depend on what is given."""
        for one, other in (("steps", "epochs"), ("warmup", "warmup_epochs")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"train.{one}: train.{other} is there too; keep one of them")
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "steps", 100)  # what a record says, not "the default"
        if self.warmup_epochs is None and self.warmup is None:
            object.__setattr__(self, "warmup", 10)
        for name, low in (("steps", 1), ("warmup", 0)):
            if getattr(self, name) is not None:
                at_least("train", self, **{name: low})
        if self.epochs is not None:
            within("train.epochs", self.epochs, 0.0, math.inf, "such as 30", open_low=True)
        if self.warmup_epochs is not None:
            within("train.warmup_epochs", self.warmup_epochs, 0.0, math.inf, "such as 3")
        for name in ("warmup", "warmup_epochs"):
            length = "steps" if name == "warmup" else "epochs"
            value, end = getattr(self, name), getattr(self, length)
            if value is not None and end is not None and value > end:
                raise ValueError(f"train.{name}: expected at most train.{length}={end}, got {value}")
        length, unit = ("steps", "updates") if self.epochs is None else ("epochs", "epochs")
        for name in ("eval_at", "sample_at"):
            outside = [step for step in getattr(self, name) if not 0 <= step <= getattr(self, length)]
            if outside:
                end = getattr(self, length)
                raise ValueError(f"train.{name}: expected {unit} from 0 to train.{length}={end}, got {outside}")


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
