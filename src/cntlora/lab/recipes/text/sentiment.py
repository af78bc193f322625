"""The tweets task: MiniLM as a classifier of three sentiments, small enough for a laptop's CPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ..task import Recipe
from ..values import at_least
from .classification import SequenceTask, hold_out
from .tables import Table, one_class_only, read_table
from .tiny import tiny_encoder, write_rows

TARGET_MODULES = ("query", "key", "value", "attention.output.dense")
"""What LoRA adapts: q, k, v and the attention's output, not `output.dense` of the MLP."""
_REGRESSION = "--set task.name=text --set task.kind=regression"


@dataclass(frozen=True)
class TweetsSettings:
    """`[task]` of "tweets".

    Attributes:
        name: "tweets".
        model: folder or hub name of another BERT; None for MiniLM-L6 from a package.
        data: file of other texts; None for labelled tweets from a package.
        text, label: columns of `data`.
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


def make_task(settings: TweetsSettings | None = None) -> SequenceTask:
    """Three classes of tweets, or the user's texts, with a split that is the same for every seed of training.

    Args:
        settings: None for the defaults, whose model and tweets are downloaded at the first use.
    """
    s = settings or TweetsSettings()
    return SequenceTask(
        model=s.model or "sample:minilm",
        load=lambda: _load(s),
        batch_size=s.batch_size,
        max_length=s.max_length,
        scores=("accuracy", "macro_f1"),
        main_metric="macro_f1",
        targets=TARGET_MODULES,
    )


def _load(s: TweetsSettings) -> tuple[Table, Table]:
    """Training rows and held-out rows."""
    from ..samples.models import tweets

    table = tweets() if s.data is None else read_table(
        s.data, s.text, s.label, instead=_REGRESSION, settings=("task.text", "task.label", "")
    )  # fmt: skip
    if len(table.names) < 2:
        raise ValueError(one_class_only(s.data, s.label, "class", table.names[0]))
    return hold_out(table, s.data or "sample:tweets", s.eval_size, s.split_seed)


def tiny(settings: TweetsSettings, folder: Path) -> TweetsSettings:
    """The same with a tiny random BERT and 24 made-up texts of three classes."""
    texts = {"negative": "such a bad and dull day", "neutral": "it is a day", "positive": "such a good and fine day"}
    rows = [{"text": f"{text} {'so ' * i}".strip(), "label": name} for i in range(8) for name, text in texts.items()]
    return dataclasses.replace(
        settings,
        model=tiny_encoder("bert", folder / "model", texts.values()),
        data=write_rows(folder / "texts.jsonl", rows),
        text="text",
        label="label",
        eval_size=6,
        batch_size=min(settings.batch_size, 4),
        max_length=min(settings.max_length, 32),
    )


RECIPES = {"tweets": Recipe(TweetsSettings, make_task, tiny)}
