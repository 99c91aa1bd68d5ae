"""Processes of this machine, as /proc shows them, and commands that leave none behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

MARK = "FIBERPO_STARTED_BY_TEST"


def processes() -> dict[int, tuple[int, str]]:
    """Parent and command line of every process that is not a zombie."""
    found = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(folder.name)
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[pid] = int(parent), (folder / "cmdline").read_text().replace("\0", " ").strip()
    return found


def variables_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty once it has ended."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def with_descendants(pids: set[int]) -> set[int]:
    """The processes and all that descend from them."""
    table, out = processes(), set(pids)
    while True:
        more = {pid for pid, (parent, _) in table.items() if parent in out} - out
        if not more:
            return out & set(table)
        out |= more


def kill(pids: Iterable[int], signum: int = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


@contextlib.contextmanager
def started(command: list[Any], env: Mapping[str, str], **options: Any) -> Iterator[subprocess.Popen]:
    """The command, running. At the end every process of it is killed, found by a variable of its environment.

    Neither its process group nor its descendants are all: torchrun's workers have groups of their own, and a process
    whose parent has ended descends from it no more.
    """
    mark = uuid.uuid4().hex
    with subprocess.Popen(command, env={**env, MARK: mark}, **options) as process:
        try:
            yield process
        finally:
            # Again until none is left: one of them may be starting another.
            while left := [pid for pid in processes() if variables_of(pid).get(MARK) == mark]:
                kill(left)
                time.sleep(0.01)
