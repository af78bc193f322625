"""Rows of language modelling: plain texts, prompts with responses, or chats, and which of their tokens are learned.

The one reader of `cntlora init` and of the recipe "language-model". It takes the columns that TRL takes, too: prompt
and completion, each a text or a list of messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..frames import column, raw_column
from .tables import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

Segments = tuple[tuple[str, bool], ...]
"""The parts of a row in their order, each with whether its tokens are learned."""


@dataclass(frozen=True)
class Row:
    """A row as the model reads it.

    Attributes:
        prompt: token ids before the first learned one; those of `sample`'s prompts.
        input_ids: token ids, at most `max_length`.
        labels: the same, `IGNORED` where nothing is learned.
        length: tokens of the whole row, before it is cut.
    """

    prompt: list[int]
    input_ids: list[int]
    labels: list[int]
    length: int = 0


class MissingColumnsError(ValueError):
    """A table has none of the columns that rows are made from."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns, of which a table has one kind: chats, prompts with responses, or texts."""

    text: str = "text"
    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"

    def kind(self, frame: pd.DataFrame, where: object) -> str:
        """ "messages", "response" or "text": what a table has, the first of these where it has several.

        Raises:
            ValueError: if it has none; names its columns.
        """
        if self.messages in frame.columns:
            return "messages"
        if self.prompt in frame.columns or self.response in frame.columns:
            return "response"
        if self.text in frame.columns:
            return "text"
        raise MissingColumnsError(
            f"{where}: expected a column {self.messages!r}, columns {self.prompt!r} and {self.response!r}, or a column "
            f"{self.text!r}; its columns are: {', '.join(map(str, frame.columns))}"
        )

    def response_in(self, frame: pd.DataFrame) -> str:
        """The column of the responses: TRL's name for it where the table has no "response"."""
        other = self.response == "response" and "response" not in frame.columns and "completion" in frame.columns
        return "completion" if other else self.response


def segments_of(frame: pd.DataFrame, columns: Columns, tokenizer: Any, where: object) -> tuple[list[Segments], bool]:
    """Read the rows of a table as segments, and whether they are chats, which the template begins and ends.

    Raises:
        ValueError: for a missing column, an empty field, or chats without a template; names file and row.
    """
    chats, name = _chats_of(frame, columns, where)
    if name:
        return chat_rows(chats, name, tokenizer, where), True
    return _plain_rows(frame, columns, tokenizer.eos_token or "", where), False


def check_rows(frame: pd.DataFrame, columns: Columns, where: object) -> None:
    """Check the rows of a table as far as that needs no tokenizer.

    Raises:
        ValueError: for a missing column, an empty field, or a chat without an answer; names file and row.
    """
    chats, name = _chats_of(frame, columns, where)
    for number, chat in enumerate(chats, start=1):
        _messages(chat, name, f"{where}: row {number}")
    if not name:
        _plain_rows(frame, columns, "", where)


def _chats_of(frame: pd.DataFrame, columns: Columns, where: object) -> tuple[list[Any], str]:
    """The chats of a table and the names of their columns; none and "" where it has texts."""
    kind = columns.kind(frame, where)
    if kind == "messages":
        return raw_column(frame, columns.messages, where), columns.messages
    if kind == "text":
        return [], ""
    response = columns.response_in(frame)
    prompts, responses = (raw_column(frame, name, where) for name in (columns.prompt, response))
    if not any(_is_list(value) for value in chain(prompts, responses)):
        return [], ""
    pairs = enumerate(zip(prompts, responses, strict=True), start=1)
    return [_joined(one, two, f"{where}: row {n}") for n, (one, two) in pairs], f"{columns.prompt}, {response}"


def _plain_rows(frame: pd.DataFrame, columns: Columns, end: str, where: object) -> list[Segments]:
    """Rows of texts, or of prompts with responses."""
    if columns.kind(frame, where) == "text":
        return text_rows(column(frame, columns.text, where), end)
    return response_rows(frame, columns.prompt, columns.response_in(frame), end, where)


def _is_list(value: Any) -> bool:
    return not isinstance(value, (str, bytes, Mapping)) and hasattr(value, "__iter__")


def _joined(prompt: Any, response: Any, where: str) -> list[Any]:
    """Join one chat of a prompt and a response that are messages."""
    if not (_is_list(prompt) and _is_list(response)):
        kinds = f"{type(prompt).__name__} and {type(response).__name__}"
        raise ValueError(f"{where}: expected prompt and response as two texts or as two lists of messages, got {kinds}")
    return [*prompt, *response]


def text_rows(texts: Sequence[str], end: str) -> list[Segments]:
    """Make rows of texts, all of which is learned, and the end."""
    return [((text + end, True),) for text in texts]


def response_rows(frame: pd.DataFrame, prompt: str, response: str, end: str, where: object) -> list[Segments]:
    """The response is learned, and its end; it follows the prompt without anything between them.

    Raises:
        ValueError: for a missing column or an empty field; names file and row.
    """
    pairs = zip(column(frame, prompt, where), column(frame, response, where), strict=True)
    return [((first, False), (second + end, True)) for first, second in pairs]


def chat_rows(chats: Sequence[Any], name: str, tokenizer: Any, where: object) -> list[Segments]:
    """Rows of chats, in which what the assistant says is learned, as the template writes it; `name` is the column.

    Raises:
        ValueError: for a tokenizer without a template, or a row that is no list of {"role", "content"} with an
            answer of the assistant; names file and row.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{where}: column {name!r} needs a model whose tokenizer has a chat template; use prompt and "
                         "response columns, or an instruction-tuned model")  # fmt: skip
    rows = []
    for number, value in enumerate(chats, start=1):
        messages = _messages(value, name, f"{where}: row {number}")
        rows.append(_chat(messages, tokenizer, f"{where}: row {number}"))
    return rows


def _messages(value: Any, name: str, where: str) -> list[dict[str, str]]:
    """A chat, checked."""
    expected = f'expected a list of {{"role": …, "content": text}} in column {name!r}'
    if not _is_list(value):
        raise ValueError(f"{where}: {expected}, got {type(value).__name__}")
    found = []
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where}: {expected}, got {str(message)[:60]!r} in it")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise ValueError(f"{where}: a message of {message['role']!r} is empty; fill or remove it")
        found.append({"role": str(message["role"]), "content": message["content"]})
    if not any(message["role"] == "assistant" for message in found):
        raise ValueError(f"{where}: no message has the role 'assistant', so there is nothing to learn")
    return found


def _chat(messages: list[dict[str, str]], tokenizer: Any, where: str) -> Segments:
    """The chat as the template writes it, cut before and behind each answer of the assistant."""
    whole: str = tokenizer.apply_chat_template(messages, tokenize=False)
    segments: list[tuple[str, bool]] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before: str = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        after: str = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (before.startswith(done) and after.startswith(before) and whole.startswith(after)):
            raise ValueError(
                f"{where}: the chat template rewrites earlier messages, so the answers cannot be found in its text; "
                "use prompt and response columns"
            )
        segments += [(before.removeprefix(done), False), (after.removeprefix(before), True)]
        done = after
    return tuple(segments)


def encode_row(
    segments: Segments, tokenizer: Any, max_length: int, *, special: bool, where: str, limit: str = "task.max_length="
) -> Row:
    """Token ids and labels of a row; each segment is tokenised by itself, as a prompt is when text is generated.

    Args:
        segments: see `Segments`.
        tokenizer: of the model.
        max_length: tokens; what is beyond is cut.
        special: the tokenizer's own first tokens (such as <s>) are put before the row; a chat has them already.
        where: file and row, for messages.
        limit: how the user sets `max_length`, for messages.

    Raises:
        ValueError: if nothing that is learned is left within `max_length`.
    """
    opening = tokenizer("")["input_ids"][:1] if special else []
    ids = [token for token in opening if token == tokenizer.bos_token_id]
    labels = [IGNORED] * len(ids)
    first = None
    for text, learned in segments:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if learned and first is None:
            first = len(ids)
        ids += tokens
        labels += tokens if learned else [IGNORED] * len(tokens)
    if all(label == IGNORED for label in labels[1:max_length]):  # the first token is never predicted
        raise ValueError(
            f"{where}: nothing to learn is left of its {len(ids)} tokens within {limit}{max_length}; raise "
            "it, or shorten the prompt"
        )
    return Row(ids[: first or 0], ids[:max_length], labels[:max_length], len(ids))


def said_of_cut(rows: Sequence[Row], where: object, limit: str) -> str | None:
    """Describe the loss where rows are cut and a tenth of all tokens or more is lost; None where it is less.

    Args:
        rows: as `encode_row` gives them.
        where: their file.
        limit: how the user sets `max_length`.
    """
    cut = [row for row in rows if row.length > len(row.input_ids)]
    tokens, lost = sum(row.length for row in rows), sum(row.length - len(row.input_ids) for row in cut)
    if 10 * lost < tokens or not cut:
        return None
    return (
        f"{where}: {len(cut)} of {len(rows)} rows are longer than {limit}{max(len(row.input_ids) for row in cut)}, and "
        f"{lost / tokens:.0%} of all tokens are cut off; raise it, or split long texts into rows"
    )


@dataclass(frozen=True)
class RowBatches:
    """Batches of rows for a causal language model, padded on the right, with labels; can be read again."""

    rows: Sequence[Row]
    batch_size: int
    pad_id: int

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        import torch

        for start in range(0, len(self.rows), self.batch_size):
            rows = self.rows[start : start + self.batch_size]
            width = max(len(row.input_ids) for row in rows)
            gaps = [width - len(row.input_ids) for row in rows]
            filled = {
                "input_ids": [row.input_ids + [self.pad_id] * gap for row, gap in zip(rows, gaps, strict=True)],
                "attention_mask": [[1] * len(row.input_ids) + [0] * gap for row, gap in zip(rows, gaps, strict=True)],
                "labels": [row.labels + [IGNORED] * gap for row, gap in zip(rows, gaps, strict=True)],
            }
            yield {key: torch.tensor(values) for key, values in filled.items()}
