"""The machine that figures are from, and the memory of this process."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

import peft
import torch

import cntlora

RESULTS = Path(__file__).parents[1] / "benchmarks" / "records"
"""Where the benchmarks write their records."""


def describe(threads: int, device: torch.device | None = None) -> dict[str, Any]:
    """Processor, cores, memory, threads and versions; the name of the GPU where `device` is one."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device is not None and device.type == "cuda" else {}
    return gpu | {
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


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gpu_held(device: torch.device) -> float:
    """MiB that the allocator of a GPU has given out, from which its peak now starts again; 0 elsewhere."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 2**20


def gpu_peak(device: torch.device) -> float:
    """The most MiB that it has given out since; 0 elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0


def memory_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak since the last reset) of this process in MiB; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def reset_peak() -> None:
    """Make VmHWM start again from now; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def trim() -> None:
    """Have the C library give back what is free (glibc; nothing happens elsewhere)."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
