"""Plans and records that were cut short, edited, or are of a newer version."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from tests.tiny import adapted, text_batches

from cntlora import InitConfig, InitPlan, compute_plan
from cntlora.lab.record import SCHEMA, read_record, write_record
from cntlora.plan import FORMAT

Reader = Callable[[bytes], object]


def plan_bytes() -> bytes:
    """A plan as its file."""
    return compute_plan(adapted(), text_batches(), config=InitConfig(method="self")).to_bytes()


def record_bytes(folder: Path) -> bytes:
    """A record as its file."""
    record = {
        "schema": SCHEMA,
        "experiment": "trial",
        "method": "self",
        "label": "CNTLoRA-S, ü",
        "status": "finished",
        "losses": [1.0986, 0.73, 1e-3],
        "sites": {"layer.0.query": {"rank": 4, "cosine": 0.25}},
    }
    write_record(folder / "record.json", record)
    return (folder / "record.json").read_bytes()


def record_reader(folder: Path) -> Reader:
    """Read bytes as a record, by way of a file."""

    def read(data: bytes) -> object:
        (folder / "read.json").write_bytes(data)
        return read_record(folder / "read.json")

    return read


def head_of(data: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The head of a plan, and all the metadata of its file."""
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return json.loads(metadata["cntlora_plan"]), metadata


def with_head(
    data: bytes, edit: Callable[[dict[str, Any]], object], digest: Callable[[str], str] | None = None
) -> bytes:
    """A plan with an edited head, and with its digest made anew where a function for it is given."""
    head, metadata = head_of(data)
    edit(head)
    text = json.dumps(head)
    new = {**metadata, "cntlora_plan": text}
    return save(load(data), {**new, "cntlora_digest": digest(text)} if digest else new)


def newer(data: bytes) -> bytes:
    """The plan as a newer version of cntlora might write it."""
    return with_head(data, lambda head: head.update(format=FORMAT + 1))


def cuts(data: bytes, count: int) -> Iterator[bytes]:
    """The first bytes of a file: `count` lengths from none to all but one."""
    for i in range(count):
        yield data[: i * len(data) // count]
    yield data[:-1]


def flips(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """The file with one bit flipped, at `count` places, half of them in its first tenth."""
    generator = random.Random(seed)
    for i in range(count):
        at = generator.randrange(len(data) if i % 2 else max(1, len(data) // 10))
        yield data[:at] + bytes([data[at] ^ (1 << generator.randrange(8))]) + data[at + 1 :]


def refusal(read: Reader, data: bytes) -> str | None:
    """The reason why it is not read; None where it is.

    Raises:
        AssertionError: if the reason is not one line of text; any other error than ValueError goes through.
    """
    try:
        read(data)
    except ValueError as error:
        message = str(error)
        assert type(error) is ValueError and "\n" not in message and len(message) > 20, repr(error)
        return message
    return None


def read_plan(data: bytes) -> InitPlan:
    return InitPlan.from_bytes(data, "plan.safetensors")
