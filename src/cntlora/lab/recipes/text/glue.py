"""The eight tasks of GLUE (Wang et al. 2018) with their official metrics, on the validation rows.

[task]
name = "glue"
task = "mrpc"
model = "FacebookAI/roberta-large"
data = "nyu-mll/glue"        # or a folder with mrpc/train*.parquet and mrpc/validation*.parquet
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..frames import column, numbers, raw_column, read_frame
from ..task import Recipe
from ..values import at_least, one_of
from .classification import SequenceTask, need
from .tables import Table
from .tiny import at_most, tiny_encoder, write_rows


@dataclass(frozen=True)
class GlueTask:
    """One row of the table of tasks.

    Attributes:
        columns: of the text, or of both texts; other names that published files use follow the hub's.
        names: of the classes, in the order of the hub's labels; empty for regression.
        scores: the official ones, the one of the paper's table 10 first.
        held_out: the split that is scored.
    """

    columns: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]
    scores: tuple[str, ...] = ("accuracy",)
    held_out: str = "validation"


_ENTAILMENT = ("entailment", "not_entailment")
_SENTENCE = (("sentence",),)
_SENTENCES = (("sentence1", "#1 String"), ("sentence2", "#2 String"))
_LABELS = ("label", "gold_label", "is_duplicate", "score", "Quality")

GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(_SENTENCE, ("unacceptable", "acceptable"), ("matthews", "accuracy")),
    "mnli": GlueTask(
        (("premise", "sentence1"), ("hypothesis", "sentence2")),
        ("entailment", "neutral", "contradiction"),
        held_out="validation_matched",
    ),
    "mrpc": GlueTask(_SENTENCES, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qnli": GlueTask((("question",), ("sentence",)), _ENTAILMENT),
    "qqp": GlueTask((("question1",), ("question2",)), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "rte": GlueTask(_SENTENCES, _ENTAILMENT),
    "sst2": GlueTask(_SENTENCE, ("negative", "positive")),
    "stsb": GlueTask(_SENTENCES, (), ("pearson", "spearman")),
}


@dataclass(frozen=True)
class GlueSettings:
    """`[task]` of "glue".

    Attributes:
        name: "glue".
        task: cola, mnli (scored on the matched rows), mrpc, qnli, qqp, rte, sst2 or stsb.
        model: hub name or folder of the pretrained model.
        data: a data set of the hub with a configuration for each task, or a folder: train* and validation* (or dev*)
            files, .parquet, .jsonl, .csv or .tsv, in a folder of the task's name or directly in it.
        batch_size: rows a batch.
        max_length: tokens a row, both texts and the special ones; longer ones are cut.
        eval_size: validation rows that are scored, from the first on; None for all.
    """

    name: str = "glue"
    task: str = "mrpc"
    model: str = "FacebookAI/roberta-large"
    data: str = "nyu-mll/glue"
    batch_size: int = 32
    max_length: int = 128
    eval_size: int | None = None

    def __post_init__(self) -> None:
        need(self, model="a hub name or folder", data="a hub name or folder")
        one_of("task.task", self.task, GLUE)
        at_least("task", self, batch_size=1, max_length=1)
        if self.eval_size is not None:
            at_least("task", self, eval_size=1)


def make_task(settings: GlueSettings) -> SequenceTask:
    """The task of `[task]` settings."""
    kind = GLUE[settings.task]
    return SequenceTask(
        model=settings.model,
        load=lambda: load_tables(settings),
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        scores=kind.scores,
        main_metric=kind.scores[0],
        regression=not kind.names,
    )


def load_tables(settings: GlueSettings) -> tuple[Table, Table]:
    """Training rows and validation rows.

    Raises:
        FileNotFoundError: if the folder has no file for a split.
        ValueError: for rows that cannot be used; names the file, and the row.
    """
    kind = GLUE[settings.task]
    train = _table(settings, "train")
    held_out = _table(settings, kind.held_out)
    return train, held_out.take(range(min(len(held_out), settings.eval_size or len(held_out))))


def _table(settings: GlueSettings, split: str) -> Table:
    """The rows of a split."""
    kind = GLUE[settings.task]
    folder = Path(settings.data)
    if folder.is_dir():
        files = _files(folder, settings.task, split)
        where = ", ".join(map(str, files))
        frame = pd.concat([read_frame(path, quoted=path.suffix != ".tsv") for path in files], ignore_index=True)
    else:
        where = f"{settings.data}:{settings.task}#{split}"
        frame = read_frame(where)
    texts = [column(frame, _name(frame, names), where) for names in kind.columns]
    second = texts[1] if len(texts) > 1 else []
    label = _name(frame, _LABELS)
    if not kind.names:
        return Table(texts[0], [], [], second, numbers(frame, label, where))
    return Table(texts[0], _labels(frame, label, where, kind.names), list(kind.names), second)


def _name(frame: pd.DataFrame, names: tuple[str, ...]) -> str:
    """The first of the names that is a column; the first one if none is, for the message."""
    return next((name for name in names if name in frame.columns), names[0])


def _labels(frame: pd.DataFrame, name: str, where: str, names: tuple[str, ...]) -> list[int]:
    """Class indices, from indices or from the names of classes."""
    found = []
    for row, value in enumerate(raw_column(frame, name, where), start=1):
        text = str(value)
        index = names.index(text) if text in names else int(text) if text.isdecimal() else -1
        if not 0 <= index < len(names):
            raise ValueError(
                f"{where}: row {row}: expected a label from 0 to {len(names) - 1} or one of {', '.join(names)}, got "
                f"{text!r} (test rows have no labels)"
            )
        found.append(index)
    return found


def _files(folder: Path, task: str, split: str) -> list[Path]:
    """The files of a split in a folder."""
    places = [path for path in (folder / task, folder) if path.is_dir()]
    for place in places:
        for start in (split, split.replace("validation", "dev")):
            found = sorted(
                path for ending in ("parquet", "jsonl", "csv", "tsv") for path in place.glob(f"{start}*.{ending}")
            )
            if found:
                return found
    looked = " or ".join(str(place) for place in places)
    raise FileNotFoundError(f"{looked}: there is no {split}*.parquet, .jsonl, .csv or .tsv for GLUE's {task}")


def tiny(settings: GlueSettings, folder: Path) -> GlueSettings:
    """The same with a tiny random encoder and 24 synthetic rows a split, in files as of the real task."""
    kind = GLUE[settings.task]
    texts = ["a good day", "a bad day", "such a fine and good thing", "such a bad and dull thing"]
    for split in ("train", kind.held_out):
        rows: list[dict[str, Any]] = []
        for i in range(24):
            row: dict[str, Any] = {names[0]: texts[(i + at) % 4] for at, names in enumerate(kind.columns)}
            rows.append({**row, "label": i % len(kind.names) if kind.names else i / 5})
        write_rows(folder / settings.task / f"{split}.jsonl", rows)
    return dataclasses.replace(
        settings,
        model=tiny_encoder(settings.model, folder / "model", texts),
        data=str(folder),
        eval_size=8,
        **at_most(settings, batch_size=4, max_length=32),
    )


RECIPES = {"glue": Recipe(GlueSettings, make_task, tiny)}
