"""Text data: tables of texts and labels read from files, and batches tokenised while they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING

import pandas as pd

from ....messages import counted
from ..frames import column, names_of, numbers, raw_column, read_frame
from ..labels import REGRESSION, class_column, describe_classes, known_classes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that transformers' losses leave out
_PADDINGS = ("longest", "max_length")


@dataclass(frozen=True)
class Table:
    """Texts, or pairs of texts, and, if there are any, their classes or their numbers.

    Attributes:
        texts: one string a row.
        labels: one class index a row; empty if there are no classes.
        names: the name of each class; empty if there are no classes.
        seconds: the second text of each row's pair; empty for single texts.
        values: one number a row, for regression; empty if there are no numbers.

    Raises:
        ValueError: if the numbers of texts and of anything else differ, or a label has no name.
    """

    texts: list[str]
    labels: list[int]
    names: list[str]
    seconds: list[str] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for what in ("labels", "seconds", "values"):
            given: list[object] = getattr(self, what)
            if given and len(given) != len(self.texts):
                raise ValueError(f"{what}: expected one for each of {len(self.texts)} texts, got {len(given)}")
        strange = sorted({label for label in self.labels if not 0 <= label < len(self.names)})
        if strange:
            raise ValueError(f"labels: expected indices of the {len(self.names)} names, got {strange[:5]}")

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Table:
        """The given rows, in the given order."""
        return Table(
            [self.texts[i] for i in rows],
            [self.labels[i] for i in rows] if self.labels else [],
            self.names,
            [self.seconds[i] for i in rows] if self.seconds else [],
            [self.values[i] for i in rows] if self.values else [],
        )

    def split(self, eval_size: int | float, seed: int) -> tuple[Table, Table]:
        """Training rows and held-out rows, in random order, with the same shares of the classes.

        Args:
            eval_size: held-out rows as a number, or as a share in (0, 1).
            seed: the same seed gives the same split; no global generator is used.

        Raises:
            ValueError: if the rows do not suffice, or a class has too few of them to be in both parts.
        """
        from sklearn.model_selection import train_test_split  # which takes seconds to import

        try:
            train, held_out = train_test_split(
                range(len(self)), test_size=eval_size, random_state=seed, stratify=self.labels or None
            )
        except ValueError as error:
            raise ValueError(f"eval_size={eval_size} of {len(self)} texts cannot be held out: {error}") from error
        return self.take(train), self.take(held_out)


def label_line(table: Table) -> str:
    """One line about the labels: the index of each class with its rows, or the range of the numbers."""
    if table.values:
        return f"labels: numbers from {min(table.values):g} to {max(table.values):g} ({counted(len(table), 'row')})"
    return f"classes: {describe_classes(table.names, table.labels)}"


def shuffled(table: Table, seed: int) -> Table:
    """The rows in a random order that depends on the seed alone."""
    return table.take(random_order(len(table), seed))


def random_order(count: int, seed: int) -> list[int]:
    """The rows 0 to count − 1 in an order that depends on the seed alone."""
    import torch

    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def by_length(table: Table) -> Table:
    """The rows from short to long, so that batches hold little padding: the scores are the same, a third sooner."""
    sizes = [len(text) for text in table.texts]
    for i, second in enumerate(table.seconds):
        sizes[i] += len(second)
    return table.take(sorted(range(len(table)), key=lambda i: sizes[i]))


def read_table(
    path: str | PathLike[str],
    text: str = "text",
    label: str | None = None,
    second: str | None = None,
    *,
    regression: bool = False,
    instead: str | None = REGRESSION,
    held_out: bool = False,
    frame: pd.DataFrame | None = None,
    settings: tuple[str, str, str] = ("", "", ""),
) -> Table:
    """A table from a file or a data set of the hub, see `cntlora.lab.recipes.frames.read_frame`.

    Every text is read as it stands, "NA" and "001" too. Classes are those of `cntlora.lab.recipes.labels.class_column`,
    sorted by name, numbers by value; a data set of the hub that names its classes keeps their order. A field of a .csv
    or .tsv that begins with a double quote ends at the next one; quotes inside are doubled.

    Args:
        path: the file, or the data set's name.
        text: column (key) of the texts; not used for .txt.
        label: column (key) of the labels; None for a table without labels.
        second: column (key) of the second texts of pairs; None for single texts.
        regression: the labels are numbers, which become `Table.values`, instead of classes.
        instead: how the user asks for regression, for the message about a column of numbers; None if there is no way.
        held_out: the rows are only scored, so that a class may have one of them.
        frame: the rows, where they are read already.
        settings: what names the columns `text`, `label` and `second`, for messages, such as "task.text".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for another suffix, an empty or broken file, a missing column, one column for two things, an empty
            field, a column that holds no classes, or with `regression` a label that is no number; the message names the
            file, and the columns that exist or the row.
    """
    if str(path).lower().endswith(".txt"):
        for name, value in (("label", label), ("second", second)):
            if value is not None:
                raise ValueError(f"{path}: a .txt file has no {name}={value!r}; use .csv, .tsv, .jsonl or .parquet")
        text = "text"
    frame = read_frame(path) if frame is None else frame
    named = [name for name in (text, second, label) if name is not None]
    if len(set(named)) < len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise ValueError(f"{path}: column {twice!r} is named both as text and as label, or twice; name two columns")
    texts = column(frame, text, path, settings[0])
    seconds = [] if second is None else column(frame, second, path, settings[2])
    if label is None:
        return Table(texts, [], [], seconds)
    if regression:
        return Table(texts, [], [], seconds, numbers(frame, label, path, settings[1]))
    cells, names = raw_column(frame, label, path, settings[1]), names_of(frame, label)
    if names is not None:
        return Table(texts, known_classes(cells, names, label, path), names, seconds)
    labels, names = class_column(cells, label, path, regression=instead, held_out=held_out)
    return Table(texts, labels, names, seconds)


def one_class_only(path: object, label: object, kind: str, value: object) -> str:
    """Return a message for data whose labels are all the same."""
    return f"{path}: column {label!r} has one {kind} only, {value!r}; there is nothing to learn, expected at least two"


@dataclass(frozen=True)
class EncodedBatches:
    """Batches that are tokenised while they are read, as often as wanted, always in the same order.

    Made by `encode_batches`, which says what the fields are.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: Sequence[str]
    labels: Sequence[int] | Sequence[float] | None
    batch_size: int
    max_length: int
    padding: str
    causal: bool
    seconds: Sequence[str] | None = None

    def __len__(self) -> int:
        return -(-len(self.texts) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.texts), self.batch_size):
            yield self._batch(slice(start, start + self.batch_size))

    def _batch(self, rows: slice) -> dict[str, Tensor]:
        import torch

        encoded = self.tokenizer(
            list(self.texts[rows]),
            None if self.seconds is None else list(self.seconds[rows]),
            padding=self.padding,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        batch: dict[str, Tensor] = dict(encoded)
        if self.causal:
            # by the mask and not by the padding token, which often is the end-of-text token
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        elif self.labels is not None:
            kind = torch.float32 if isinstance(self.labels[0], float) else torch.long
            batch["labels"] = torch.tensor(list(self.labels[rows]), dtype=kind)
        return batch


def encode_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[int] | Sequence[float] | None,
    *,
    batch_size: int,
    max_length: int,
    padding: str = "longest",
    causal: bool = False,
    seconds: Sequence[str] | None = None,
) -> EncodedBatches:
    """Batches for a transformers model, tokenised lazily; can be read again and has a length.

    Args:
        tokenizer: a transformers tokenizer; its `padding_side` is honoured, it is not changed.
        texts: n strings.
        labels: n class indices, or n numbers (float) for regression; None or empty for batches without labels. None
            with `causal`.
        batch_size: texts a batch; the last one may have fewer.
        max_length: tokens a text, special tokens included; longer texts are cut.
        padding: "longest" pads to the longest text of the batch, "max_length" to `max_length`.
        causal: labels of language modelling: the input ids, −100 on padding (the model shifts them itself).
        seconds: n second texts, each encoded with its text as a pair; None or empty for single texts.

    Returns:
        Dicts of int64 tensors: input_ids and attention_mask (batch, tokens), token_type_ids if the tokenizer
        makes them, and labels: (batch,), float32 for regression, or (batch, tokens) with `causal`.

    Raises:
        ValueError: for no texts, another number of labels or second texts, a size under 1, an unknown padding, labels
            with `causal`, or a tokenizer without a padding token.
    """
    labels = labels if labels is not None and len(labels) > 0 else None
    seconds = seconds if seconds is not None and len(seconds) > 0 else None
    if len(texts) == 0:
        raise ValueError("texts: expected at least one, got none")
    if labels is not None and causal:
        raise ValueError("causal=True makes its own labels from the texts: give labels=None")
    if labels is not None and len(labels) != len(texts):
        raise ValueError(f"labels: expected one for each of {len(texts)} texts, got {len(labels)}")
    if seconds is not None and len(seconds) != len(texts):
        raise ValueError(f"seconds: expected one for each of {len(texts)} texts, got {len(seconds)}")
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if padding not in _PADDINGS:
        raise ValueError(f"padding: expected one of {', '.join(_PADDINGS)}, got {padding!r}")
    if tokenizer.pad_token is None:
        raise ValueError("the tokenizer has no padding token; set tokenizer.pad_token = tokenizer.eos_token")
    return EncodedBatches(tokenizer, texts, labels, batch_size, max_length, padding, causal, seconds)
