"""Pools of graders in processes of their own, whose kernel grants less, or that another user runs.

    python -m tests.support.under_attack

A line of standard input asks for one: {"user": a uid, or null for this one, "refused": system calls that fail with
EPERM, "mark": text, "limit": seconds, "answers": [[text, ...], ...], a list per call of `grade`}. The line of standard
output that answers it has {"isolation": text, "outcomes": [[[score, failure, reason], ...], ...], "left": commands with
the mark in them that still run, "scratch": folders that are left}. All are forked from one process, since importing
takes longer than grading.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

from nemo_fiberpo.graders import isolation as isolation
from nemo_fiberpo.graders.pool import GraderPool


def become(uid: int) -> None:
    """That user, who can read what root imports: folders that only root can pass are covered here."""
    jail = isolation.Isolation("/tmp", 0)
    jail.namespaces = ("mount",)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(isolation._NEWNS) == 0
    libc.mount(None, b"/", None, isolation._MS_REC | isolation._MS_PRIVATE, None)
    jail._choose_uid()
    for folder in jail._covered:
        jail._cover(libc, folder)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def commands(mark: str) -> list[str]:
    """Of the processes, other than zombies, with the mark in their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_text().replace("\0", " ")
                if mark in command and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(command)
    return found


def answer(request: dict[str, Any]) -> None:
    if request["user"] is not None:
        become(request["user"])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(isolation._SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if request["refused"]:
        assert isolation.refuse_calls(libc, *request["refused"])
    with GraderPool({"bad": "bad_graders:grade"}, [], time_limit=request["limit"]) as pool:
        in_force = pool.wait_until_ready()
        outcomes = [pool.grade([("bad", {"answer": "7"}, text) for text in call]) for call in request["answers"]]
        left = commands(request["mark"])
        scratch = [slot.scratch for slot in pool._slots]
    result = {
        "isolation": in_force,
        "outcomes": [[[one.score, one.failure, one.reason] for one in call] for call in outcomes],
        "left": left,
        "scratch": [folder for folder in scratch if os.path.exists(folder)],
    }
    print(json.dumps(result), flush=True)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            answer(json.loads(line))
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            print("{}", flush=True)


if __name__ == "__main__":
    main()
