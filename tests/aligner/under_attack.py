"""A pool of graders in a process of its own, whose kernel grants less, or that another user runs:

    python -m tests.aligner.under_attack USER REFUSED... < answers.json

USER is a uid, or "same"; REFUSED are system calls that fail with EPERM. Standard input has {"answers": [[text, ...],
...]}, a list per call of `grade`; standard output {"isolation": text, "outcomes": [[[score, failure, reason], ...],
...], "left": processes of that user that were not there before, "scratch": folders that are left}.
"""

from __future__ import annotations

import ctypes
import glob
import json
import os
import sys
from pathlib import Path

from nemo_fiberpo.aligner import grader_isolation as isolation
from nemo_fiberpo.aligner.grader_pool import GraderPool


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


def processes() -> set[tuple[int, str]]:
    """Of everybody but this one: process id and command."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    found.add((int(folder.name), (folder / "cmdline").read_text().replace("\0", " ").strip()))
            except OSError:
                pass
    return found


def main() -> None:
    user, *refused = sys.argv[1:]
    calls = json.load(sys.stdin)["answers"]
    if user != "same":
        become(int(user))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(isolation._SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if refused:
        assert isolation.refuse_calls(libc, *refused)
    sys.path.insert(0, str(Path(__file__).parent))
    with GraderPool({"bad": "bad_graders:grade"}, [], workers=1, time_limit=float(os.environ["LIMIT"])) as pool:
        in_force = pool.wait_until_ready()
        ours = {pool._slots[0].process.pid, pool._slots[0].pid}
        before = processes()
        outcomes = [pool.grade([("bad", {"answer": "7"}, text) for text in texts]) for texts in calls]
        mine = f"SECRET={os.environ['SECRET']}"
        left = [command for pid, command in processes() - before if pid not in ours and os.environ["MARK"] in command]
    assert mine
    result = {
        "isolation": in_force,
        "outcomes": [[[one.score, one.failure, one.reason] for one in call] for call in outcomes],
        "left": left,
        "scratch": glob.glob("/tmp/fiberpo-grader-*") if user != "same" else [],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
