"""Peak memory of an initialisation under `max_memory=`: what is asked for, what is taken, and what it costs.

    python benchmarks/memory.py          # prints the table, writes benchmarks/records/memory.json

A stack of linear layers 1024 → 1024, each with an input of its own, read with more tokens than features, so that every
statistic is a whole 1024 × 1024 matrix. Each row is a process of its own; the peak is above the model after a forward
pass.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from benchmarks.machine import RESULTS, describe, memory_mib, reset_peak
from benchmarks.standin import Size, letter, stand_in
from benchmarks.workloads import forward_pass

import cntlora
from cntlora.atomic import write_atomically

SIZE = Size(d=1024, tokens=1280, batches=2, layers=16)
LIMITS: dict[str, Any] = {
    "none": None,
    "300MiB": "300MiB",
    "200MiB": "200MiB",
    "150MiB": "150MiB",
    "300MiB, disk 1GiB": {"device": "300MiB", "disk": "1GiB"},
}


def own_row(limit: str, size: Size, method: str) -> dict[str, Any]:
    """One row, in this process."""
    small, few = stand_in(replace(size, d=300, layers=2))  # loads libraries and starts threads, which do not count
    cntlora.compute_plan(small, few, letter(method), progress=False)
    model, batches = stand_in(size)
    forward_pass(model, batches[:1])
    before = memory_mib("VmRSS")
    reset_peak()
    start = time.perf_counter()
    config = letter(method)
    plan = cntlora.compute_plan(model, batches, config, progress=False, max_memory=LIMITS[limit])
    seconds = time.perf_counter() - start
    peak = memory_mib("VmHWM") - before
    return {"limit": limit, "seconds": seconds, "peak_mib": peak, **plan.memory, "sum": _fingerprint(plan)}


def _fingerprint(plan: cntlora.InitPlan) -> str:
    """The same for plans that are the same to the bit."""
    return str(sum(int(site.A.view(torch.int32).long().sum()) for site in plan.sites.values()))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| max_memory | passes | sums on the device, MiB | in files, MiB | peak above the model, MiB | seconds |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        device, disk = row["device"] / 2**20, row["disk"] / 2**20
        lines.append(
            f"| {row['limit']} | {row['passes']} | {device:.0f} | {disk:.0f} | {row['peak_mib']:.0f} | "
            f"{row['seconds']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--method", default="cross")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.row:
        print(json.dumps(own_row(options.row, SIZE, options.method)))
        return
    rows = []
    for limit in LIMITS:
        command = [sys.executable, "-W", "ignore", __file__, "--row", limit]
        command += ["--threads", str(options.threads), "--method", options.method]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append(json.loads(printed.splitlines()[-1]))
    assert len({row["sum"] for row in rows}) == 1, "a limit has changed the plan"
    print(table(rows))
    record = {"machine": describe(options.threads), "method": options.method, "rows": rows}
    write_atomically(RESULTS / "memory.json", json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()
