"""An experiment as plain values: read from a TOML file that holds differences from the defaults."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import InitConfig
from ...messages import unknown_name, warn_caller
from ...methods.method import METHODS, all_options, option_names
from ..recipes.train_settings import TrainSettings
from .arms import Arm, parse_arm
from .sections import LoraSettings, Override, SweepSettings
from .tasks import task_kind
from .typed import build

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

DEFAULT_TASK = "tweets"
_SECTIONS = ("task", "lora", "init", "train", "sweep")
_EITHER = {"steps": "epochs", "epochs": "steps", "warmup": "warmup_epochs", "warmup_epochs": "warmup"}


def _default_task() -> Any:
    return task_kind(DEFAULT_TASK).settings()


@dataclass(frozen=True)
class Experiment:
    """All settings of an experiment.

    Attributes:
        name: of the experiment and its results folder; the file's name where it has none.
        title: one line for reports.
        task: what is learned, from which data: the settings of the recipe that `task.name` names.
        lora, train, sweep: see there.
        init: options of `cntlora.InitConfig` for all arms of cntlora; what an arm's name says comes on top.
        smoke: sections as above with values that hold for `--smoke` only.
        file: its name without suffix, where `name` says the user's data too.
    """

    name: str = "experiment"
    title: str = ""
    task: Any = field(default_factory=_default_task)
    lora: LoraSettings = field(default_factory=LoraSettings)
    init: Mapping[str, Any] = field(default_factory=dict)
    train: TrainSettings = field(default_factory=TrainSettings)
    sweep: SweepSettings = field(default_factory=SweepSettings)
    smoke: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name: expected the name of a folder, got {self.name!r}")
        for name in ("method", "adaptive_ranks"):
            if name in self.init:
                raise ValueError(f"init.{name}: is said by the names in sweep.methods; leave it out")
        for name in self.sweep.methods:
            self.init_config(parse_arm(name), 0)
        for section in self.smoke:
            if section not in _SECTIONS:
                raise ValueError(unknown_name("section of [smoke]", section, _SECTIONS))
            _section(self, section, self.smoke[section], "smoke")

    def init_config(self, arm: Arm, seed: int) -> InitConfig | None:
        """The configuration of an arm of cntlora in the run of a seed, None for other arms.

        Raises:
            ValueError: if the options of `[init]` and of the arm do not go together.
        """
        if arm.init is None:
            return None
        # what is common to all arms goes to those on which it has an effect
        others = set(all_options()).difference(option_names(METHODS[arm.init["method"]]))
        common = {key: value for key, value in self.init.items() if key not in others}
        try:
            return InitConfig.from_dict({"seed": seed, **common, **arm.init})
        except (ValueError, TypeError) as error:
            raise ValueError(f"init, for method {arm.name!r}: {error}") from error

    @property
    def num_batches(self) -> int:
        """Batches that every data-driven arm reads at initialisation, PEFT's own too."""
        return int(self.init.get("num_batches", InitConfig().num_batches))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


def load_experiment(path: str | Path, changes: Sequence[str] = ()) -> Experiment:
    """Read an experiment file: TOML with the sections task, lora, init, train, sweep and smoke.

    Args:
        path: of the file.
        changes: "KEY=VALUE" each, such as "lora.rank=4": put over what the file says. The value is TOML; what is no
            TOML value is taken as text.

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
        before = dict(values["train"]) if isinstance(values.get("train"), dict) else {}
        keys = {_change(values, change) for change in changes}
        fitted = list(_fit(values["train"], before, keys)) if isinstance(values.get("train"), dict) else []
        experiment = from_dict({"name": path.stem, **values})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML ({error})") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    for said in fitted:
        warn_caller(f"{path}: {said}")
    return experiment


def _change(values: dict[str, Any], change: str) -> str:
    """Put one KEY=VALUE over the values of a file; what excludes it there goes. Returns the key."""
    key, found, text = change.partition("=")
    *sections, last = key.strip().split(".")
    if not found or not last:
        raise ValueError(f"--set: expected KEY=VALUE such as lora.rank=4, got {change!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {key.strip()}: {section} is no section")
    values[last] = value
    if sections == ["train"] and last in _EITHER:
        values.pop(_EITHER[last], None)
    return ".".join([*sections, last])


def _fit(train: dict[str, Any], before: Mapping[str, Any], keys: set[str]) -> Iterator[str]:
    """Fit what a file says of a training to a length that was put over it; give a sentence for each change.

    Values that are put over the file too stay as they are, and are checked later.

    Args:
        train: the section with the changes.
        before: the section of the file.
        keys: that were put over the file.
    """
    length = next((name for name in ("steps", "epochs") if f"train.{name}" in keys), "")
    end = train.get(length)
    if isinstance(end, bool) or not isinstance(end, (int, float)):
        return
    other_unit = _EITHER[length] in before
    for name in ("eval_at", "sample_at"):
        at = train.get(name)
        if f"train.{name}" in keys or not isinstance(at, list) or not all(isinstance(moment, int) for moment in at):
            continue
        train[name] = [] if other_unit else [moment for moment in at if moment <= end]
        if train[name] == at:
            continue
        if name == "sample_at" and end == int(end) and end not in train[name]:
            train[name].append(int(end))  # the end is always scored, but samples are made only where they are asked for
        also = "; the end is always scored" if name == "eval_at" else ""
        yield f"train.{name}={at} became {train[name]} with train.{length}={end}{also}"
    warmup: Any = train.get("warmup", None if "warmup_epochs" in train else TrainSettings().warmup)
    fixed = "train.warmup" in keys or length != "steps" or not isinstance(warmup, int)
    if not fixed and warmup > end:
        train["warmup"] = int(end) // 10
        yield f"train.warmup={warmup} became {train['warmup']} with train.steps={end}"


def from_dict(values: Mapping[str, Any]) -> Experiment:
    """An experiment from plain values, as in an experiment file.

    Raises:
        ValueError, TypeError: as `load_experiment`, without the file's name.
    """
    task = values.get("task", {})
    if not isinstance(task, Mapping):
        raise TypeError(f"task: expected a section [task], got {type(task).__name__} {task!r}")
    name = task.get("name", DEFAULT_TASK)
    if not isinstance(name, str):
        raise TypeError(f"task.name: expected text, got {type(name).__name__} {name!r}")
    settings: Any = build(task_kind(name).settings, {"name": name, **task}, "task")
    return build(Experiment, {key: value for key, value in values.items() if key != "task"}, "", task=settings)


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


def _section(experiment: Experiment, name: str, values: Any, where: str) -> Any:
    """A section with some of its values replaced."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{where}.{name}: expected a section [{where}.{name}], got {values!r}")
    section = getattr(experiment, name)
    if isinstance(section, Mapping):
        return {**section, **values}
    kept = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    new = build(type(section), values, f"{where}.{name}", **{key: kept[key] for key in kept if key not in values})
    return new


def smoke(experiment: Experiment, folder: Path) -> Experiment:
    """The same with 2 updates, the first learning rate and seed, on a tiny random model and made-up data.

    Args:
        experiment: as in the file; its section `smoke` is put over the others.
        folder: an empty one, for model and data.
    """
    changed = {name: _section(experiment, name, values, "smoke") for name, values in experiment.smoke.items()}
    experiment = dataclasses.replace(experiment, smoke={}, **changed)
    sweep, rank = experiment.sweep, min(experiment.lora.rank, 4)
    grid: dict[str, Any] = {"learning_rates": sweep.learning_rates[:1], "seeds": sweep.seeds[:1]}
    overrides = {
        name: Override(o.learning_rates and o.learning_rates[:1], o.seeds and o.seeds[:1])
        for name, o in sweep.overrides.items()
    }
    batches = 1 if any(parse_arm(name).data.get("unseen") for name in sweep.methods) else 4  # of those that are few
    times: dict[str, Any] = {"steps": 2, "epochs": None, "warmup": 1, "warmup_epochs": None, "save_every": 0}
    sampled = (2,) if experiment.train.sample_at else ()
    init = {key: value for key, value in experiment.init.items() if key not in ("rank_budget", "min_rank", "max_rank")}
    return dataclasses.replace(
        experiment,
        task=task_kind(experiment.task.name).tiny(experiment.task, folder),
        lora=dataclasses.replace(experiment.lora, rank=rank, alpha=experiment.lora.alpha * rank / experiment.lora.rank),
        init={**init, "num_batches": min(batches, experiment.num_batches)},
        train=dataclasses.replace(experiment.train, eval_at=(2,), sample_at=sampled, **times),
        sweep=dataclasses.replace(sweep, overrides=overrides, **grid),
    )
