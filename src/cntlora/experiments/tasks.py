"""The table of tasks: what is learned, how it is scored, and which layers LoRA adapts. A new task is one row.

The table is light: what a task needs (transformers, pandas, scikit-learn) is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from ..config import unknown_name
from .settings import TaskSettings

if TYPE_CHECKING:
    from ..recipes.sentiment import SentimentTask
    from ..recipes.text import EncodedBatches, Table


class Task(Protocol):
    """Model and data of a task; the same seed gives the same."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Layers that LoRA adapts unless `[lora] targets` says otherwise; empty for PEFT's choice for the model."""

    def build_model(self, seed: int) -> nn.Module:
        """The pretrained model, with what is new in it drawn under `seed`; its output has a `loss`."""

    def train_batches(self, seed: int) -> Iterable[Mapping[str, Any]]:
        """Training batches that can be read again, in an order that depends on `seed` alone."""

    def eval_batches(self) -> Iterable[Mapping[str, Any]]:
        """Held-out batches, always the same."""


def by_length(table: Table) -> Table:
    """The rows from short to long, so that batches hold little padding: the scores are the same, a third sooner."""
    return table.take(sorted(range(len(table)), key=lambda i: len(table.texts[i])))


@dataclass(frozen=True)
class TweetsTask:
    """`cntlora.recipes.sentiment.SentimentTask`, with the held-out tweets from short to long."""

    settings: TaskSettings

    @cached_property
    def _task(self) -> SentimentTask:
        from ..recipes.sentiment import SentimentTask

        s = self.settings
        return SentimentTask(s.batch_size, s.max_length, s.eval_size, s.split_seed)

    @property
    def targets(self) -> tuple[str, ...]:
        """Query, key, value and the attention's output."""
        from ..recipes.sentiment import TARGET_MODULES

        return TARGET_MODULES

    def build_model(self, seed: int) -> nn.Module:
        """MiniLM with a new classification head."""
        return self._task.build_model(seed)

    def train_batches(self, seed: int) -> EncodedBatches:
        """All training tweets once."""
        return self._task.train_batches(seed)

    def eval_batches(self) -> EncodedBatches:
        """The held-out tweets."""
        from ..recipes.text import encode_batches

        table, s = by_length(self._task.tables[1]), self.settings
        return encode_batches(
            self._task.tokenizer, table.texts, table.labels, batch_size=s.batch_size, max_length=s.max_length
        )


@dataclass(frozen=True)
class TextTask:
    """Classification of the user's own texts with a model from a hub name or folder.

    Raises:
        ValueError: if the model or the data cannot be used; at the first use.
    """

    settings: TaskSettings
    targets: tuple[str, ...] = ()

    @cached_property
    def tables(self) -> tuple[Table, Table]:
        """Training texts and held-out texts."""
        from ..recipes.text import read_table

        s = self.settings
        return read_table(str(s.data), text=s.text, label=s.label).split(s.eval_size, s.split_seed)

    def build_model(self, seed: int) -> nn.Module:
        """The model in float32 with a new classification head."""
        return self._loaded(seed)[0].float()

    def train_batches(self, seed: int) -> EncodedBatches:
        """All training texts once."""
        from ..recipes.text import shuffled

        return self._batches(shuffled(self.tables[0], seed))

    def eval_batches(self) -> EncodedBatches:
        """The held-out texts, the short ones first."""
        return self._batches(by_length(self.tables[1]))

    def _loaded(self, seed: int) -> tuple[nn.Module, Any, str]:
        from ..recipes.loading import load_model

        table, _ = self.tables
        return load_model(str(self.settings.model), "classification", table, seed)

    @cached_property
    def _tokenizer(self) -> Any:
        return self._loaded(0)[1]

    def _batches(self, table: Table) -> EncodedBatches:
        from ..recipes.loading import batches_of

        s = self.settings
        return batches_of(self._tokenizer, table, "classification", s.batch_size, s.max_length)


@dataclass(frozen=True)
class TaskKind:
    """One row of the table.

    Attributes:
        make: the task of a `[task]` section.
        metrics: held-out metrics and whether the best is the "min" or the "max".
        main_metric: the one that tables show first.
        evaluate: metrics of a model on held-out batches.
        peft_type: `task_type` of PEFT's configuration.
    """

    make: Callable[[TaskSettings], Task]
    metrics: Mapping[str, str]
    main_metric: str
    evaluate: Callable[[nn.Module, Iterable[Mapping[str, Any]]], dict[str, float]]
    peft_type: str


def _classifier_metrics(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    from ..recipes.training import evaluate_classifier

    return dict(zip(_CLASSIFIER, evaluate_classifier(model, batches), strict=True))


_CLASSIFIER = {"loss": "min", "accuracy": "max", "macro_f1": "max"}


TASKS: dict[str, TaskKind] = {
    "tweets": TaskKind(TweetsTask, _CLASSIFIER, "macro_f1", _classifier_metrics, "SEQ_CLS"),
    "text": TaskKind(TextTask, _CLASSIFIER, "macro_f1", _classifier_metrics, "SEQ_CLS"),
}


def task_kind(name: str) -> TaskKind:
    """The row of a task's name.

    Raises:
        ValueError: for an unknown name, with the nearest right one.
    """
    if name not in TASKS:
        raise ValueError(unknown_name("task.name", name, TASKS))
    return TASKS[name]
