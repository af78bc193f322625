"""Ctrl-C at the moments when it must wait, and where Python alone would not hear it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

STOPPED = "cntlora: stopped; nothing was half-written"
ANNOUNCED = threading.Event()
"""Whether the user has been told."""


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Context in which Ctrl-C waits, so that what is written is written whole; it comes at the end of the block.

    Only the main thread is ever interrupted, and only where Python has its own answer to Ctrl-C.
    """
    before: Any = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *arguments: pressed.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            before(*pressed[0])


def tell_stopped() -> None:
    """Say on stderr that the command was stopped."""
    ANNOUNCED.set()
    sys.stderr.write(f"{STOPPED}\n")
    sys.stderr.flush()


@contextmanager
def ended_within(seconds: float) -> Iterator[None]:
    """Around the main program: Ctrl-C ends it with one line and exit code 130, so many seconds later at the latest.

    An error, exit code 1, ends it at once too: taking the libraries down takes Python half a second or more.
    Python answers Ctrl-C between two of its own instructions, and so neither within one long factorisation nor while it
    waits, at the very end, for threads that do one. A thread of ours, which hears of it at once, ends the process then.
    Files are written so that they may end at any moment.
    """
    ANNOUNCED.clear()
    read, write = os.pipe()
    os.set_blocking(write, False)
    threading.Thread(target=_end_after_interrupt, args=(read, seconds), daemon=True).start()
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as ended:
        code = ended.code if isinstance(ended, SystemExit) else 130
        if code not in (1, 130):
            raise
        if code == 130 and not ANNOUNCED.is_set():
            tell_stopped()
        with suppress(OSError):  # nobody reads any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(int(code))  # while the libraries are taken down, no thread is heard any more
    finally:
        signal.set_wakeup_fd(before)


def _end_after_interrupt(read: int, seconds: float) -> None:
    while byte := os.read(read, 1):
        if byte[0] == signal.SIGINT:
            time.sleep(seconds)
            if not ANNOUNCED.is_set():
                os.write(2, f"{STOPPED}\n".encode())
            os._exit(130)
