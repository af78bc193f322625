"""Compare what `cntlora init --dry-run` foretells with what the call then takes: peak memory, passes, and its own cost.

    python benchmarks/forecasts.py            # writes benchmarks/records/forecasts.json, a workload at a time
    python benchmarks/forecasts.py --table    # only prints that record

Peaks are above the model, by what the allocator gives out (`cntlora.data.peak_memory`), on one thread, all batches of
the workload. Seconds are those of the CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from benchmarks.machine import RESULTS, describe
from benchmarks.measure import reason
from benchmarks.rows import OURS, Bench
from benchmarks.tables import machine_line, table
from benchmarks.workloads import WORKLOADS, forward_pass

import cntlora
from cntlora.atomic import write_atomically
from cntlora.data.peak_memory import counted_memory
from cntlora.execution.forecast import forecast
from cntlora.methods.method import METHODS

CPU = torch.device("cpu")
Cases = dict[str, tuple[str | None, ...]]
CASES: dict[str, Cases] = {
    "minilm": {"self": (None, "40MiB", "30MiB"), "whitened": (None, "60MiB", "40MiB")},
    "roberta-large": {"self": (None, "150MiB"), "whitened": (None, "150MiB")},
    "smollm2": {"self": (None, "300MiB", "150MiB"), "whitened": (None, "300MiB")},
    "tiny": {"self": (None,), "whitened": (None,)},
}
"""Workload → method → `max_memory`. "tiny" is for tests."""


def spent(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the CPU, and what came out."""
    gc.collect()
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def case(bench: Bench, method: str, limit: str | None) -> dict[str, Any]:
    """One row: foretold, then taken."""
    config = cntlora.InitConfig.from_dict(OURS[method])
    loss = bench.workload.loss if METHODS[OURS[method]["method"]].reads == "gradients" else None
    arguments: dict[str, Any] = {"config": config, "loss": loss, "max_memory": limit, "progress": False}
    dry, foretold = spent(lambda: forecast(bench.adapted, bench.batches, **arguments))
    seconds, _ = spent(lambda: cntlora.compute_plan(bench.adapted, bench.batches, **arguments))
    gc.collect()
    with counted_memory(CPU) as held:
        plan = cntlora.compute_plan(bench.adapted, bench.batches, **arguments)
    assert plan.memory is not None
    return {
        "foretold_bytes": foretold.peak,
        "bytes": held.most,
        "foretold_passes": foretold.passes,
        "passes": plan.memory["passes"],
        "dry_run_seconds": dry,
        "seconds": seconds,
    }


def measure(workload: str) -> list[dict[str, Any]]:
    """All rows of a workload, or why one failed."""
    bench = Bench(WORKLOADS[workload], CPU)
    forward_pass(bench.adapted, bench.batches[:1])
    rows = []
    for method, limits in CASES[workload].items():
        for limit in limits:
            row: dict[str, Any] = {"method": method, "max_memory": limit}
            try:
                row |= case(bench, method, limit)
            except Exception as error:  # whatever a row raises is its result
                row["failed"] = reason(error)
            print(f"{workload}: {row}", file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    lines = []
    for workload, part in record.items():
        for row in part["rows"]:
            cells = [workload, row["method"], row["max_memory"] or "none"]
            if "failed" in row:
                lines.append([*cells, row["failed"], "–", "–"])
                continue
            peaks = f"{row['foretold_bytes'] / 2**20:.1f} / {row['bytes'] / 2**20:.1f}"
            passes = f"{row['foretold_passes']} / {row['passes']}"
            lines.append([*cells, peaks, passes, f"{row['dry_run_seconds'] / row['seconds']:.2f}"])
    head = ["", "", "`max_memory`", "peak foretold / taken, MiB", "passes foretold / taken", "dry run / call, seconds"]
    return f"{machine_line(next(iter(record.values()))['machine'])}\n\n{table(head, lines)}"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="minilm,roberta-large,smollm2", help=f"some of {', '.join(CASES)}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of forecasts.json")
    parser.add_argument("--table", action="store_true", help="only print the table of the record")
    options = parser.parse_args(arguments)
    path = options.out / "forecasts.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for workload in () if options.table else options.workloads.split(","):
            if workload not in CASES:
                raise SystemExit(f"--workloads: {workload!r} is not known; expected some of: {', '.join(CASES)}")
            record[workload] = {"machine": describe(1), "rows": measure(workload)}
            options.out.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(record, indent=1).encode())
    finally:
        torch.set_num_threads(threads)
    print(markdown(record))


if __name__ == "__main__":
    main()
