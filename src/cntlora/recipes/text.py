"""Text data: tables of texts and labels read from files, and batches tokenised while they are read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that transformers' losses leave out
_PADDINGS = ("longest", "max_length")


@dataclass(frozen=True)
class Table:
    """Texts and, if there are any, their classes.

    Attributes:
        texts: one string a row.
        labels: one class index a row; empty if there are no labels.
        names: the name of each class; empty if there are no labels.

    Raises:
        ValueError: if the numbers of texts and labels differ, or a label has no name.
    """

    texts: list[str]
    labels: list[int]
    names: list[str]

    def __post_init__(self) -> None:
        if self.labels and len(self.labels) != len(self.texts):
            raise ValueError(f"labels: expected one for each of {len(self.texts)} texts, got {len(self.labels)}")
        strange = sorted({label for label in self.labels if not 0 <= label < len(self.names)})
        if strange:
            raise ValueError(f"labels: expected indices of the {len(self.names)} names, got {strange[:5]}")

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Table:
        """The given rows, in the given order."""
        labels = [self.labels[i] for i in rows] if self.labels else []
        return Table([self.texts[i] for i in rows], labels, self.names)

    def split(self, eval_size: int | float, seed: int) -> tuple[Table, Table]:
        """Training rows and held-out rows, in random order, with the same shares of the classes.

        Args:
            eval_size: held-out rows as a number, or as a share in (0, 1).
            seed: the same seed gives the same split; no global generator is used.

        Raises:
            ValueError: if the rows do not suffice, or a class has too few of them to be in both parts.
        """
        try:
            train, held_out = train_test_split(
                range(len(self)), test_size=eval_size, random_state=seed, stratify=self.labels or None
            )
        except ValueError as error:
            raise ValueError(f"eval_size={eval_size} of {len(self)} texts cannot be held out: {error}") from error
        return self.take(train), self.take(held_out)


def shuffled(table: Table, seed: int) -> Table:
    """The rows in a random order that depends on the seed alone."""
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    return table.take(order.tolist())


def read_table(path: str | PathLike[str], text: str = "text", label: str | None = None) -> Table:
    """A table from a UTF-8 file: .csv or .tsv with a header, .jsonl (an object a line), .txt (a text a line).

    Every value is read as text, "NA" and "001" too. Classes are sorted by name, whole numbers by value. A
    field of a .csv or .tsv that begins with a double quote ends at the next one; quotes inside are doubled.

    Args:
        path: the file; its suffix says the format.
        text: column (key) of the texts; not used for .txt, whose blank lines are skipped.
        label: column (key) of the labels; None for a table without labels.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for another suffix, an empty or broken file, a missing column or an empty field;
            the message names the file, and the columns that exist or the row.
    """
    path = Path(path)
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".txt": _read_txt}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(readers)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.suffix.lower() == ".txt":
        if label is not None:
            raise ValueError(f"{path}: a .txt file has no label={label!r}; use .csv, .tsv or .jsonl")
        text = "text"
    try:
        frame = readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    if frame.empty:
        raise ValueError(f"{path}: the file has no rows")
    texts = _column(frame, text, path)
    return Table(texts, [], []) if label is None else Table(texts, *_classes(_column(frame, label, path)))


def _read_csv(path: Path) -> pd.DataFrame:
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with warnings.catch_warnings():
            # more fields than columns: an unquoted separator in a text, which would lose its end
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(
                path, sep=separator, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig"
            )
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        message = f"{path}: rows do not fit the header; quote texts that contain the separator ({error})"
        raise ValueError(message.replace("\n", " ")) from error


def _read_jsonl(path: Path) -> pd.DataFrame:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number}: expected an object {{…}}, got {type(row).__name__}")
        rows.append(row)
    return pd.DataFrame(rows, dtype=object)  # object: no column of whole numbers becomes one of floats


def _read_txt(path: Path) -> pd.DataFrame:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return pd.DataFrame({"text": [line.strip() for line in lines if line.strip()]}, dtype=object)


def _column(frame: pd.DataFrame, name: str, path: Path) -> list[str]:
    if name not in frame.columns:
        existing = ", ".join(map(str, frame.columns))
        raise ValueError(f"{path}: there is no column {name!r}; its columns are: {existing}")
    values = frame[name].tolist()
    for number, value in enumerate(values, start=1):
        if isinstance(value, (dict, list)):
            kind = type(value).__name__
            raise ValueError(f"{path}: row {number}: expected text in column {name!r}, got {kind}")
        if pd.isna(value) or not str(value).strip():
            raise ValueError(f"{path}: row {number} has nothing in column {name!r}; fill or remove it")
    return [str(value) for value in values]


def _classes(values: list[str]) -> tuple[list[int], list[str]]:
    """Class indices and class names."""
    names = sorted(set(values))
    if all(name.removeprefix("-").isdecimal() for name in names):
        names.sort(key=int)
    index = {name: i for i, name in enumerate(names)}
    return [index[value] for value in values], names


@dataclass(frozen=True)
class EncodedBatches:
    """Batches that are tokenised while they are read, as often as wanted, always in the same order.

    Made by `encode_batches`, which says what the fields are.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: Sequence[str]
    labels: Sequence[int] | None
    batch_size: int
    max_length: int
    padding: str
    causal: bool

    def __len__(self) -> int:
        return -(-len(self.texts) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.texts), self.batch_size):
            yield self._batch(slice(start, start + self.batch_size))

    def _batch(self, rows: slice) -> dict[str, Tensor]:
        encoded = self.tokenizer(
            list(self.texts[rows]),
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
            batch["labels"] = torch.tensor(list(self.labels[rows]), dtype=torch.long)
        return batch


def encode_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[int] | None,
    *,
    batch_size: int,
    max_length: int,
    padding: str = "longest",
    causal: bool = False,
) -> EncodedBatches:
    """Batches for a transformers model, tokenised lazily; can be read again and has a length.

    Args:
        tokenizer: a transformers tokenizer; its `padding_side` is honoured, it is not changed.
        texts: n strings.
        labels: n class indices; None or empty for batches without labels. None with `causal`.
        batch_size: texts a batch; the last one may have fewer.
        max_length: tokens a text, special tokens included; longer texts are cut.
        padding: "longest" pads to the longest text of the batch, "max_length" to `max_length`.
        causal: labels of language modelling: the input ids, −100 on padding (the model shifts them itself).

    Returns:
        Dicts of int64 tensors: input_ids and attention_mask (batch, tokens), token_type_ids if the tokenizer
        makes them, and labels: (batch,), or (batch, tokens) with `causal`.

    Raises:
        ValueError: for no texts, another number of labels, a size under 1, an unknown padding, labels with
            `causal`, or a tokenizer without a padding token.
    """
    labels = labels if labels is not None and len(labels) > 0 else None
    if len(texts) == 0:
        raise ValueError("texts: expected at least one, got none")
    if labels is not None and causal:
        raise ValueError("causal=True makes its own labels from the texts: give labels=None")
    if labels is not None and len(labels) != len(texts):
        raise ValueError(f"labels: expected one for each of {len(texts)} texts, got {len(labels)}")
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if padding not in _PADDINGS:
        raise ValueError(f"padding: expected one of {', '.join(_PADDINGS)}, got {padding!r}")
    if tokenizer.pad_token is None:
        raise ValueError("the tokenizer has no padding token; set tokenizer.pad_token = tokenizer.eos_token")
    return EncodedBatches(tokenizer, texts, labels, batch_size, max_length, padding, causal)
