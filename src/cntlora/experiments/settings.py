"""An experiment as plain values: read from a TOML file that holds differences from the defaults."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import InitConfig
from ..core.family import METHOD_OPTIONS, METHODS
from .arms import Arm, parse_arm
from .typed import at_least, build, within

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]


@dataclass(frozen=True)
class TaskSettings:
    """`[task]`: what is learned, from which data.

    Attributes:
        name: a row of `cntlora.experiments.tasks.TASKS`: "tweets" (MiniLM and labelled tweets) or "text" (yours).
        model: for "text": hub name or folder of the pretrained model.
        data: for "text": .csv, .tsv or .jsonl file, relative to the working directory.
        text, label: for "text": its columns of texts and of classes.
        batch_size: texts a batch.
        max_length: tokens a text, special ones included; longer texts are cut.
        eval_size: held-out texts, stratified by class.
        split_seed: of the split into training and held-out texts, the same for every run.
    """

    name: str = "tweets"
    model: str | None = None
    data: str | None = None
    text: str = "text"
    label: str = "label"
    batch_size: int = 16
    max_length: int = 48
    eval_size: int = 1000
    split_seed: int = 0

    def __post_init__(self) -> None:
        at_least("task", self, batch_size=1, max_length=1, eval_size=1, split_seed=0)
        needed = {"model": "hub name or folder", "data": ".csv, .tsv or .jsonl file with texts and labels"}
        missing = [key for key in needed if getattr(self, key) is None] if self.name == "text" else []
        if missing:
            raise ValueError(f"task.{missing[0]}: task 'text' needs it, a {needed[missing[0]]}")


@dataclass(frozen=True)
class LoraSettings:
    """`[lora]`: the adapter of every arm, as in `peft.LoraConfig`.

    Attributes:
        rank: directions that train at each site.
        alpha: LoRA's alpha; the scaling is alpha/rank.
        dropout: of the adapter's input.
        targets: names of the layers to adapt; empty for the task's own choice.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least("lora", self, rank=1)
        within("lora.alpha", self.alpha, 0.0, math.inf, "such as 2·rank", open_low=True)
        within("lora.dropout", self.dropout, 0.0, 1.0, "0 for none")


@dataclass(frozen=True)
class TrainSettings:
    """`[train]`: the training of every arm, AdamW with linear warm-up and decay.

    Attributes:
        steps: updates.
        eval_at: updates after which the held-out texts are scored; the last one always is one of them.
        warmup: updates of linear warm-up.
        weight_decay: AdamW's.
        max_grad_norm: the norm of all gradients together is clipped to it.
    """

    steps: int = 100
    eval_at: tuple[int, ...] = ()
    warmup: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        at_least("train", self, steps=1, warmup=0)
        within("train.weight_decay", self.weight_decay, 0.0, math.inf, "0 for none")
        within("train.max_grad_norm", self.max_grad_norm, 0.0, math.inf, "1 is usual", open_low=True)
        if self.warmup > self.steps:
            raise ValueError(f"train.warmup: expected at most train.steps={self.steps}, got {self.warmup}")
        outside = [step for step in self.eval_at if not 0 <= step <= self.steps]
        if outside:
            raise ValueError(f"train.eval_at: expected updates from 0 to train.steps={self.steps}, got {outside}")


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
        methods: names of arms, see `cntlora.experiments.arms.parse_arm`.
        learning_rates: the largest of a run, reached after the warm-up.
        seeds: of the new head, of the factor A, of the order of the data and of dropout.
        overrides: by method, another grid for it.
    """

    methods: tuple[str, ...] = ("lora", "self")
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seeds: tuple[int, ...] = (0, 1, 2)
    overrides: Mapping[str, Override] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arms = [parse_arm(name) for name in self.methods]
        for i, arm in enumerate(arms):
            same = next((other for other in arms[:i] if other.meaning == arm.meaning), None)
            if same:
                raise ValueError(f"sweep.methods: {same.name!r} and {arm.name!r} are the same arm; keep one of them")
        _check_grid("sweep", self)
        for name, override in self.overrides.items():
            parse_arm(name)
            _check_grid(f"sweep.overrides.{name}", override)


@dataclass(frozen=True)
class Experiment:
    """All settings of an experiment.

    Attributes:
        name: of the experiment and its results folder; the file's name where it has none.
        title: one line for reports.
        task, lora, train, sweep: see there.
        init: options of `cntlora.InitConfig` for all arms of cntlora; what an arm's name says comes on top.
    """

    name: str = "experiment"
    title: str = ""
    task: TaskSettings = field(default_factory=TaskSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    init: Mapping[str, Any] = field(default_factory=dict)
    train: TrainSettings = field(default_factory=TrainSettings)
    sweep: SweepSettings = field(default_factory=SweepSettings)

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name: expected the name of a folder, got {self.name!r}")
        for name in ("method", "adaptive_ranks"):
            if name in self.init:
                raise ValueError(f"init.{name}: is said by the names in sweep.methods; leave it out")
        for name in self.sweep.methods:
            self.init_config(parse_arm(name), 0)

    def init_config(self, arm: Arm, seed: int) -> InitConfig | None:
        """The configuration of an arm of cntlora in the run of a seed, None for other arms.

        Raises:
            ValueError: if the options of `[init]` and of the arm do not go together.
        """
        if arm.init is None:
            return None
        reads = METHODS[arm.init["method"]].options if arm.init["method"] in METHODS else METHOD_OPTIONS
        # what is common to all arms goes to those on which it has an effect
        common = {key: value for key, value in self.init.items() if key not in METHOD_OPTIONS - reads}
        try:
            return InitConfig(**{"seed": seed, **common, **arm.init})
        except (ValueError, TypeError) as error:
            raise ValueError(f"init, for method {arm.name!r}: {error}") from error

    @property
    def num_batches(self) -> int:
        """Batches that every data-driven arm reads at initialisation, PEFT's own too."""
        return int(self.init.get("num_batches", InitConfig().num_batches))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


def load_experiment(path: str | Path) -> Experiment:
    """Reads an experiment file: TOML with the sections task, lora, init, train and sweep.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for broken TOML, an unknown key (with the nearest right one), a wrong type or a value out of range;
            the message begins with the file's name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such experiment file")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return from_dict({"name": path.stem, **values})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML ({error})") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def from_dict(values: Mapping[str, Any]) -> Experiment:
    """An experiment from plain values, as in an experiment file.

    Raises:
        ValueError, TypeError: as `load_experiment`, without the file's name.
    """
    return build(Experiment, values, "")


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


def replaced(experiment: Experiment, **sweep: Any) -> Experiment:
    """The experiment with other methods, learning rates or seeds; None keeps what it has.

    Learning rates or seeds given here hold for every method, also where the file has an override.
    """
    given: dict[str, Any] = {name: tuple(values) for name, values in sweep.items() if values}
    overrides = {
        name: dataclasses.replace(o, **{key: None for key in given if key != "methods"})
        for name, o in experiment.sweep.overrides.items()
    }
    return dataclasses.replace(experiment, sweep=dataclasses.replace(experiment.sweep, overrides=overrides, **given))


def smoke(experiment: Experiment) -> Experiment:
    """The same with 2 updates, the first learning rate and seed, 32 held-out texts: whether it works at all."""
    sweep = experiment.sweep
    grid: dict[str, Any] = {"learning_rates": sweep.learning_rates[:1], "seeds": sweep.seeds[:1]}
    overrides = {
        name: Override(o.learning_rates and o.learning_rates[:1], o.seeds and o.seeds[:1])
        for name, o in sweep.overrides.items()
    }
    return dataclasses.replace(
        experiment,
        task=dataclasses.replace(experiment.task, eval_size=min(32, experiment.task.eval_size)),
        train=dataclasses.replace(experiment.train, steps=2, warmup=1, eval_at=(2,)),
        sweep=dataclasses.replace(sweep, overrides=overrides, **grid),
    )
