"""Stopping a run early: SIGUSR1, SIGTERM or Ctrl-C to any rank, or the time limit of a run.

A signal sets a flag. After the RL step in progress, all ranks agree whether any of them got one, save a checkpoint,
destroy their process groups and exit with `NOT_FINISHED`. The same command resumes the run.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

from nemo_fiberpo.graders.signals import SIGNALS, die_with_parent, signals_blocked

NOT_FINISHED = os.EX_TEMPFAIL  # 75: not an error, run the same command again
# Set by `cli.launcher` for its ranks: a folder in which they mark the messages they have printed.
LAUNCHED = "FIBERPO_LAUNCHED"
CTRL_C = "Ctrl-C: the run is saved after the RL step in progress; press again to end it at once"
# Seconds within which a second SIGTERM or SIGINT counts as the first: torchrun forwards its own to ranks that a
# scheduler or a terminal has already signalled.
SAME_SIGNAL = 5.0
SAME_KEY = 0.3  # of Ctrl-C without torchrun

_received = 0  # number of the first signal
_first_at: float | None = None  # when a SIGTERM or SIGINT came


class Stopped(Exception):
    """The run ends before its last RL step, or cannot start yet. Exit status `NOT_FINISHED` if it can be resumed, else
    1."""

    def __init__(self, resumable: bool = True):
        super().__init__()
        self.resumable = resumable


def install(main: str = "__main__") -> None:
    """Have SIGNALS set a flag from now on. A second SIGTERM or SIGINT (Ctrl-C) well after the first ends the process at
    once. If the launcher ends, its own ranks get SIGTERM: they would otherwise train on, out of the scheduler's sight.

    main  `__name__` of the script. In a process that `multiprocessing` starts, as Megatron's first save does, it is
          "__mp_main__"; such a process also ends with its parent, since it would outlive a killed rank
    """
    if main == "__mp_main__":
        die_with_parent(os.getppid())
    for number in SIGNALS:
        signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if main == "__main__" and {"TORCHELASTIC_RUN_ID", LAUNCHED} & os.environ.keys():
        die_with_parent(os.getppid(), signal.SIGTERM)


def shield_resource_tracker() -> None:
    """Start multiprocessing's resource tracker with signals blocked, so that a signal to the whole job does not end it.

    It ignores SIGTERM and SIGINT by itself but not SIGUSR1, and its replacement would print a traceback for each
    semaphore it does not know.
    """
    with signals_blocked():
        resource_tracker.ensure_running()


def _note(number: int, _frame: FrameType | None) -> None:
    global _received, _first_at
    if number == signal.SIGINT and not _received and os.environ.get("RANK", "0") == "0" and LAUNCHED not in os.environ:
        os.write(2, f"\n{CTRL_C}\n".encode())
    _received = _received or number
    if number == signal.SIGUSR1:
        return
    now = time.monotonic()
    same = SAME_SIGNAL if number == signal.SIGTERM or "TORCHELASTIC_RUN_ID" in os.environ else SAME_KEY
    if _first_at is None:
        _first_at = now
    elif now - _first_at > same:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def finish() -> None:
    """Ignore signals from now on: during interpreter shutdown they would change the exit status."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def agreed_reason(time_is_up: bool = False) -> str | None:
    """Why the run is to stop, the same on every rank; None if it is not. Collective over all ranks, two numbers.

    time_is_up  as the first rank sees it
    """
    import torch

    first = torch.distributed.get_rank() == 0
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    own = torch.tensor([_received, int(time_is_up and first)], device=device)
    torch.distributed.all_reduce(own, op=torch.distributed.ReduceOp.MAX)
    number, time_limit = own.tolist()
    if number:
        return signal.Signals(number).name
    return "its time limit, exp_manager.max_time_per_run," if time_limit else None


class RunTimer:
    """PPOTrainer's run timer, extended to signals. `duration` (days:hours:minutes:seconds, or None) is that of
    NeMo-Aligner's Timer; `after_step` is called first, on every rank."""

    def __init__(self, duration: str | None, after_step: Callable[[], Any] = lambda: None):
        from nemo_aligner.utils.distributed import Timer

        self._timer, self._after_step = Timer(duration), after_step
        self._started = False
        self.reason: str | None = None

    def start_time(self) -> None:
        """Starts at the first call; PPOTrainer calls it in every epoch."""
        if not self._started:
            self._timer.start_time()
        self._started = True

    def is_finished(self) -> bool:
        self._after_step()
        self.reason = self.reason or agreed_reason(self._timer.get_time_remaining() <= 0)
        return self.reason is not None

    def __repr__(self) -> str:
        return f"RunTimer({self.reason or 'running'})"
