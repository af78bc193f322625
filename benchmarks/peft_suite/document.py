"""The record of a run of PEFT's tests → the tables of docs/reliability/peft_tests.md. Pure."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.peft_suite.outcomes import VERDICTS
from benchmarks.reliability_tables import put_between
from benchmarks.tables import machine_line, table

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability" / "peft_tests.md"
RECORD = Path(__file__).parents[1] / "records" / "peft_suite.json"
MARK = "peft's own tests"


def put_table(document: Path, record: dict[str, Any]) -> None:
    """Put the tables of a record between their two marks."""
    put_between(document, MARK, content(record))


def content(record: dict[str, Any]) -> str:
    """A row for each setting, then the reasons of what fails and of what is left as PEFT makes it."""
    head = ["setting", "tests", "with an adapter of ours", *VERDICTS, "seconds"]
    lines, reasons, refused = [], Counter[str](), Counter[str]()
    for setting, suites in record["settings"].items():
        counts = Counter[str]()
        for part in suites.values():
            counts.update(part["counts"])
            reasons.update(part["reasons"])
            refused.update(part["refused"])
        started = sum(part["started"] for part in suites.values())
        numbers = [sum(counts.values()), started, *(counts[verdict] for verdict in VERDICTS)]
        seconds = sum(part["seconds"] for part in suites.values())
        lines.append([setting, *(f"{number:,}" for number in numbers), f"{seconds:,.0f}"])
    sample = "" if record["every"] == 1 else f" Every {record['every']}th test only."
    parts = [
        table(head, lines),
        f"{record['date']}; {record['minutes']} minutes; {machine_line(record['machine'])}{sample}",
        "Failures that are expected, over all settings:",
        table(["number", "reason"], [[f"{n:,}", reason] for reason, n in reasons.most_common()]),
        "Adapters that stay as PEFT makes them, over all settings:",
        table(["number", "reason"], [[f"{n:,}", reason] for reason, n in refused.most_common()]),
    ]
    return "\n\n".join(parts)
