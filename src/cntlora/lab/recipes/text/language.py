"""Causal language modelling and supervised fine-tuning on the user's own texts, prompts with responses, or chats.

    [task]
    name = "language-model"
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"   # hub name or folder
    data = "answers.jsonl"                          # {"prompt": …, "response": …} a line

The columns of the data say what is learned: `messages` (a chat; what the assistant says), `prompt` and `response` or
`completion` (the response), or `text` (all of it; a .txt file has a text a line).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ....data.batches import device_of, to_device
from ....messages import unknown_name, warn_caller
from ...record import Sample
from ..frames import read_frame
from ..loading import load_language_model, load_tokenizer
from ..scoring import modes
from ..task import Defaults, Recipe
from ..values import at_least, check_held_out, one_of
from .classification import need
from .dialogue import (
    Columns,
    MissingColumnsError,
    Row,
    Segments,
    check_rows,
    encode_row,
    said_of_cut,
    segments_of,
    text_rows,
)
from .tables import IGNORED
from .tiny import at_most, tiny_language_model, write_rows

_SAMPLE = "sample:"


@dataclass(frozen=True)
class LanguageSettings:
    """`[task]` of "language-model".

    Attributes:
        name: "language-model".
        model: hub name or folder of a causal language model, or "sample:smollm2".
        data: .jsonl, .txt, .csv, .tsv or .parquet file, a data set of the hub as "owner/name[:configuration][#split]",
            "sample:tales" or "sample:dialogue".
        text, prompt, response, messages: its columns; see the module.
        batch_size: rows a batch.
        max_length: tokens a row; longer rows are cut.
        eval_size: held-out rows.
        split_seed: of the split into training and held-out rows, the same for every run.
        eval_data: held-out rows in a file of their own, as `data`; then eval_size is not used.
        general_data: text of another kind, as `data`, whose perplexity is measured too, to see what training forgets.
        general_size: its rows, the first ones.
        dtype: of the frozen model, "float32" or "bfloat16".
        samples: held-out prompts that are continued when samples are taken.
        sample_tokens: tokens of a continuation.
        sample_prompt: tokens of a plain text that serve as its prompt.
    """

    name: str = "language-model"
    model: str | None = None
    data: str | None = None
    text: str = "text"
    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"
    batch_size: int = 4
    max_length: int = 256
    eval_size: int = 100
    split_seed: int = 0
    eval_data: str | None = None
    general_data: str | None = None
    general_size: int = 100
    dtype: str = "float32"
    samples: int = 3
    sample_tokens: int = 40
    sample_prompt: int = 12

    def __post_init__(self) -> None:
        need(self, model="a hub name or folder", data="a file with your rows, such as a .jsonl")
        at_least("task", self, batch_size=1, max_length=2, eval_size=1, split_seed=0, samples=0, sample_tokens=1)
        at_least("task", self, sample_prompt=1, general_size=1)
        one_of("task.dtype", self.dtype, ("float32", "bfloat16"))


@dataclass(frozen=True)
class LanguageTask(Defaults):
    """Language modelling; perplexity and loss on held-out rows, continuations of held-out prompts as samples."""

    settings: LanguageSettings
    targets: tuple[str, ...] = ()
    peft_type: str | None = "CAUSAL_LM"
    main_metric: str = "perplexity"

    @property
    def metrics(self) -> Mapping[str, str]:
        """Loss and perplexity, and the perplexity of other text where the settings name some."""
        names = ("loss", "perplexity", *(["general_perplexity"] if self.settings.general_data else []))
        return dict.fromkeys(names, "min")

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model."""
        return load_tokenizer(str(self.settings.model))[1]

    @cached_property
    def rows(self) -> tuple[list[Row], list[Row]]:
        """Training rows and held-out rows."""
        s = self.settings
        rows = self._rows_of(str(s.data))
        if s.eval_data is not None:
            return rows, self._rows_of(s.eval_data)
        check_held_out(s.data, len(rows), "rows", s.eval_size, apart="task.eval_data")
        from sklearn.model_selection import train_test_split  # which takes seconds to import

        train, held_out = train_test_split(range(len(rows)), test_size=s.eval_size, random_state=s.split_seed)
        return [rows[i] for i in train], [rows[i] for i in held_out]

    @cached_property
    def general_rows(self) -> list[Row]:
        """Rows of the other text; none where there is none."""
        s = self.settings
        return self._rows_of(s.general_data)[: s.general_size] if s.general_data else []

    def _rows_of(self, source: str) -> list[Row]:
        return load_rows(self.settings, source, self.tokenizer, self._frames.get(source))

    @cached_property
    def _frames(self) -> dict[str, Any]:
        """Source → table of the data that are no samples."""
        s = self.settings
        sources = (source for source in (s.data, s.eval_data, s.general_data) if source)
        return {source: read_frame(source) for source in sources if not source.startswith(_SAMPLE)}

    def check_data(self) -> None:
        """Read the rows, without their tokens."""
        s = self.settings
        for source, frame in self._frames.items():
            with _named_columns():
                check_rows(frame, columns_of(s), source)
        if s.data in self._frames and s.eval_data is None:
            check_held_out(s.data, len(self._frames[s.data]), "rows", s.eval_size, apart="task.eval_data")

    def check_model(self) -> None:
        """Read the tokenizer, and tokenise the rows."""
        _ = self.rows, self.general_rows

    def build_model(self, seed: int) -> nn.Module:
        """The model; nothing in it is new."""
        return load_language_model(str(self.settings.model)).to(getattr(torch, self.settings.dtype))

    def train_batches(self, seed: int) -> Iterable[Mapping[str, Any]]:
        """All training rows once."""
        rows = self.rows[0]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        return self._batches([rows[i] for i in order])

    def eval_batches(self) -> Iterable[Mapping[str, Any]]:
        """The held-out rows, the short ones first."""
        return self._sorted(self.rows[1])

    def evaluate(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Mean loss over all learned tokens (nats) and its exponential, and that of the other text."""
        loss = token_loss(model, batches)
        found = {"loss": loss, "perplexity": _perplexity(loss)}
        if self.general_rows:
            found["general_perplexity"] = _perplexity(token_loss(model, self._sorted(self.general_rows)))
        return found

    def sample(self, model: nn.Module, step: int, folder: Path) -> list[Sample]:
        """The most likely continuations of the first held-out prompts, token by token."""
        from transformers import GenerationConfig

        s, tokenizer, generator = self.settings, self.tokenizer, model
        greedy = GenerationConfig(
            max_new_tokens=s.sample_tokens, do_sample=False,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        found: list[Sample] = []
        with modes(model, training=False), torch.no_grad():
            for row in self.rows[1][: s.samples]:
                prompt = row.prompt or row.input_ids[: s.sample_prompt]
                ids = torch.tensor([prompt], device=device_of(model))
                out = generator.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)  # type: ignore[operator]
                name, text = (
                    tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, out[0, len(prompt) :])
                )
                found.append({"kind": "text", "name": name, "file": None, "text": text})
        return found

    def _sorted(self, rows: list[Row]) -> DataLoader[Any]:
        return self._batches(sorted(rows, key=lambda row: len(row.input_ids)))

    def _batches(self, rows: list[Row]) -> DataLoader[Any]:
        from transformers import DataCollatorForSeq2Seq

        pad = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED)
        features: Any = [
            {"input_ids": row.input_ids, "attention_mask": [1] * len(row.input_ids), "labels": row.labels}
            for row in rows
        ]
        # the generator is never used, but without one each pass draws from the global state
        return DataLoader(features, self.settings.batch_size, collate_fn=pad, generator=torch.Generator())


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def token_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """Mean loss in nats over all tokens that are predicted, each counted once, without dropout and gradients.

    Args:
        model: its output's `loss` is the mean over the batch's labels that are not −100, the first column left out.
        batches: mappings with `labels` (batch, tokens).

    Raises:
        ValueError: if no token is predicted.
    """
    total, count = 0.0, 0
    with modes(model, training=False), torch.no_grad():
        for batch in batches:
            tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(model(**to_device(batch, device_of(model))).loss) * tokens if tokens else 0.0
            count += tokens
    if not count:
        raise ValueError("batches: expected at least one token to predict, got none")
    return total / count


def load_rows(settings: LanguageSettings, source: str, tokenizer: Any, frame: Any = None) -> list[Row]:
    """The rows of a file, a data set of the hub or a sample; `frame` has them where they are read already.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for rows that cannot be used; names file and row.
    """
    segments, chat = _segments(settings, source, tokenizer, frame)
    rows = [
        encode_row(row, tokenizer, settings.max_length, special=not chat, where=f"{source}: row {number}")
        for number, row in enumerate(segments, start=1)
    ]
    if said := said_of_cut(rows, source, "task.max_length="):
        warn_caller(said)
    return rows


def _segments(s: LanguageSettings, source: str, tokenizer: Any, frame: Any) -> tuple[list[Segments], bool]:
    """The rows, and whether they are chats."""
    if source.startswith(_SAMPLE):
        key = next(f"task.{f}" for f in ("general_data", "eval_data", "data") if f == "data" or getattr(s, f) == source)
        return text_rows(_sample(source, key), tokenizer.eos_token or ""), False
    with _named_columns():
        return segments_of(read_frame(source) if frame is None else frame, columns_of(s), tokenizer, source)


def columns_of(settings: LanguageSettings) -> Columns:
    """The columns that the settings name."""
    return Columns(settings.text, settings.prompt, settings.response, settings.messages)


@contextmanager
def _named_columns() -> Iterator[None]:
    """Say of missing columns which settings name them."""
    try:
        yield
    except MissingColumnsError as error:
        raise ValueError(f"{error}. Name yours with task.text, task.prompt, task.response, task.messages") from error


def _sample(name: str, key: str) -> list[str]:
    """Texts that a package ships; `key` is the setting that names them."""
    from ..samples import texts

    known = {"sample:tales": texts.tales, "sample:dialogue": texts.dialogue}
    if name not in known:
        raise ValueError(unknown_name(key, name, known))
    return known[name]().texts


def tiny(settings: LanguageSettings, folder: Path) -> LanguageSettings:
    """The same with a tiny random Llama and 24 synthetic prompts and responses."""
    texts = ["a good day", "a bad day", "such a fine and good thing", "such a bad and dull thing"]
    rows = [{settings.prompt: f"{texts[i % 4]}: ", settings.response: texts[(i + 1) % 4]} for i in range(24)]
    return dataclasses.replace(
        settings,
        model=tiny_language_model(folder / "model", texts),
        data=write_rows(folder / "rows.jsonl", rows),
        eval_data=None,
        general_data=None if settings.general_data is None else write_rows(folder / "general.jsonl", rows[::-1]),
        **at_most(settings, eval_size=8, general_size=8, batch_size=4, max_length=32, samples=1, sample_tokens=4),
    )


RECIPES = {"language-model": Recipe(LanguageSettings, lambda settings: LanguageTask(settings), tiny)}
