"""An experiment file with the user's data, model or settings over it: where records go, and a check of the data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .settings import Experiment
from .tasks import make_task

_OF_THE_MODEL = ("model", "feature_layer", "size", "prompt")
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


def sets_data(changes: Sequence[str]) -> bool:
    """Return whether the changes name data."""
    return _sets(changes, "task.data") or _sets(changes, "task.eval_data")


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
