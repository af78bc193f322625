"""Free memory: on a GPU what its driver and torch's allocator have, else what this process may still take.

A process in a container may take less than the machine has; Linux says how much in its control groups.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

ROOT = Path("/")
"""Where `proc` and `sys` are."""
GROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Version 2 and 1 of control groups: the limit, what is used, and what of that are files that can be dropped."""


def free_bytes(device: torch.device) -> float:
    """Bytes that can be had on a device now; infinite where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return min([_free_of_machine(), *(_free_of_group(*group) for group in GROUPS)])


def _free_of_machine() -> float:
    """Read what the system gives without swapping: /proc/meminfo of Linux, psutil elsewhere where it is installed."""
    try:
        lines = (ROOT / "proc/meminfo").read_text().splitlines()
    except OSError:
        try:
            return float(importlib.import_module("psutil").virtual_memory().available)
        except ImportError:
            return float("inf")
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return float(found[0]) * 1024 if found else float("inf")


def _free_of_group(folder: str, limit: str, used: str, files: str) -> float:
    """Return what the control group of this process leaves; infinite without one, or without a limit ("max")."""
    try:
        most = float((ROOT / folder / limit).read_text())
        statistics = dict(line.split() for line in (ROOT / folder / "memory.stat").read_text().splitlines())
        held = float((ROOT / folder / used).read_text()) - float(statistics.get(files, 0))
    except (OSError, ValueError):
        return float("inf")
    return max(most - held, 0.0)
