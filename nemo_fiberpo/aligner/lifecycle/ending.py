"""How a process of a run ends: its exit status, and what it prints."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from nemo_fiberpo.aligner.lifecycle.preemption import LAUNCHED, NOT_FINISHED, Stopped, finish


class FirstRankError(ValueError):
    """An error of the first rank, raised on another rank; the first rank prints it."""


def destroy_process_groups() -> None:
    """Destroy the process groups.

    A process that leaves this to interpreter shutdown can abort: a gloo thread may still hold the last tensor of a
    collective, and freeing it needs the interpreter.
    """
    distributed = sys.modules.get("torch.distributed")  # a run that ends early may not have imported it
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main, destroy its process groups, and exit: 75 if the run can be resumed, 1 if it failed.

    A ValueError raised by this package is about the user's input: it is printed as one line, once for all ranks, and
    repeated at the end of torchrun's report. Others keep their traceback, as do all with FIBERPO_TRACEBACK=1.
    """
    try:
        main()
    except Stopped as stopped:
        destroy_process_groups()
        finish()
        sys.exit(NOT_FINISHED if stopped.resumable else 1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except FirstRankError:
        sys.exit(1)
    except ValueError as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
        if os.environ.get("FIBERPO_TRACEBACK") or not raised_in.startswith("nemo_fiberpo"):
            raise
        _report_to_torchrun(f"error: {error}")
        sys.exit(1 if _was_printed(text := f"error: {error}") else text)
    destroy_process_groups()


def _was_printed(text: str) -> bool:
    """Whether another rank of the same launcher has already printed this."""
    folder = os.environ.get(LAUNCHED)
    if folder is None:
        return False
    try:
        (Path(folder) / hashlib.sha256(text.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


def _report_to_torchrun(message: str) -> None:
    """End torchrun's report, which comes after the output of all ranks, with this message."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        report = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": report}))
