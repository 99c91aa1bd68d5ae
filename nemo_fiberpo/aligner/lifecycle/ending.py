"""How a process of a run ends: its exit status, and what is on the terminal."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from nemo_fiberpo.aligner.lifecycle.first_rank import SaidByFirstRank
from nemo_fiberpo.aligner.lifecycle.preemption import LAUNCHED, NOT_FINISHED, Stopped, finish


def leave() -> None:
    """Destroy the process groups at the end of a run.

    A process that leaves them to the end of the interpreter can abort there: a thread of gloo may still hold the last
    tensor of a collective, and freeing it needs the interpreter.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def explain(main: Callable[[], None]) -> None:
    """Run a script's main, and leave its process groups. Exit status 75 if the run is not finished and can go on, 1 if
    it is not and cannot.

    A ValueError raised by this package, which is about the user's input, is one line on the terminal. One from
    elsewhere keeps its traceback; so do all with FIBERPO_TRACEBACK=1. What several ranks have to say is said once.
    """
    try:
        main()
    except Stopped as stopped:
        leave()
        finish()
        sys.exit(NOT_FINISHED if stopped.can_go_on else 1)
    except SaidByFirstRank:
        sys.exit(1)
    except ValueError as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
        if os.environ.get("FIBERPO_TRACEBACK") or not raised_in.startswith("nemo_fiberpo"):
            raise
        sys.exit(1 if _was_said(text := f"error: {error}") else text)
    leave()


def _was_said(text: str) -> bool:
    """Whether another rank of the same launcher has said the same."""
    folder = os.environ.get(LAUNCHED)
    if folder is None:
        return False
    try:
        (Path(folder) / hashlib.sha256(text.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return True
    return False
