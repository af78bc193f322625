"""Cost of every initialisation against the bare forward pass over the same batches, by workload.

    python benchmarks/init_cost.py                                  # every workload; benchmarks/records/<workload>.json
    python benchmarks/init_cost.py --workloads minilm,dinov2 --rows self,eva,"PEFT eva"
    python benchmarks/init_cost.py --device cuda --workloads llama-7b --out benchmarks/records/gpu
    python benchmarks/init_cost.py --peaks --threads 1              # peak memory alone; benchmarks/records/peaks.json
    python benchmarks/init_cost.py --table                          # the tables of the records that are there
    python benchmarks/init_cost.py --peaks --table                  # that of peak memory

A workload runs in one process with the same model, batches and threads, rows interleaved in rounds, so that ratios (to
the forward pass of the same round) can be trusted on a noisy machine. Peak memory is measured in a process of its own
for each row (a fork of one that has loaded the model), above the model after a forward pass; on a GPU it is what the
allocator counted. A row that fails or
is left out is reported with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from benchmarks.machine import RESULTS, describe
from benchmarks.measure import measure, peaks_above_model, peaks_here
from benchmarks.rows import ROWS
from benchmarks.tables import beside_peft, markdown, overview, peaks_table, read_records
from benchmarks.workloads import WORKLOADS
from transformers.utils import logging as transformers_logging

from cntlora.atomic import write_atomically

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def names_of(text: str | None, known: list[str], default: list[str], what: str) -> list[str]:
    """Comma-separated names.

    Raises:
        SystemExit: for an unknown one; lists the right ones.
    """
    chosen = default if text is None else [name.strip() for name in text.split(",")]
    for name in chosen:
        if name not in known:
            raise SystemExit(f"{what}: {name!r} is not known; expected some of: {', '.join(known)}")
    return chosen


def run(workload: str, rows: list[str], options: argparse.Namespace) -> None:
    """Measure one workload, print its table and write its record."""
    record = {
        "workload": workload,
        "about": WORKLOADS[workload].about,
        "machine": describe(options.threads, options.device),
        "repeats": options.repeats,
        "row_budget_seconds": options.row_budget,
        "clock": options.clock,
        "rows": measure(
            workload, rows, options.repeats, options.row_budget, not options.no_memory, options.device,
            CLOCKS[options.clock],
        ),
    }  # fmt: skip
    print(markdown(record), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out / f"{workload}.json", json.dumps(record, indent=1).encode())


def run_peaks(workload: str, rows: list[str], options: argparse.Namespace) -> None:
    """Measure peak memory alone, and put it in the record of all workloads; rows that are not measured again stay."""
    path = options.out / "peaks.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    before = record.get(workload, {}).get("rows", {})
    record[workload] = {
        "about": WORKLOADS[workload].about,
        "machine": describe(options.threads),
        "rows": before | peaks_above_model(workload, rows, options.threads),
    }
    print(json.dumps(record[workload]["rows"], indent=1), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1).encode())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", help=f"some of {', '.join(WORKLOADS)}")
    parser.add_argument("--rows", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--repeats", type=int, default=3, help="rounds after the one that warms up")
    parser.add_argument("--row-budget", type=float, default=60.0, help="seconds after which a row is not run again")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: seconds of this process, on a busy machine"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory (a process for each row)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--table", action="store_true", help="only print the tables of the records in --out")
    parser.add_argument("--peaks", action="store_true", help="peak memory alone; peaks.json in --out")
    parser.add_argument("--peaks-here", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = parse(arguments)
    if options.table and options.peaks:
        print(peaks_table(json.loads((options.out / "peaks.json").read_text())))
        return
    if options.table:
        records = read_records(options.out)
        print("\n\n".join([overview(records), beside_peft(records), *map(markdown, records)]))
        return
    shown = [name for name, workload in WORKLOADS.items() if not workload.hidden]
    workloads = names_of(options.workloads, list(WORKLOADS), shown, "--workloads")
    rows = names_of(options.rows, list(ROWS), list(ROWS), "--rows")
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.peaks_here:
        print(json.dumps(peaks_here(workloads[0], rows)))
        return
    for workload in workloads:
        (run_peaks if options.peaks else run)(workload, rows, options)


if __name__ == "__main__":
    main()
