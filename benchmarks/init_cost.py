"""Cost of the initialisation against the bare forward pass over the same batches (MiniLM-L6, 8 batches of 16 tweets).

    python benchmarks/init_cost.py            # prints the table, writes results/init_cost.json

Everything runs in one process with the same threads, repeated and interleaved, so that ratios can be trusted on a noisy
machine. Peak memory is measured in a process of its own for each row, above the model after its own forward pass.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import cntlora
from cntlora.experiments.peers import peft_model
from cntlora.plan import write_atomically
from cntlora.recipes.sentiment import TARGET_MODULES, SentimentTask

LORA: dict[str, Any] = {
    "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "task_type": "SEQ_CLS", "target_modules": list(TARGET_MODULES)
}  # fmt: skip
OUT = Path(__file__).parents[1] / "results" / "init_cost.json"
ROWS: dict[str, dict[str, Any]] = {
    "cross": {"method": "cross"},
    "self": {"method": "self"},
    "shift": {"method": "shift"},
    "cross + VAS": {"method": "cross", "adaptive_ranks": True},
    "self + VAS": {"method": "self", "adaptive_ranks": True},
    "shift + VAS": {"method": "shift", "adaptive_ranks": True},
    "eva": {"method": "eva"},
    "corda": {"method": "corda"},
    "lora_ga": {"method": "lora_ga"},
    "lora_one": {"method": "lora_one"},
    "pissa": {"method": "pissa"},
    "olora": {"method": "olora"},
}
PEERS = ("eva", "corda", "lora_ga", "pissa", "pissa_niter_4", "olora")
"""PEFT's own code, as `cntlora.experiments.peers` calls it: wrapping and initialisation."""


def fresh(task: SentimentTask) -> torch.nn.Module:
    """MiniLM with plain LoRA, rank 8."""
    torch.manual_seed(0)
    return get_peft_model(task.build_model(0), LoraConfig(**LORA)).eval()


def forward_pass(model: torch.nn.Module, batches: Iterable[dict[str, Any]]) -> None:
    """What cannot be avoided: every batch once through the model."""
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def jobs(task: SentimentTask, batches: list[dict[str, Any]]) -> dict[str, Callable[[], float]]:
    """The rows of the table, each giving its seconds; a plan leaves the model as it was, so one model serves all."""
    model = fresh(task)

    def timed(job: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            job()
            return time.perf_counter() - start

        return run

    def plan(options: dict[str, Any]) -> Callable[[], object]:
        return lambda: cntlora.compute_plan(model, batches, cntlora.InitConfig(**options), progress=False)

    def peer(name: str) -> Callable[[], float]:
        def run() -> float:
            pristine = task.build_model(0).eval()  # PEFT's initialisations change it; making it does not count
            return timed(lambda: peft_model(name, pristine, LORA, batches, 100))()

        return run

    rows = {"forward pass": timed(lambda: forward_pass(model, batches))}
    rows |= {name: timed(plan(options)) for name, options in ROWS.items()}
    return rows | {f"PEFT {name}": peer(name) for name in PEERS}


def peak_above_model(name: str) -> float:
    """MiB by which one row raises the peak of a process that has loaded the model and run one batch."""
    command = [sys.executable, "-W", "ignore", __file__, "--peak-of", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _memory(field: str) -> float:
    """VmRSS (now) or VmHWM (peak since the last reset) of this process in MiB; Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def measure(repeats: int, threads: int) -> dict[str, Any]:
    """Seconds of every row, its ratio to the forward pass of the same round, and peak memory."""
    torch.set_num_threads(threads)
    task = SentimentTask()
    batches = [batch for batch, _ in zip(task.train_batches(0), range(8), strict=False)]
    work = jobs(task, batches)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats + 1):
        for name, job in work.items():
            seconds[name].append(job())
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first round warms up
    floor = seconds["forward pass"]
    table = {
        name: {
            "seconds": median(values),
            "ratio": median(v / f for v, f in zip(values, floor, strict=True)),
            "ratios": sorted(v / f for v, f in zip(values, floor, strict=True)),
            "peak_mib": peak_above_model(name),
        }
        for name, values in seconds.items()
    }
    machine = {"processor": _processor(), "threads": threads, "torch": torch.__version__, "repeats": repeats}
    return {"machine": machine, "rows": table}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        task = SentimentTask()
        batches = [batch for batch, _ in zip(task.train_batches(0), range(8), strict=False)]
        work = jobs(task, batches)
        forward_pass(fresh(task), batches[:1])
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak of loading the model does not count
        work[options.peak_of]()
        print(_memory("VmHWM") - before)
        return
    result = measure(options.repeats, options.threads)
    print("| | seconds | × forward pass (median, range) | peak memory above the model, MiB |\n|---|---|---|---|")
    for name, row in result["rows"].items():
        low, high = row["ratios"][0], row["ratios"][-1]
        print(f"| {name} | {row['seconds']:.2f} | {row['ratio']:.2f} ({low:.2f}–{high:.2f}) | {row['peak_mib']:.0f} |")
    write_atomically(OUT, json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    main()
