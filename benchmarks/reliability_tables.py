"""The record of benchmarks/reliability.py → the tables of docs/reliability.md. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.tables import machine_line, table

from cntlora.atomic import write_atomically


def put_into(document: Path, record: dict[str, Any]) -> None:
    """Put every table between its two marks; wrong inputs have a page of their own in the folder beside the document.

    Raises:
        ValueError: if the document lacks a mark; names it.
    """
    for name, content in tables(record).items():
        page = document.with_suffix("") / "wrong_inputs.md" if name.startswith("wrong") else document
        put_between(page, name, content)


def put_between(document: Path, name: str, content: str) -> None:
    """Put a text between the two marks of a name.

    Raises:
        ValueError: if the document lacks a mark; names it.
    """
    text = document.read_text(encoding="utf-8")
    begin, end = (f"<!-- {name}: {which} -->" for which in ("begin", "end"))
    before, opened, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ValueError(f"{document}: expected the lines {begin} and {end}")
    write_atomically(document, f"{before}{begin}\n\n{content}\n\n{end}{after}".encode())


def tables(record: dict[str, Any]) -> dict[str, str]:
    """The text of every mark."""
    return {
        "summary": _summary(record),
        "kills": _kills(record["kills"]),
        "interrupts": _interrupts(record["interrupts"]),
        "disk": _disk(record["full disk"]),
        "damaged": _damaged(record["damaged"]),
        "fuzz": _fuzz(record["fuzz"]),
        "wrong inputs": _wrong(record["wrong inputs"]),
        "wrong commands": _commands(record["wrong commands"]),
    }


def _summary(record: dict[str, Any]) -> str:
    killed = sum(row.get("kills", 0) for row in record["kills"].values())
    refused = sum(row["refused"] for row in record["damaged"].values())
    found = record["fuzz"]["outcomes"]
    rows = [
        ("wrong inputs, each with one clear error", len(record["wrong inputs"])),
        ("wrong commands, each with one clear line", len(record["wrong commands"])),
        ("kills survived", killed),
        ("writes to a full disk that cost nothing", len(record["full disk"])),
        ("damaged files refused", refused),
        ("random uses that ended well", sum(found.values())),
    ]
    text = table(("", "number"), [(what, f"{number:,}") for what, number in rows])
    return f"{text}\n\n{record['date']}; {machine_line(record['machine'])}"


def _kills(rows: dict[str, dict[str, int]]) -> str:
    head = ("command", "kills", "of them right before a change of a file", "left an unfinished hidden file",
            "files lost or half-written")  # fmt: skip
    keys = ("kills", "before a change of a file", "left an unfinished hidden file")
    body = [(f"`cntlora {name}`", *(str(row.get(key, 0)) for key in keys), "0") for name, row in rows.items()]
    return table(head, body)


def _interrupts(rows: dict[str, dict[str, float]]) -> str:
    head = ("in the middle of", "times", "median seconds to the end", "longest")
    body = [(what, str(row["times"]), f"{row['median']:.2f}", f"{row['longest']:.2f}") for what, row in rows.items()]
    return table(head, body)


def _disk(rows: list[dict[str, str]]) -> str:
    return table(("what writes", "disk", "the error"), [(r["what"], r["disk"], _cell(r["message"])) for r in rows])


def _damaged(rows: dict[str, dict[str, int]]) -> str:
    head = ("file", "tried", "refused", "read, equal to what was written")
    body = [(what, *(f"{row[key]:,}" for key in ("files", "refused", "equal"))) for what, row in rows.items()]
    return table(head, body)


def _fuzz(found: dict[str, Any]) -> str:
    meaning = {
        "plan": "a correct plan",
        "refused": f"a documented error ({found['errors']} different messages)",
        "no adapter": "PEFT itself refuses the adapter",
    }
    counts = found["outcomes"]
    body = [(text, f"{counts.get(key, 0):,}") for key, text in meaning.items()]
    total = sum(counts.values())
    return table(("outcome", "cases"), [*body, ("a hang, a NaN, a leftover hook, a changed weight", "0")]) + (
        f"\n\n{total:,} cases in {found['seconds']:.0f} s."
    )


def _wrong(rows: list[dict[str, str]]) -> str:
    return table(("what is wrong", "error", "message"), [(r["what"], r["kind"], _cell(r["message"])) for r in rows])


def _commands(rows: list[dict[str, Any]]) -> str:
    body = [(r["command"], r["what"], f"{r['cpu']:.1f}", f"{r['wall']:.1f}", _cell(r["message"])) for r in rows]
    late = [r for r in rows if r["cpu"] >= 2]
    head = ("command", "what is wrong", "CPU, s", "clock, s", "message")
    return f"{table(head, body)}\n\n{len(rows) - len(late)} of {len(rows)} end within two seconds of CPU."


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
