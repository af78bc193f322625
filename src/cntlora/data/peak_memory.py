"""The most memory that a piece of work holds at a time, by what torch's allocators are asked for.

Unlike the size of the process this depends neither on what the C library keeps nor on what was loaded before, and is
the same at each run of the same work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass
class Held:
    """Bytes above those at the start.

    Attributes:
        most: at a time; None where they cannot be counted.
        left: at the end.
    """

    most: int | None = None
    left: int = 0


@contextmanager
def counted_memory(device: torch.device) -> Iterator[Held]:
    """Context that counts the bytes which work on `device` holds; on the CPU those of this thread alone.

    What is yielded has its values after the context. Other devices than GPUs and the CPU are not counted, nor is the
    CPU with a torch that was built without its profiler.
    """
    held = Held()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield held
        held.most = torch.cuda.max_memory_allocated(device) - before
        held.left = torch.cuda.memory_allocated(device) - before
    elif device.type == "cpu" and torch.profiler.kineto_available():
        record = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with _quiet_profiler():
            record.start()
        try:
            yield held
        finally:
            record.stop()
        held.most, held.left = _counted(record)
    else:
        yield held


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Context in which the profiler reads that it is to print nothing, which it does at its first start alone."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "6"
    try:
        yield
    finally:
        del os.environ[name]


def _counted(record: profile) -> tuple[int, int]:
    """The most and the last of the running sum over what was allocated and freed."""
    assert record.profiler is not None and record.profiler.kineto_results is not None
    now = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()  # type: ignore[attr-defined]
            most = max(most, now)
    return most, now
