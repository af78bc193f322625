"""Rows of language modelling: plain texts, prompts with responses, or chats, and which of their tokens are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..frames import column, raw_column
from .tables import IGNORED

Segments = tuple[tuple[str, bool], ...]
"""The parts of a row in their order, each with whether its tokens are learned."""


@dataclass(frozen=True)
class Row:
    """A row as the model reads it.

    Attributes:
        prompt: token ids before the first learned one; those of `sample`'s prompts.
        input_ids: token ids, at most `max_length`.
        labels: the same, `IGNORED` where nothing is learned.
    """

    prompt: list[int]
    input_ids: list[int]
    labels: list[int]


def text_rows(texts: Sequence[str], end: str) -> list[Segments]:
    """All of a text is learned, and its end."""
    return [((text + end, True),) for text in texts]


def response_rows(frame: pd.DataFrame, prompt: str, response: str, end: str, where: object) -> list[Segments]:
    """The response is learned, and its end; it follows the prompt without anything between them.

    Raises:
        ValueError: for a missing column or an empty field; names file and row.
    """
    pairs = zip(column(frame, prompt, where), column(frame, response, where), strict=True)
    return [((first, False), (second + end, True)) for first, second in pairs]


def chat_rows(frame: pd.DataFrame, name: str, tokenizer: Any, where: object) -> list[Segments]:
    """Rows of chats, in which what the assistant says is learned, as the tokenizer's chat template writes it.

    Raises:
        ValueError: for a tokenizer without a template, or a row that is no list of {"role", "content"} with an
            answer of the assistant; names file and row.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{where}: column {name!r} needs a model whose tokenizer has a chat template; use prompt and "
                         "response columns, or an instruction-tuned model")  # fmt: skip
    rows = []
    for number, value in enumerate(raw_column(frame, name, where), start=1):
        messages = _messages(value, name, f"{where}: row {number}")
        rows.append(_chat(messages, tokenizer, f"{where}: row {number}"))
    return rows


def _messages(value: Any, name: str, where: str) -> list[dict[str, str]]:
    """A chat, checked."""
    expected = f'expected a list of {{"role": …, "content": text}} in column {name!r}'
    if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
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


def encode_row(segments: Segments, tokenizer: Any, max_length: int, *, special: bool, where: str) -> Row:
    """Token ids and labels of a row; each segment is tokenised by itself, as a prompt is when text is generated.

    Args:
        segments: see `Segments`.
        tokenizer: of the model.
        max_length: tokens; what is beyond is cut.
        special: the tokenizer's own first tokens (such as <s>) are put before the row; a chat has them already.
        where: file and row, for messages.

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
            f"{where}: nothing to learn is left of its {len(ids)} tokens within task.max_length={max_length}; raise "
            "it, or shorten the prompt"
        )
    return Row(ids[: first or 0], ids[:max_length], labels[:max_length])
