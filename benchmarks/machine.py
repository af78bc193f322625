"""The machine that figures are from, and the memory of this process."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import peft
import torch

import cntlora

RESULTS = Path(__file__).parents[1] / "benchmarks" / "records"
"""Where the benchmarks write their records."""


def describe(threads: int) -> dict[str, Any]:
    """Processor, cores, memory, threads and versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(total_memory_gib(), 1),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "cntlora": cntlora.__version__,
    }


def processor() -> str:
    """The processor's name as Linux has it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def total_memory_gib() -> float:
    """Memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def memory_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak since the last reset) of this process in MiB; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def reset_peak() -> None:
    """Makes VmHWM start again from now; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
