"""Outcomes of PEFT's tests: judged by the list of expected failures, and put into tables. Pure."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PLAIN = "plain"
"""The setting in which PEFT's own initialisation stays: what fails there is not ours."""
VERDICTS = ("passed", "skipped", "fails in plain PEFT", "expected failure", "unexpected failure")


@dataclass(frozen=True)
class Failure:
    """A failure that is known, with its reason.

    Attributes:
        test: a regular expression that is searched in the test's id.
        message: one that is searched in the message of the failure.
        settings: patterns such as "self+*"; a setting is METHOD+BASE.
    """

    test: str
    reason: str
    message: str = ""
    settings: tuple[str, ...] = ("*",)

    def covers(self, setting: str, test: str, message: str) -> bool:
        return (
            any(fnmatch(setting, pattern) for pattern in self.settings)
            and re.search(self.test, test) is not None
            and re.search(self.message, message) is not None
        )


@dataclass(frozen=True)
class Refusal:
    """A message by which cntlora may refuse to initialise an adapter that PEFT's tests make."""

    message: str
    reason: str


@dataclass
class Judged:
    """One suite in one setting.

    Attributes:
        counts: a number for each of `VERDICTS`.
        started: tests in which at least one adapter was initialised by cntlora.
        unexpected: (test, message) of the failures that no entry covers.
        reasons: how many failures each reason of the list explains.
        refused: how many adapters were left as PEFT made them, by the reason of the list.
    """

    counts: Counter[str] = field(default_factory=Counter)
    started: int = 0
    unexpected: list[tuple[str, str]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


def read_expected(path: Path) -> tuple[list[Failure], list[Refusal]]:
    """The list of expected failures and refusals.

    Raises:
        ValueError: if an entry has no reason, or a key that is not known.
    """
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    failures = []
    for entry in values.get("failure", []):
        _check(path, entry, needed={"test", "reason"}, known={"test", "reason", "message", "settings"})
        failures.append(Failure(**{**entry, "settings": tuple(entry.get("settings", ("*",)))}))
    refusals = []
    for entry in values.get("refusal", []):
        _check(path, entry, needed={"message", "reason"}, known={"message", "reason"})
        refusals.append(Refusal(**entry))
    return failures, refusals


def _check(path: Path, entry: Mapping[str, Any], needed: set[str], known: set[str]) -> None:
    for key in sorted(needed):
        if not str(entry.get(key, "")).strip():
            raise ValueError(f"{path.name}: expected {key!r} in every entry, got none in {dict(entry)}")
    if entry.keys() - known:
        raise ValueError(f"{path.name}: {sorted(entry.keys() - known)} are not known; expected {sorted(known)}")


def read_outcomes(path: Path) -> list[dict[str, Any]]:
    """The lines that the plugin wrote, one for each test; of a test that was reported twice, the worse."""
    found: dict[str, dict[str, Any]] = {}
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if found.get(line["test"], {}).get("outcome") != "failed":
                found[line["test"]] = line
    return list(found.values())


def by_suite(lines: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The outcomes by the name of their file without `test_`; files that could not be imported stand under ""."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        suite = Path(line["test"].partition("::")[0]).stem.removeprefix("test_")
        found.setdefault("" if line["outcome"] == "not collected" else suite, []).append(line)
    return found


def judge(
    setting: str,
    lines: Iterable[Mapping[str, Any]],
    plain: Iterable[Mapping[str, Any]],
    failures: Sequence[Failure],
    refusals: Sequence[Refusal],
) -> Judged:
    """Sort the outcomes of one suite in one setting.

    Args:
        lines, plain: of this setting, and of the same tests with PEFT's own initialisation.
    """
    fails_plainly = {line["test"] for line in plain if line["outcome"] == "failed"}
    found = Judged()
    for line in lines:
        found.seconds += line["seconds"]
        found.started += any(not start.startswith("refused") for start in line["starts"])
        for start in line["starts"]:
            kind, _, text = start.partition(": ")
            if kind != "ours":
                reason = next((r.reason for r in refusals if re.search(r.message, text)), text)
                found.refused[reason] += 1
        if line["outcome"] != "failed":
            found.counts["passed" if line["outcome"] == "expected by PEFT" else line["outcome"]] += 1
            continue
        entry = next((f for f in failures if f.covers(setting, line["test"], line["message"])), None)
        if line["test"] in fails_plainly:
            found.counts["fails in plain PEFT"] += 1
        elif entry is not None:
            found.counts["expected failure"] += 1
            found.reasons[entry.reason] += 1
        else:
            found.counts["unexpected failure"] += 1
            found.unexpected.append((line["test"], line["message"]))
    return found


def total(parts: Iterable[Judged]) -> Judged:
    """The sum over suites."""
    found = Judged()
    for part in parts:
        found.counts.update(part.counts)
        found.started += part.started
        found.unexpected += part.unexpected
        found.reasons.update(part.reasons)
        found.refused.update(part.refused)
        found.seconds += part.seconds
    return found


def rows(results: Mapping[str, Mapping[str, Judged]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table suite × setting; a cell that counts nothing is empty."""
    head = ["suite", "setting", "initialised", *VERDICTS, "seconds"]
    found = []
    for setting, suites in results.items():
        for suite, part in [*suites.items(), ("all", total(suites.values()))]:
            if suite == "all" and len(suites) < 2:
                continue
            counts = [f"{part.counts[verdict]:,}" if part.counts[verdict] else "" for verdict in VERDICTS]
            found.append([suite, setting, f"{part.started:,}" if part.started else "", *counts, f"{part.seconds:.0f}"])
    return head, found
