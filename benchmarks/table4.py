"""Table 4 of the paper: seconds of every initialisation as a share of 1,000 training steps, on SD 1.5's attention.

    python benchmarks/table4.py            # writes benchmarks/records/table4.json as it goes, and resumes it
    python benchmarks/table4.py --table    # only prints that record

UNet and text encoder in their true shapes with random weights, LoRA of rank 128 on all attention, 5 images of 512 × 512
(latents of 64 × 64), batch 1, float32. A training step (forward, backward, AdamW on the factors) is measured beside
each row; 1,000 of them are taken to cost 1,000 times their median. Seconds are those of the CPU, of all threads.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from benchmarks.machine import RESULTS, describe
from benchmarks.measure import Clock, reason, timed
from benchmarks.rows import BACKWARD, FLOOR, Bench
from benchmarks.tables import machine_line, table
from benchmarks.workloads import WORKLOADS

from cntlora.atomic import write_atomically

ROWS = ("pissa", "olora", "eva", "corda", "cross", "cross (rtol 1e-3)", "self", "shift", "shift (rtol 1e-3)",
        "lora_ga", "descent")  # fmt: skip
PAPER = {"pissa": 0.64, "olora": 0.59, "eva": 1.71, "corda": 1.27, "cross": 1.42, "self": 1.63, "shift": 1.41}
"""Per cent of 1,000 iterations in table 4."""
STEPS = 1000


class Training:
    """Training steps of the factors, which are as before after each."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.factors = [p for p in bench.adapted.parameters() if p.requires_grad]
        self.before = [p.detach().clone() for p in self.factors]
        self.optimizer = torch.optim.AdamW(self.factors, lr=1e-4)

    def step(self, clock: Clock) -> float:
        """Seconds of one."""
        gc.collect()
        start = clock()
        self.bench.workload.loss(self.bench.adapted, self.bench.batches[0]).backward()
        self.optimizer.step()
        seconds = clock() - start
        self.optimizer.zero_grad()
        with torch.no_grad():
            for factor, before in zip(self.factors, self.before, strict=True):
                factor.copy_(before)
        return seconds


def measure(workload: str, rows: Sequence[str], out: Path, threads: int, clock: Clock = time.process_time) -> None:
    """Measure what the record `out` lacks, and write it after each row."""
    record: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    bench = Bench(WORKLOADS[workload], torch.device("cpu"))
    if not record:
        record = {"about": bench.workload.about, "machine": describe(threads), "steps": [], "rows": {}}
    todo = [row for row in (FLOOR, BACKWARD, *rows) if row not in record["rows"]]
    training = Training(bench)
    training.step(clock)  # warms up
    for row in todo:
        record["steps"].append(training.step(clock))
        try:
            record["rows"][row] = {"seconds": timed(bench.job(row), clock)[0]}
        except Exception as error:  # whatever a row raises is its result
            record["rows"][row] = {"failed": reason(error)}
        print(f"{row}: {record['rows'][row]}, a step {record['steps'][-1]:.3g} s", file=sys.stderr, flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(record, indent=1).encode())


def share(record: dict[str, Any], row: str) -> float | None:
    """Per cent of `STEPS` training steps; None where the row failed."""
    seconds = record["rows"][row].get("seconds")
    return None if seconds is None else 100 * seconds / (STEPS * median(record["steps"]))


def markdown(record: dict[str, Any]) -> str:
    """The record as a table, beside the paper's."""
    lines = []
    for row in record["rows"]:
        found, paper = share(record, row), PAPER.get(row.split(" (")[0])
        cells = ["failed", "–"] if found is None else [f"{record['rows'][row]['seconds']:.1f}", f"{found:.2f} %"]
        aims = ["–", "–"] if paper is None else [f"{paper:.2f} %", f"{paper / 5:.2f} %"]
        lines.append([row, *cells, *aims])
    steps = sorted(record["steps"])
    head = ["", "CPU seconds", f"share of {STEPS:,} steps", "paper, table 4", "a fifth of that"]
    step = f"A training step: median {median(steps):.1f} s of {len(steps)} ({steps[0]:.1f}–{steps[-1]:.1f})."
    return f"{record['about']}. {machine_line(record['machine'])} {step}\n\n{table(head, lines)}"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="sd15")
    parser.add_argument("--rows", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "table4.json")
    parser.add_argument("--table", action="store_true", help="only print the table of the record")
    options = parser.parse_args(arguments)
    if not options.table:
        torch.set_num_threads(options.threads)
        rows = ROWS if options.rows is None else [row.strip() for row in options.rows.split(",")]
        measure(options.workload, rows, options.out, options.threads)
    print(markdown(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
