"""Ending a run early and well: SIGUSR1, SIGTERM or Ctrl-C to any rank, or the time limit of a run.

A signal sets a flag. After the RL step in progress all ranks agree whether one of them got a signal; then a checkpoint
is saved, and every rank leaves its process groups and exits with `NOT_FINISHED`. The same command goes on from there.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

import torch

from nemo_fiberpo.graders.signals import SIGNALS, die_with_parent, held_back

NOT_FINISHED = os.EX_TEMPFAIL  # 75: not an error, run the same command again
# Set for the ranks that `cli.launcher` starts: a folder, in which they mark what they have said.
LAUNCHED = "FIBERPO_LAUNCHED"
# Seconds within which a second SIGTERM is the first one again: torchrun passes its own on to ranks that a scheduler, or
# the terminal, has signalled already.
SAME_SIGNAL = 5.0

_received = 0  # number of the first signal
_ended_at: dict[int, float] = {}  # when each of the signals that end a process came first


class Stopped(Exception):
    """A run that ends before its last RL step, or cannot begin yet. `ending.explain` exits with `NOT_FINISHED` if it
    can go on, else 1."""

    def __init__(self, can_go_on: bool = True):
        super().__init__()
        self.can_go_on = can_go_on


def install(main: str = "__main__") -> None:
    """From now on SIGNALS set a flag. A SIGTERM or SIGINT (Ctrl-C) well after the first ends the process at once. The
    end of the launcher is a SIGTERM to the ranks that it started itself: they would train on without it, out of the
    scheduler's sight.

    main  `__name__` of the script. `multiprocessing` reads it again as "__mp_main__" in a process that it starts, as
          Megatron's first save does: such a process, which lets the signals pass, also ends with its parent; it would
          outlive a rank that is killed
    """
    if main == "__mp_main__":
        die_with_parent(os.getppid())
    for number in SIGNALS:
        signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if main == "__main__" and {"TORCHELASTIC_RUN_ID", LAUNCHED} & os.environ.keys():
        die_with_parent(os.getppid(), signal.SIGTERM)


def shield_resource_tracker() -> None:
    """Start the process in which multiprocessing keeps track of semaphores so that a signal to the whole job lets it
    live. It ignores SIGTERM by itself, not SIGUSR1; the next one that Python starts in its place knows nothing of the
    semaphores that there are, and says so in a traceback for each when the run ends."""
    with held_back():
        resource_tracker.ensure_running()


def _note(number: int, _frame: FrameType | None) -> None:
    global _received
    _received = _received or number
    if number == signal.SIGUSR1:
        return
    now = time.monotonic()
    first = _ended_at.setdefault(number, now)
    if now > first and now - first > (SAME_SIGNAL if number == signal.SIGTERM or _under_torchrun() else 0.0):
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def finish() -> None:
    """Let the signals pass from now on. The run is over; the interpreter gives them back their default action while it
    ends, and would be ended by them with another status."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def agreed_reason(time_is_up: bool = False) -> str | None:
    """Why the run is to end, None if it is not: the same on every rank. Collective over all ranks, two numbers.

    time_is_up  as the first rank sees it
    """
    first = torch.distributed.get_rank() == 0
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    own = torch.tensor([_received, int(time_is_up and first)], device=device)
    torch.distributed.all_reduce(own, op=torch.distributed.ReduceOp.MAX)
    number, time_limit = own.tolist()
    if number:
        return signal.Signals(number).name
    return "its time limit, exp_manager.max_time_per_run," if time_limit else None


class RunTimer:
    """What PPOTrainer asks after every RL step whether to save and stop; as NeMo-Aligner's Timer, of whose `duration`
    (days:hours:minutes:seconds, or None) it is, with signals. `after_step` is called first, on every rank."""

    def __init__(self, duration: str | None, after_step: Callable[[], Any] = lambda: None):
        from nemo_aligner.utils.distributed import Timer

        self._timer, self._after_step = Timer(duration), after_step
        self._started = False
        self.reason: str | None = None

    def start_time(self) -> None:
        """Of the run, at its first call; PPOTrainer calls it in every epoch."""
        if not self._started:
            self._timer.start_time()
        self._started = True

    def is_finished(self) -> bool:
        self._after_step()
        self.reason = self.reason or agreed_reason(self._timer.get_time_remaining() <= 0)
        return self.reason is not None

    def __repr__(self) -> str:
        return f"RunTimer({self.reason or 'running'})"
