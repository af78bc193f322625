"""The record of a run: its type, which the code that writes it and the code that reads it share, and its file.

A record is a JSON file of plain values. `digest` is the SHA-256 of everything else in it, which tells a record that was
cut short or edited.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from ..atomic import write_atomically
from ..version import RECORD_SCHEMA

SCHEMA = RECORD_SCHEMA
Status = Literal["finished", "diverged", "failed"]
Numbers = Sequence[float | None]  # null stands for NaN and infinity


class Sample(TypedDict):
    """Output of a model for one prompt.

    Attributes:
        kind: "image" or "text".
        name: such as the prompt.
        file: of the image, within the folder of the samples, or relative to that of the record; None without one.
        text: that was generated; None for an image alone.
    """

    kind: str
    name: str
    file: str | None
    text: str | None


class SampleEntry(Sample):
    """A sample made during the training; `step` is the number of updates before it."""

    step: int


class StartLosses(TypedDict):
    """The loss of the first training batch, before and after the initialisation."""

    loss_before: float | None
    loss_after: float | None


class SiteFacts(TypedDict, total=False):
    """Values recorded of one adapted layer.

    Attributes:
        kind: what it projects to: "query", "key", "value", "out", …
        depth: number of its block.
        rank: directions that train; file_rank: rank of the factors in the file.
        singular_values: the largest of ΔW.
        delta_norm, weight_norm, start_norm: ‖ΔW‖, ‖W‖ and ‖s·B·A‖ at the start, Frobenius.
        tokens, effective_rank: of the inputs that the initialisation read.
        gradient_A, gradient_B: norms of the gradients at step 0.
        cosine, cosine_product, spectral_norm: the trained adapter against the initial one (table 2 of the paper).
    """

    kind: str
    depth: int | None
    rank: int
    file_rank: int
    singular_values: Numbers | None
    delta_norm: float | None
    weight_norm: float | None
    start_norm: float | None
    tokens: int | None
    effective_rank: int | None
    gradient_A: float | None
    gradient_B: float | None
    cosine: float | None
    cosine_product: float | None
    spectral_norm: float | None


class Outcome(TypedDict):
    """Outcome of the training of a run; see `RunRecord`."""

    status: Status
    error: str | None
    train_seconds: float
    mean_loss: float | None
    losses: Numbers
    seconds: Numbers
    evaluations: list[dict[str, Any]]
    samples: list[SampleEntry]


class _Identity(TypedDict):
    """Fields that every record has."""

    schema: int
    experiment: str
    method: str
    learning_rate: float
    seed: int
    status: Status


class RunRecord(_Identity, total=False):
    """One run of a study, schema `SCHEMA`.

    Attributes:
        schema: of the record.
        experiment, task, method, label, learning_rate, seed: what was run; `label` is the method's name in tables.
        status, error, traceback: how it ended.
        config: every setting that the outcome depends on, by section: task, lora, init, train.
        metrics: held-out metric → "min" or "max", which is better; main_metric: the one that stands for the task.
        init_seconds, train_seconds: of the initialisation and of the training.
        peak_memory_mib: most memory of the process, in MiB.
        trainable_parameters: elements that train.
        mean_loss: training loss, mean over all steps.
        losses, seconds: training loss of every step, and seconds of training at its end.
        evaluations: at each one its step, its seconds of training and every held-out metric.
        samples: see `SampleEntry`.
        start: see `StartLosses`.
        sites: adapted layer → `SiteFacts`.
        versions, git, command, machine: of the libraries and the code, the command that makes the run again, and where
            it was made.
        digest: SHA-256 of the rest; records of early versions have none.
        folder: where the reader found the record; in no file.
    """

    task: str
    label: str
    error: str | None
    traceback: str
    config: dict[str, Any]
    metrics: dict[str, str]
    main_metric: str | None
    init_seconds: float | None
    train_seconds: float | None
    peak_memory_mib: float | None
    trainable_parameters: int | None
    mean_loss: float | None
    losses: Numbers
    seconds: Numbers
    evaluations: list[dict[str, Any]]
    samples: list[SampleEntry]
    start: StartLosses | None
    sites: dict[str, SiteFacts]
    versions: dict[str, str]
    git: str
    command: str
    machine: dict[str, Any]
    digest: str
    folder: str


def file_name(record: RunRecord) -> str:
    """The name of a record's file."""
    return f"{run_name(record['method'], record['learning_rate'], record['seed'])}.json"


def run_name(method: str, learning_rate: float, seed: int) -> str:
    """Return the name of a run in the names of files and folders."""
    return f"{re.sub(r'[:/]', '-', method)}-lr{learning_rate!r}-seed{seed}"


_REQUIRED = {"experiment": str, "method": str, "learning_rate": int | float, "seed": int, "status": str}


def digest_of(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a record without its digest."""
    text = json.dumps({key: value for key, value in record.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_digest(where: Path | str, record: Mapping[str, Any], advice: str) -> None:
    """Check that a record is as it was written; one without a digest, of an early version, is taken as it is.

    Args:
        where: the record's file, for the message.
        advice: what the message tells the user to do.

    Raises:
        ValueError: if it was changed afterwards; names the file.
    """
    if "digest" in record and record["digest"] != digest_of(record):
        raise ValueError(f"{where}: the record is not what was saved (its digest differs), so it was changed; {advice}")


def check_required(where: Path | str, record: Mapping[str, Any], advice: str) -> RunRecord:
    """Check that a record says which run it is of, and that it was not changed.

    Raises:
        ValueError: names the file and what is missing.
    """
    wrong = [key for key, kind in _REQUIRED.items() if not isinstance(record.get(key), kind)]
    if wrong:
        raise ValueError(f"{where} is a run record without a valid {', '.join(wrong)}; {advice}")
    check_digest(where, record, advice)
    return record  # type: ignore[return-value]


def read_record(path: Path, advice: str = "move it away, or use --replace") -> RunRecord:
    """Read the record of a run.

    Args:
        path: of the file.
        advice: what an error message tells the user to do.

    Raises:
        ValueError: if the file is no record, was cut short or edited, or is of another schema; names the file.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as a record ({error}); {advice}") from error
    found = record.get("schema") if isinstance(record, dict) else None
    if type(found) is int and found > SCHEMA:
        raise ValueError(
            f"{path}: a record of schema {found}, this cntlora reads {SCHEMA}; update cntlora, or {advice}"
        )
    if found != SCHEMA:
        raise ValueError(f"{path}: is no record of schema {SCHEMA}; {advice}")
    check_digest(path, record, advice)
    return record  # type: ignore[no-any-return]


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record with its digest, whole or not at all; NaN and infinity become null."""
    plain = _finite(record)
    plain["digest"] = digest_of(plain)
    text = json.dumps(plain, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode(errors="backslashreplace"))  # half a character as JSON spells it


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by None, tuples by lists, keys by text."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value
