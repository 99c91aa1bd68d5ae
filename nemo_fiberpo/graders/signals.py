"""Signals between a process and those that it starts. Grading processes import this file: it needs no other."""

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
def held_back() -> Iterator[None]:
    """Block SIGNALS in this thread meanwhile. A process that is started inside inherits that, and can install its own
    handlers before the signals reach it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Signal `number` to this process when process `parent` ends, even by SIGKILL: the kernel does it on Linux, a
    thread elsewhere, which ends the process. If it has ended already, so does this one."""
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
