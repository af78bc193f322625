"""Running of the work: in full precision whatever the caller has switched on, and on all cores where it is small.

LAPACK hardly gains from a second thread on a matrix of some hundred rows, so that several of them side by side, one
thread each, take half the time on two cores (docs/performance.md). They come out as they do alone. On larger matrices
LAPACK uses all threads, and their number shows in the rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from itertools import islice
from queue import SimpleQueue
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

SIDE_BY_SIDE = 1024
"""Largest number of rows of a matrix for which whole factorisations run side by side; beyond, LAPACK's threads do."""
STREAMS = 4
"""Factorisations at a time on a GPU."""


def side_by_side(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    rows: Sequence[int],
    device: torch.device,
    streams: bool = True,
) -> list[Result]:
    """`work` of every item in their order, in full precision, small ones with as many threads as torch has.

    Which items are small depends on nothing but their size, so that company does not change the bits of a result.

    Args:
        rows: of the largest matrix of each item, which decides whether threads pay.
        streams: on a GPU, work on STREAMS items at a time; not where an item uses what the work on another has made.
    """
    threads = torch.get_num_threads()
    with full_precision(device):
        if device.type == "cuda" and streams and len(items) > 1:
            return _on_streams(work, items, device)
        if device.type != "cpu" or threads < 2:
            return [work(item) for item in items]
        small = [i for i, n in enumerate(rows) if n <= SIDE_BY_SIDE]
        done: dict[int, Result] = {}
        if small:
            torch.set_num_threads(1)
            try:
                found = _in_threads(threads, _with_one_thread(work), [items[i] for i in small])
                done.update(zip(small, found, strict=True))
            finally:
                torch.set_num_threads(threads)
        return [done[i] if i in done else work(item) for i, item in enumerate(items)]


def once(make: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """`make`, run once for each argument also where several threads ask for it at a time (`cache` alone does not)."""
    made, lock = cache(make), Lock()

    def ask(item: Item) -> Result:
        with lock:
            return made(item)

    return ask


def _on_streams(work: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> list[Result]:
    """STREAMS items at a time, each queued by a thread of its own: a factorisation does not fill a GPU.

    The streams begin behind what this thread has queued, and it goes on behind them, so that what is allocated on one
    side and freed on the other is not written to too early.
    """
    here, free = torch.cuda.current_stream(device), SimpleQueue[Any]()
    streams = _streams(device)
    for stream in streams:
        stream.wait_stream(here)
        free.put(stream)

    def run(item: Item) -> Result:
        stream = free.get()
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                return work(item)
        finally:
            free.put(stream)

    try:
        return _in_threads(STREAMS, run, items)
    finally:
        for stream in streams:
            here.wait_stream(stream)


def _in_threads(threads: int, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`work` of every item. No thread is at work any more when this ends, by an error or an interrupt either: one that
    went on would write into sums that are given up, and into files that are deleted.
    """
    pool, work = _pool(threads), _without_gradients(work)
    futures = [pool.submit(work, item) for item in items]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        begun = [future for future in futures if not future.cancel()]
        wait(begun)
    return [future.result() for future in begun]


@cache
def _streams(device: torch.device) -> list[Any]:
    """Made once, with torch's linear algebra loaded: its first calls must not come from several threads."""
    one = torch.eye(2, device=device)
    for first in (torch.linalg.cholesky, torch.linalg.eigh, torch.linalg.inv, torch.linalg.qr, torch.linalg.svd):
        first(one)
    return [torch.cuda.Stream(device) for _ in range(STREAMS)]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept for the next call: a new thread would have to ask the system for all its memory again, page by page."""
    return ThreadPoolExecutor(threads, thread_name_prefix="cntlora")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def _with_one_thread(work: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """A new thread would begin with as many threads as the process started with, which shows in the bits."""

    def run(item: Item) -> Result:
        torch.set_num_threads(1)
        return work(item)

    return run


def _without_gradients(work: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """A thread starts with gradients and without autocast, whatever its maker had."""

    def run(item: Item) -> Result:
        with torch.no_grad():
            return work(item)

    return run


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Context in which float32 products are float32: no autocast, no TF32, no bfloat16; afterwards all is as it was."""
    with torch.autocast(device.type, enabled=False), _ieee_products():
        yield


@contextmanager
def _ieee_products() -> Iterator[None]:
    owners = [getattr(backend, "matmul", None) for backend in (torch.backends.cuda, torch.backends.mkldnn)]
    if not all(hasattr(owner, "fp32_precision") for owner in owners):  # torch before 2.9
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    before = [owner.fp32_precision for owner in owners]  # type: ignore[union-attr]
    try:
        for owner in owners:
            owner.fp32_precision = "ieee"  # type: ignore[union-attr]
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.fp32_precision = value  # type: ignore[union-attr]


def read_back(numbers: Sequence[Tensor | None]) -> list[list[float]]:
    """The values of all tensors, flat, by one transfer from each device."""
    found: list[list[float]] = [[] for _ in numbers]
    places: dict[Any, list[int]] = {}
    for i, tensor in enumerate(numbers):
        if tensor is not None:
            places.setdefault(tensor.device, []).append(i)
    for indices in places.values():
        flat = [tensor.reshape(-1) for i in indices if (tensor := numbers[i]) is not None]
        wide = torch.float32 if flat[0].device.type == "mps" else torch.float64
        values = iter(torch.cat([tensor.to(wide) for tensor in flat]).tolist())
        for i, tensor in zip(indices, flat, strict=True):
            found[i] = list(islice(values, tensor.numel()))
    return found
