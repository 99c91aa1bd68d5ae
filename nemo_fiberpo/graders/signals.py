"""Signals between a process and its children. Grading processes import this file; it needs no other."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)  # what ends a run early, see `aligner.lifecycle.preemption`


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGNALS in this thread. A process started in the block inherits that, and can install its handlers before
    signals reach it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Have this process get signal `number` when process `parent` ends, even by SIGKILL: from the kernel on Linux;
    elsewhere a thread ends the process. If the parent has already ended, exit."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
        if os.getppid() not in (parent, 0):  # 0: of a process outside its own PID namespace
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
