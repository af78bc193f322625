"""Attempts to break it: wrong inputs, kills, Ctrl-C, a full disk, damaged files, random uses.

    python benchmarks/reliability.py                          # a quarter of an hour; writes the record and the document
    python benchmarks/reliability.py --kills 8 --cases 200    # minutes
    python benchmarks/reliability.py --render                 # the document from the record that is there

The record is benchmarks/records/reliability.json, the document docs/reliability.md. A part in which something does not
hold is an error, and nothing is written. Linux only: it counts changes of files by audit hooks, forks, and mounts a
small disk where it may.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from benchmarks.machine import RESULTS, describe
from benchmarks.reliability_tables import put_into

from cntlora.atomic import write_atomically

RECORD = RESULTS / "reliability.json"
DOCUMENT = RESULTS.parents[1] / "docs" / "reliability.md"


def wrong_inputs() -> list[dict[str, str]]:
    """Every wrong input with its error."""
    from tests.bad_inputs import is_clear, refusals

    found = [{"what": what, "kind": kind, "message": message} for what, kind, message in refusals()]
    unclear = [row for row in found if not is_clear(row["kind"], row["message"])]
    assert not unclear, unclear
    return found


def wrong_commands(tries: int = 2) -> list[dict[str, Any]]:
    """Every wrong command with its one line, and the least seconds of CPU and of the clock over some tries."""
    from tests.wrong_commands import is_clear, prepare, run, wrong_commands

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for wrong in wrong_commands():
            ended = [run(wrong.arguments, folder) for _ in range(tries)]
            assert all(is_clear(wrong, one) for one in ended), (wrong, ended)
            least = {key: min(getattr(one, key) for one in ended) for key in ("cpu", "wall")}
            rows.append({"command": wrong.command, "what": wrong.what, **least, "message": ended[0].lines[0]})
            say(f"{wrong.command}, {wrong.what}: {least['cpu']:.2f} s")
    return rows


def kills(count: int) -> dict[str, dict[str, int]]:
    """SIGKILL at `count` moments, shared out over the commands; by command, what was left."""
    from tests.kill_cases import moments, prepared, run_command, survives

    generator, rows = random.Random(0), {}
    with tempfile.TemporaryDirectory() as name:
        commands = prepared(Path(name))
        for command in commands:
            old = Path(name) / f"old-{command.name}"
            old.mkdir()
            first = run_command(command.arguments(old, False), old)
            assert first.code == 0, first.told
            row: Counter[str] = Counter()
            for moment in moments(first.changes, first.seconds, count // len(commands), generator):
                ended, left = survives(command, old, moment)
                row["kills" if ended.killed else "ended before"] += 1
                row["before a change of a file"] += bool(ended.killed and moment.change)
                row["left an unfinished hidden file"] += bool(left)
            rows[command.name] = dict(row)
            say(f"{command.name}: {dict(row)}")
    return rows


def interrupts(count: int) -> dict[str, dict[str, float]]:
    """Ctrl-C at `count` moments of `cntlora init`, and in the middle of a long factorisation; seconds until the end."""
    from tests.kill_cases import Moment, prepared, run_command, run_fork

    from cntlora.interrupts import STOPPED, ended_within

    def factoring() -> None:
        with ended_within(0.9):
            torch.linalg.svd(torch.randn(3000, 3000))

    generator, seconds = random.Random(1), {"cntlora init": [], "an SVD of 3000 × 3000": []}
    with tempfile.TemporaryDirectory() as name:
        (init, *_) = prepared(Path(name))
        folder = Path(name) / "out"
        folder.mkdir()
        whole = run_command(init.arguments(folder, False), folder)
        for _ in range(count):
            moment = Moment(seconds=generator.uniform(0.05, whole.seconds), signal=signal.SIGINT)
            ended = run_command(init.arguments(folder, True), folder, moment)
            init.whole(folder)
            if ended.code != 0:  # 0: it was done before
                assert ended.code == 130 and ended.told.strip().endswith(STOPPED), ended
                seconds["cntlora init"].append(ended.after)
        for _ in range(3):
            ended = run_fork(factoring, folder, Moment(seconds=0.5, signal=signal.SIGINT))
            assert ended.code == 130 and ended.told.strip().endswith(STOPPED), ended
            seconds["an SVD of 3000 × 3000"].append(ended.after)
    return {
        what: {"times": len(all_), "median": sorted(all_)[len(all_) // 2], "longest": max(all_)}
        for what, all_ in seconds.items()
        if all_
    }


def full_disk() -> list[dict[str, str]]:
    """Return what each writer says on a full disk."""
    from tests.disk_cases import fill, no_longer_files_than, refused, small_disk, writers

    rows = []
    with tempfile.TemporaryDirectory() as name:
        every = writers(Path(name))
        try:
            with small_disk(Path(name) / "disk", "24m") as disk:
                for write in every.values():
                    write(disk)
                fill(disk)
                for what, write in every.items():
                    rows.append({"what": what, "disk": "full", "message": refused(write, disk).replace(f"{disk}/", "")})
        except PermissionError as error:
            say(f"full disk: left out, {error}")
        limited = Path(name) / "limited"
        limited.mkdir()
        for what, write in every.items():
            with no_longer_files_than(3000):
                message = refused(write, limited).replace(f"{limited}/", "")
            rows.append({"what": what, "disk": "limit on files", "message": message})
    return rows


def damaged(count: int) -> dict[str, dict[str, int]]:
    """Plans and records that are cut or of which a bit is flipped, and how many of them were refused."""
    from tests.damage_cases import cuts, flips, newer, plan_bytes, read_plan, record_bytes, record_reader, refusal

    with tempfile.TemporaryDirectory() as name:
        plan, record = plan_bytes(), record_bytes(Path(name))
        read = record_reader(Path(name))
        files: dict[str, tuple[Callable[[bytes], object], list[bytes]]] = {
            "plan, cut": (read_plan, list(cuts(plan, count))),
            "plan, a bit flipped": (read_plan, list(flips(plan, count))),
            "plan of a newer version": (read_plan, [newer(plan)]),
            "record, cut": (read, [record[:n] for n in range(len(record) - 1)]),
            "record, a bit flipped": (read, list(flips(record, count))),
            "record of a newer version": (read, [record.replace(b'"schema": 1', b'"schema": 2')]),
        }
        rows = {}
        for what, (reader, every) in files.items():
            told = [refusal(reader, data) for data in every]
            passed = [data for data, reason in zip(every, told, strict=True) if reason is None]
            # the key of a record's digest itself: all that was written is there
            same = [d for d in passed if what.startswith("record") and _same_but_one_key(d, record)]
            assert len(same) == len(passed), f"{what}: {len(passed) - len(same)} were read"
            rows[what] = {"files": len(every), "refused": len(every) - len(passed), "equal": len(same)}
    return rows


def _same_but_one_key(data: bytes, record: bytes) -> bool:
    whole, found = json.loads(record), json.loads(data)
    lost = whole.keys() - found.keys()
    return lost == {"digest"} and all(found[key] == value for key, value in whole.items() if key not in lost)


def fuzz(count: int) -> dict[str, Any]:
    """Random uses by outcome, and the seconds."""
    from tests.fuzz_judge import outcomes

    began = time.monotonic()
    found: Counter[str] = Counter()
    errors: set[str] = set()
    for outcome, times in outcomes(count, first=1).items():
        kind, _, message = outcome.partition(": ")
        found[kind] += times
        errors |= {message} - {""}
    return {"outcomes": dict(found), "errors": len(errors), "seconds": time.monotonic() - began}


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="moments of SIGKILL, over the four commands")
    parser.add_argument("--interrupts", type=int, default=20, help="moments of Ctrl-C")
    parser.add_argument("--damaged", type=int, default=2000, help="cut or flipped files of each kind")
    parser.add_argument("--cases", type=int, default=2000, help="random uses")
    parser.add_argument("--parts", help="only these, by commas; the others stay as they are in the record")
    parser.add_argument("--render", action="store_true", help="only write the document again, from the record")
    options = parser.parse_args()
    if not options.render:
        os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        parts: dict[str, Callable[[], Any]] = {
            "wrong inputs": wrong_inputs,
            "wrong commands": wrong_commands,
            "damaged": lambda: damaged(options.damaged),
            "full disk": full_disk,
            "kills": lambda: kills(options.kills),
            "interrupts": lambda: interrupts(options.interrupts),
            "fuzz": lambda: fuzz(options.cases),
        }
        chosen = list(parts) if options.parts is None else options.parts.split(",")
        if unknown := [name for name in chosen if name not in parts]:
            raise SystemExit(f"--parts: {unknown[0]!r} is not known; expected some of {', '.join(parts)}")
        if options.parts is None:
            record = {"machine": describe(1), "date": time.strftime("%Y-%m-%d")}
        else:  # most parts stay those of the machine and the day of the whole run
            record = json.loads(RECORD.read_text(encoding="utf-8"))
        for name in chosen:
            began = time.monotonic()
            record[name] = parts[name]()
            say(f"{name}: {time.monotonic() - began:.0f} s")
            if options.parts is not None or name == chosen[-1]:
                write_atomically(RECORD, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    put_into(DOCUMENT, json.loads(RECORD.read_text(encoding="utf-8")))
    say(f"{DOCUMENT} and {RECORD} written")


if __name__ == "__main__":
    main()
