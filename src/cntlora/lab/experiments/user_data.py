"""An experiment file with the user's data, model or settings over it: where records go, and a check of the data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..recipes.model_folder import check_names, check_rank, default_targets, find_folder, model_type
from ..recipes.task import Task
from .arms import parse_arm
from .settings import Experiment
from .tasks import make_task

_OF_THE_MODEL = ("model", "feature_layer", "size", "prompt", "sentences")
_LONG = 2**20


def default_folder(experiment: Experiment, changes: Sequence[str]) -> Path:
    """Return the folder of records without `--out`.

    `results/NAME` for the file as it is, so that what is put over it never meets the file's own records:
    `results/NAME-DATA` with other data, DATA being its name without folders and suffix, and `results/NAME-changed` with
    any other change.

    Args:
        experiment: with the changes.
        changes: KEY=VALUE that were put over the file.
    """
    root = Path("results")
    if not changes:
        return root / experiment.name
    data = getattr(experiment.task, "data", None) if _sets(changes, "task.data") else None
    name = _short(data) if isinstance(data, str) else ""
    return root / f"{experiment.name}-{name or 'changed'}"


def own_name(experiment: Experiment, changes: Sequence[str]) -> tuple[Experiment, Path]:
    """Return the experiment, named NAME-DATA where other data is put over the file, and its `default_folder`.

    Reports show the name, and the file's own says what the file's data is.
    """
    folder = default_folder(experiment, changes)
    if _sets(changes, "task.data"):
        experiment = dataclasses.replace(experiment, name=folder.name, file=experiment.name)
    return experiment, folder


def sets_data(changes: Sequence[str]) -> bool:
    """Return whether the changes name data."""
    return _sets(changes, "task.data") or _sets(changes, "task.eval_data")


def check_first(experiment: Experiment, task: Task) -> None:
    """Check all that can be told before any training, what takes no time first.

    In this order: the folder of the model, the rank, the data, the names of the layers, and what data and model are for
    each other.

    Args:
        experiment: names the model.
        task: of the experiment.

    Raises:
        ValueError: for what cannot be used; names the place, what was expected and what came.
    """
    name = getattr(experiment.task, "model", "")
    folder = find_folder(name) if name else None
    if folder is None or all(parse_arm(method).full for method in experiment.sweep.methods):
        task.check()
        return
    late = task.targets_from_model and not experiment.lora.targets
    if not late:
        _check_rank(experiment, task, folder)
    task.check_data()
    if late:
        _check_rank(experiment, task, folder)
    check_names(folder, experiment.lora.targets, "lora.targets")
    task.check_model()


def _check_rank(experiment: Experiment, task: Task, folder: Path) -> None:
    """Raise ValueError for a rank above the smallest layer's; adaptive ranks fit by themselves."""
    arms = [parse_arm(method) for method in experiment.sweep.methods]
    configs = [config for config in (experiment.init_config(arm, 0) for arm in arms) if config is not None]
    fixed = [config for config in configs if not config.adaptive_ranks]
    if len(fixed) < len(configs) and not fixed:
        return
    widths = [config.method.width for config in fixed if config.method is not None]
    targets = experiment.lora.targets or task.targets or default_targets(model_type(folder))
    check_rank(folder, experiment.lora.rank, targets, max(widths, default=1))


def check_data(task: Any, tiny: Any) -> str | None:
    """Check the data of a task as before any training, with the tiny model in place of its own.

    Returns:
        One line about the data, such as which class has which index; None where there is nothing to say.

    Args:
        task: the `[task]` section with the user's data.
        tiny: the same for `--smoke`: its model, and what goes with that, are used.

    Raises:
        ValueError, FileNotFoundError: what the task's `check` finds in the data.
    """
    names = {f.name for f in dataclasses.fields(task)}
    stand_ins = {name: getattr(tiny, name) for name in _OF_THE_MODEL if name in names}
    if "max_length" in names:  # the tiny tokenizer knows letters, so that rows have many more tokens than in earnest
        stand_ins["max_length"] = _LONG
    own = make_task(dataclasses.replace(task, **stand_ins))
    own.check()
    return own.describe()


def _sets(changes: Sequence[str], key: str) -> bool:
    return any(change.partition("=")[0].strip() == key for change in changes)


def _short(data: str) -> str:
    """The last part of a path or name, without suffix, in characters that suit a folder's name."""
    path = Path(data).expanduser()
    name = path.stem if path.is_file() else path.resolve().name if path.exists() else path.name
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")
