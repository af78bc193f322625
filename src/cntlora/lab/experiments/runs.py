"""One run: what identifies it, where its record lies, whether a record is of it, and the record of a failed one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ...config import InitConfig
from ...methods.function import FunctionMethod
from ..recipes.train_settings import TrainSettings
from ..record import SCHEMA, RunRecord, run_name
from .arms import Arm, parse_arm
from .digests import data_digests
from .environment import git_state, versions, without_places
from .sections import LoraSettings
from .settings import Experiment
from .tasks import make_task

TRIAL = "cntlora-smoke-"
"""What the name of a trial's folder begins with."""


@dataclass(frozen=True)
class Run:
    """One cell of a sweep: plain values, so that it can be sent to another process.

    Attributes:
        experiment, method, learning_rate, seed: what is run.
        save_adapter: whether the trained adapter is kept beside the record; no part of the configuration.
    """

    experiment: Experiment
    method: str
    learning_rate: float
    seed: int
    save_adapter: bool = False

    @property
    def arm(self) -> Arm:
        """The arm that `method` names."""
        return parse_arm(self.method)

    @property
    def name(self) -> str:
        """The name of the file, without its suffix."""
        return run_name(self.method, self.learning_rate, self.seed)

    def init_config(self) -> InitConfig | None:
        """The resolved configuration of cntlora; None for an arm that has none."""
        config = self.experiment.init_config(self.arm, self.seed)
        if config is not None and self.arm.fitted and config.chosen.rate is not None:
            return replace(config, learning_rate=self.learning_rate)
        return config

    def config(self) -> dict[str, Any]:
        """All that the outcome depends on. The grid of the sweep is no part of it, so a sweep can grow."""
        init = self.init_config()
        e = self.experiment
        train = {**asdict(e.train), "learning_rate": self.learning_rate, "seed": self.seed}
        del train["report_to"]  # on trackers the outcome does not depend
        config: dict[str, Any] = {
            "task": {**asdict(e.task), **data_digests(e.task)},
            "lora": None if self.arm.full else {**asdict(e.lora), **self.arm.lora, "init": self.arm.peft},
            "init": None if init is None else {**init.stated(), **_code_of(init)},
            # of cntlora's arms it is in "init"
            "num_batches": e.num_batches if self.arm.peft or (self.arm.reads_besides and init is None) else None,
            "train": train,
        }
        if self.arm.data:
            config["init_data"] = dict(self.arm.data)
        if self.arm.fitted:
            config["fitted"] = True
        if self.arm.fit_head:
            config["fit_head"] = True
        plain: dict[str, Any] = json.loads(json.dumps(config))  # lists for tuples, as in a file
        return {**plain, "task": {key: _named(value) for key, value in plain["task"].items()}}


def _code_of(init: InitConfig) -> dict[str, str]:
    """A digest of the code of a function that is the method, so that one edited since is not taken for it."""
    method = init.chosen
    return {"code": method.code} if isinstance(method, FunctionMethod) else {}


def _named(value: Any) -> Any:
    """A setting; of an absolute path its last name, and a digest that tells it from others of that name.

    The folder of a trial (`--smoke`) has another name each time, and what lies in it is always the same.
    """
    if not isinstance(value, str) or not Path(value).expanduser().is_absolute():
        return value
    path = re.sub(rf".*[/\\]{TRIAL}[^/\\]*", "", value)
    return f"{Path(value).name} ({hashlib.sha256(path.encode()).hexdigest()[:8]})"


def runs_of(experiment: Experiment) -> list[Run]:
    """All runs, those of one seed together, so that every arm has something early on."""
    sweep = experiment.sweep
    overrides = {parse_arm(name).meaning: override for name, override in sweep.overrides.items()}
    grid = []
    for method in sweep.methods:
        own = overrides.get(parse_arm(method).meaning)
        rates = (own and own.learning_rates) or sweep.learning_rates
        seeds = sweep.seeds if own is None or own.seeds is None else own.seeds
        grid += [Run(experiment, method, rate, seed) for seed in seeds for rate in rates]
    return sorted(grid, key=lambda run: run.seed)  # stable: within a seed in the order of the file


def path_of(out: Path, run: Run) -> Path:
    """The file of a run's record."""
    return out / f"{run.name}.json"


def check_record(path: Path, record: RunRecord, run: Run) -> None:
    """Return whether a record is of this very run.

    Raises:
        ValueError: names the file and the first setting that differs.
    """
    config = run.config()
    defaults = _defaults(config, run)
    for key, old, new in _differences("", record.get("config") or {}, config):
        # an option that came into the code after the record was written had no effect on it, if it is at its default
        if old is _MISSING and key in defaults and defaults[key] == new:
            continue
        was = "is missing" if old is _MISSING else f"is {old!r}"
        raise ValueError(
            f"{path}: {key} {was} there and {'missing' if new is _MISSING else repr(new)} in the experiment; "
            "use another --out, or make its runs again with --replace"
        )


_MISSING = object()


def _defaults(config: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Dotted key → default of every option."""
    init = InitConfig.from_dict({"method": config["init"]["method"]}).stated() if config["init"] else {}
    task = {f.name: f.default for f in fields(run.experiment.task) if f.default is not MISSING}
    digests = dict.fromkeys(data_digests(run.experiment.task))
    sections = {"task": {**task, **digests}, "lora": asdict(LoraSettings()), "train": asdict(TrainSettings())}
    plain = json.loads(json.dumps({**sections, "init": init}))
    return {f"{section}.{key}": value for section, values in plain.items() for key, value in values.items()}


def _differences(where: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new) of everything that differs."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        if old != new:
            yield where, old, new
        return
    for key in (*new, *(k for k in old if k not in new)):
        inner = f"{where}.{key}" if where else str(key)
        if key not in old or key not in new:
            yield inner, old.get(key, _MISSING), new.get(key, _MISSING)
        else:
            yield from _differences(inner, old[key], new[key])


def checkpoints_of(out: Path, run: Run) -> Path:
    """Return the folder of a run's checkpoints, which are kept until its record is written."""
    return out / run.name / "checkpoint"


def remove_checkpoints(out: Path, run: Run, record: RunRecord) -> None:
    """Remove the checkpoints of a run whose record is written; those of a failed one stay, to be gone on with."""
    if record["status"] != "failed":
        folder = checkpoints_of(out, run)
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # not there, or with samples in it
            folder.parent.rmdir()


def frame(run: Run, machine: Mapping[str, Any]) -> RunRecord:
    """The part of a record that is known before the run, with nothing measured: as a failed run has it."""
    task = make_task(run.experiment.task)
    return {
        "schema": SCHEMA,
        "experiment": run.experiment.name,
        "task": run.experiment.task.name,
        "method": run.method,
        "label": run.arm.label,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "status": "failed",
        "error": None,
        "config": run.config(),
        "metrics": dict(task.metrics),
        "main_metric": task.main_metric,
        "init_seconds": None,
        "train_seconds": None,
        "peak_memory_mib": None,
        "trainable_parameters": None,
        "mean_loss": None,
        "losses": [],
        "seconds": [],
        "evaluations": [],
        "samples": [],
        "start": None,
        "sites": {},
        "versions": versions(),
        "git": git_state(),
        "command": command_of(run),
        "machine": dict(machine),
    }


def command_of(run: Run) -> str:
    """Return the command that makes this run again, where the file says what `config` says."""
    grid = f"--methods {run.method} --learning-rates {run.learning_rate:g} --seeds {run.seed}"
    return f"cntlora compare studies/{run.experiment.file or run.experiment.name}.toml {grid}"


def failed(run: Run, machine: Mapping[str, Any], error: str, traceback: str | None = None) -> RunRecord:
    """The record of a run that has no outcome."""
    record = frame(run, machine)
    record["error"] = without_places(" ".join(error.split()))
    if traceback is not None:
        record["traceback"] = without_places(traceback)
    return record
