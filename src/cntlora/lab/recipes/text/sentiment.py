"""The tweets task: MiniLM as a classifier of three sentiments, small enough for a laptop's CPU.

transformers is imported when a model is built, so that the settings can be read at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..task import Defaults, Recipe
from ..values import at_least

if TYPE_CHECKING:
    from .tables import EncodedBatches, Table

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


@dataclass(frozen=True)
class SentimentTask(Defaults):
    """Three-class sentiment of tweets, with a split that is the same for every seed of training.

    Raises:
        RuntimeError: at the first use, if model or data cannot be downloaded.
    """

    settings: TweetsSettings = field(default_factory=TweetsSettings)
    targets: tuple[str, ...] = TARGET_MODULES
    peft_type: str | None = "SEQ_CLS"
    main_metric: str = "macro_f1"
    _new: list[tuple[str, ...]] = field(default_factory=list, repr=False, compare=False)

    @property
    def metrics(self) -> Mapping[str, str]:
        """Loss, accuracy and macro F1."""
        return {"loss": "min", "accuracy": "max", "macro_f1": "max"}

    @cached_property
    def _folder(self) -> Path | str:
        from ..samples.models import minilm_folder

        return minilm_folder() if self.settings.model is None else self.settings.model

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model's folder."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder)

    @cached_property
    def tables(self) -> tuple[Table, Table]:
        """Training tweets and held-out tweets."""
        from ..samples.models import tweets
        from .classification import hold_out
        from .tables import one_class_only, read_table

        s = self.settings
        table = tweets() if s.data is None else read_table(s.data, s.text, s.label, instead=_REGRESSION)
        if len(table.names) < 2:
            raise ValueError(one_class_only(s.data, s.label, "class", table.names[0]))
        return hold_out(table, s.data or "sample:tweets", s.eval_size, s.split_seed)

    def check(self) -> None:
        """Read the texts, where they are the user's own."""
        if self.settings.data is not None:
            _ = self.tables

    def describe(self) -> str | None:
        """The index of each class with its training rows, where the texts are the user's own."""
        if self.settings.data is None:
            return None
        from .tables import label_line

        return f"{label_line(self.tables[0])}; {len(self.tables[1])} rows held out"

    def build_model(self, seed: int) -> nn.Module:
        """The model with a new classification head, drawn under `seed`; global generators are left as found."""
        from transformers import AutoModelForSequenceClassification

        from ....messages import quiet_transformers
        from ..loading import new_modules

        names = self.tables[0].names
        cuda = list(range(torch.cuda.device_count()))
        with torch.random.fork_rng(devices=cuda), quiet_transformers():
            torch.manual_seed(seed)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self._folder,
                output_loading_info=True,
                num_labels=len(names),
                id2label=dict(enumerate(names)),
                label2id={name: i for i, name in enumerate(names)},
            )
        self._new[:] = [new_modules(info)]
        whole: nn.Module = model.float()  # newer transformers keep the file's dtype, older ones make it float32
        return whole

    @property
    def modules_to_save(self) -> tuple[str, ...]:  # type: ignore[override]
        """Parts that the checkpoint of another model lacks beside the head that PEFT knows."""
        if not self._new:
            self.build_model(0)
        return self._new[0]

    def train_batches(self, seed: int) -> EncodedBatches:
        """All training tweets once, in an order that depends on `seed` alone."""
        from .tables import shuffled

        return self._encoded(shuffled(self.tables[0], seed))

    def eval_batches(self) -> EncodedBatches:
        """The held-out tweets from short to long, so that batches hold little padding."""
        from .tables import by_length

        return self._encoded(by_length(self.tables[1]))

    def evaluate(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Loss, accuracy and macro F1."""
        from ..scoring import classifier_metrics

        return classifier_metrics(model, batches)

    def _encoded(self, table: Table) -> EncodedBatches:
        from .tables import encode_batches

        s = self.settings
        return encode_batches(
            self.tokenizer, table.texts, table.labels, batch_size=s.batch_size, max_length=s.max_length
        )


def tiny(settings: TweetsSettings, folder: Path) -> TweetsSettings:
    """The same with a tiny random BERT and 24 made-up texts of three classes."""
    from .tiny import tiny_encoder, write_rows

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


RECIPES = {"tweets": Recipe(TweetsSettings, SentimentTask, tiny)}
