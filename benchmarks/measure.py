"""Seconds and peak memory of the rows of a workload: interleaved rounds, and a process of its own for each peak."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.machine import gpu_held, gpu_peak, memory_mib, reset_peak, trim, wait_for
from benchmarks.rows import BACKWARD, FLOOR, Bench, Job
from benchmarks.tables import number
from benchmarks.workloads import WORKLOADS, forward_pass

Record = dict[str, Any]
Clock = Callable[[], float]
CPU = torch.device("cpu")


def reason(error: Exception) -> str:
    """One line that says why a row failed."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def timed(job: Job, clock: Clock = time.perf_counter, device: torch.device = CPU) -> tuple[float, float]:
    """Seconds of `run` alone; and on a GPU the MiB by which it raised what the allocator held, else 0."""
    prepared = job.prepare()
    gc.collect()  # what earlier rows left behind does not count
    wait_for(device)
    held = gpu_held(device)
    start = clock()
    job.run(prepared)
    wait_for(device)
    return clock() - start, gpu_peak(device) - held


def rounds(
    jobs: dict[str, Job],
    repeats: int,
    budget: float,
    clock: Clock = time.perf_counter,
    device: torch.device = CPU,
    peaks: dict[str, float] | None = None,
) -> tuple[list[dict[str, float]], dict[str, str]]:
    """Every row once a round, 1 + `repeats` rounds, of which the first warms up.

    Args:
        budget: a row that has taken so many seconds is not run again.
        peaks: takes the peak memory of each row on a GPU, that of its last run.

    Returns:
        For each round, row → seconds; and the rows that failed with their reasons, which then have no seconds.
    """
    found: list[dict[str, float]] = []
    failed: dict[str, str] = {}
    spent = dict.fromkeys(jobs, 0.0)
    for _ in range(repeats + 1):
        seconds: dict[str, float] = {}
        for name, job in jobs.items():
            if name in failed or (spent[name] > budget and name != FLOOR):
                continue
            try:
                seconds[name], peak = timed(job, clock, device)
            except Exception as error:  # whatever a row raises is its result
                failed[name] = reason(error)
                continue
            spent[name] += seconds[name]
            if peaks is not None:
                peaks[name] = peak
            print(f"{name}: {number(seconds[name])} s", file=sys.stderr, flush=True)
        found.append(seconds)
    return [{n: s for n, s in row.items() if n not in failed} for row in found], failed


def summary(name: str, found: Sequence[dict[str, float]]) -> Record:
    """Median and range of a row's seconds, and of their ratio to the forward pass of the same round.

    And to the forward and backward pass, where that was measured.

    The first round counts only where there is no other: a row beyond its budget is cold and says so.
    """
    kept = [r for r in found[1:] if name in r] or [r for r in found if name in r]
    seconds = sorted(r[name] for r in kept)
    ratios = sorted(r[name] / r[FLOOR] for r in kept)
    with_backward = sorted(r[name] / r[BACKWARD] for r in kept if BACKWARD in r)
    cold = kept[0] is found[0] if kept else False
    return {
        "seconds": median(seconds),
        "seconds_range": [seconds[0], seconds[-1]],
        "ratio": median(ratios),
        "ratios": ratios,
        **({"ratio_backward": median(with_backward), "ratios_backward": with_backward} if with_backward else {}),
        "runs": len(kept),
        "cold": cold,
    }


def measure(
    workload_name: str,
    rows: Sequence[str],
    repeats: int,
    budget: float,
    memory: bool,
    device: torch.device = CPU,
    clock: Clock = time.perf_counter,
) -> dict[str, Record]:
    """Row → its figures, or "skipped" or "failed" with the reason."""
    workload = WORKLOADS[workload_name]
    bench = Bench(workload, device)
    wanted = [name for name in dict.fromkeys([FLOOR, *rows]) if name not in workload.skip]
    forward_pass(bench.adapted, bench.batches[:1])
    peaks: dict[str, float] = {}
    jobs = {name: bench.job(name) for name in wanted}
    found, failed = rounds(jobs, repeats, budget, clock, device, peaks)
    table: dict[str, Record] = {}
    for name in dict.fromkeys([FLOOR, *rows]):
        if name in workload.skip:
            table[name] = {"skipped": workload.skip[name]}
        elif name in failed:
            table[name] = {"failed": failed[name]}
        else:
            table[name] = summary(name, found)
            if device.type == "cuda":
                table[name]["peak_mib"] = peaks[name]
            elif memory:
                table[name] |= peak_of(workload_name, name, torch.get_num_threads())
    return table


def peak_of(workload: str, row: str, threads: int) -> Record:
    """Peak memory of one row, or why it could not be measured: hours of timing are not thrown away for it."""
    try:
        return peaks_above_model(workload, [row], threads)[row]
    except RuntimeError as error:
        return {"peak_failed": reason(error)}


def peaks_above_model(workload: str, rows: Sequence[str], threads: int = 1) -> dict[str, Record]:
    """Row → the MiB by which it raises the peak of a process that has loaded the model and run one batch; or a reason.

    The C library is told to give each freed block of 128 KiB or more back at once, so that memory that is free but
    kept by the allocator does not count.

    Raises:
        RuntimeError: if that process fails, with the last line that it printed.
    """
    script = Path(__file__).with_name("init_cost.py")
    options = ["--peaks-here", "--rows", ",".join(rows), "--workloads", workload, "--threads", str(threads)]
    command = [sys.executable, "-W", "ignore", str(script), *options]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"peak memory on {workload}: the process failed: {last}")
    found: dict[str, Record] = json.loads(done.stdout.splitlines()[-1])
    return found


def peaks_here(workload_name: str, rows: Sequence[str]) -> dict[str, Record]:
    """The same in this process, which should have done nothing else, and which is forked for each row.

    A row first runs on a tiny model: libraries that it loads and threads that it starts do not count.
    """
    workload = WORKLOADS[workload_name]
    tiny, bench = Bench(WORKLOADS["tiny"], CPU), Bench(workload, CPU)
    for model in (tiny.adapted, tiny.base, bench.base):
        assert model is not None  # made before the process is forked
    forward_pass(bench.adapted, bench.batches[:1])
    found: dict[str, Record] = {}
    for row in rows:
        found[row] = {"skipped": workload.skip[row]} if row in workload.skip else _forked(tiny, bench, row)
        print(f"{row}: {found[row]}", file=sys.stderr, flush=True)
    return found


def _forked(tiny: Bench, bench: Bench, row: str) -> Record:
    """Peak memory of one row in a copy of this process."""
    receive, send = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            result = {"peak_mib": _own_peak(tiny, bench, row)}
        except Exception as error:  # whatever a row raises is its result
            result = {"peak_failed": reason(error)}
        os.write(send, json.dumps(result).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as answer:
        text = answer.read()
    os.waitpid(process, 0)
    return json.loads(text) if text else {"peak_failed": "the process was killed"}


def _own_peak(tiny: Bench, bench: Bench, row: str) -> float:
    warm, job = tiny.job(row), bench.job(row)
    warm.run(warm.prepare())
    prepared = job.prepare()
    for (
        tensor
    ) in prepared.state_dict().values():  # whose pages of files are not there after a fork before they are read
        tensor.sum()
    forward_pass(prepared, bench.batches[:1])
    gc.collect()
    trim()
    before = memory_mib("VmRSS")
    reset_peak()  # the peak of loading the model does not count
    job.run(prepared)
    return memory_mib("VmHWM") - before
