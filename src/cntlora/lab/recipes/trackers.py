"""Experiment trackers, as transformers' Trainer reports to them, and what they are told of a run besides its curves."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from ...extras import require

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""Names of transformers' `report_to`; each is the module that it needs, too."""


@dataclass(frozen=True)
class Tracked:
    """The facts of a run that a tracker is told.

    Attributes:
        project: of W&B and Trackio, and MLflow's experiment; for W&B and MLflow the environment may name another.
        run: the run's name.
        folder: where TensorBoard's files go, in a subfolder of the run's name, unless TENSORBOARD_LOGGING_DIR is set.
        start: numbers about the initialisation, logged before the first update.
        report: the same as a text, with every site.
    """

    project: str = "cntlora"
    run: str = "run"
    folder: Path = Path("tensorboard")
    start: Mapping[str, float] = field(default_factory=dict)
    report: str = ""


def check_trackers(names: Sequence[str]) -> None:
    """Raise MissingExtraError for the first tracker that is not installed."""
    for name in names:
        require("trackers", f"--report-to {name}", (name,))


@contextmanager
def tracking(names: Sequence[str], tracked: Tracked) -> Iterator[None]:
    """Run a training inside: trackers find the names of the run, and all that it logged is stored afterwards.

    A process of a sweep ends without the exit handlers in which trackers store what is left.
    """
    board = Path(os.environ.get("TENSORBOARD_LOGGING_DIR", tracked.folder)) / tracked.run
    wanted = {"TENSORBOARD_LOGGING_DIR": str(board)}
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        wanted[name] = os.environ.get(name, tracked.project)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in names:
            _store(name)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _store(name: str) -> None:
    """End the run of a tracker, also where the training stopped half-way; TensorBoard writes at every call."""
    tracker = import_module(name)
    if name == "mlflow":
        tracker.flush_async_logging()
        tracker.end_run()
    elif name == "wandb" or (name == "trackio" and tracker.context_vars.current_run.get() is not None):
        tracker.finish()  # of Trackio an error where the training has ended its run already


def log_report(names: Sequence[str], tracked: Tracked) -> Mapping[str, float | str]:
    """Return what the Trainer is to log of the start; MLflow, which takes numbers only, gets the text as a file."""
    if "mlflow" in names and tracked.report:
        import_module("mlflow").log_text(tracked.report, "initialisation.txt")
    text = {"init_report": tracked.report} if tracked.report and set(names) != {"mlflow"} else {}
    return {**tracked.start, **text}
