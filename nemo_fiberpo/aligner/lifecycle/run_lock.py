"""One job at a time in a run's directory: a lock that the kernel or the file server gives back when its holder dies.

`run.lock` in the directory is locked by fcntl (POSIX, `lockf`) for as long as the first rank lives. Such a lock belongs
to a process, so SIGKILL releases it and no forked helper keeps it; it is also lost when its process closes any other
descriptor of the file, so nothing else here opens it. What the file says is for the message and decides nothing alone.

With the package filelock, a helper that C code forks would keep the lock: its flock belongs to every process that has
the open file, and only forks by Python close that.

What is guaranteed: on a local file system, on NFS with a lock manager (every NFSv4) and on Lustre mounted with `flock`,
two jobs never train in one directory, on whatever nodes. With `local_lock` (NFS) or `localflock` (Lustre) that holds
between processes of one node only. A file system without locks is said in a warning and the run goes on. The lock of a
node that died with its job is the file server's to release: NFSv4 after its lease, 90 seconds by default. One that is
held for longer is being renewed, whatever SLURM says of the node: the holder lives, and may write.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

NAME = "run.lock"
# Seconds for which the lock of a job that may be dead is waited for: longer than the lease of NFSv4.
PATIENCE = 120.0
_TAKEN = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_held: dict[str, tuple[int, int]] = {}  # directory -> (process, descriptor), open until that process ends


def hold(run_dir: str | os.PathLike[str], patience: float = PATIENCE) -> None:
    """Lock a run's directory until this process ends. First rank; a second call does nothing.

    ValueError that names the directory and its holder if another process has it: at once if that one is alive on this
    node, else after `patience` seconds, in which the lock of a dead node lapses. ValueError that names the file and the
    errno where it cannot be made, locked or written. `preemption.Stopped` after `patience` seconds, with a printed
    line, where the holder is the same SLURM job before, which may be alive on a node that did not answer SLURM: the job
    is to try again.
    """
    directory, me = Path(run_dir), os.getpid()
    path = directory / NAME
    with _named(directory, "made"):
        directory.mkdir(parents=True, exist_ok=True)
        key = str(directory.resolve())
    if _held.get(key, (0, 0))[0] == me:
        return
    with _named(path, "opened"):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if _locked(file, path, patience):
            with _named(path, "written"):
                os.pwrite(file, text := (json.dumps(_myself()) + "\n").encode(), 0)
                os.ftruncate(file, len(text))
                os.fsync(file)
    except BaseException:
        with suppress(OSError):
            os.close(file)  # ends the lock as well
        raise
    _held[key] = me, file


@contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    """OSErrors as ValueErrors that say what could not be done."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"run_dir: {path} cannot be {what}: {error.strerror} (errno {error.errno})") from error


def _locked(file: int, path: Path, patience: float) -> bool:
    """Wait for the lock. False where the file system has none, ValueError or Stopped where another process keeps it."""
    until, told = time.monotonic() + patience, False
    while not (answer := _try_to_lock(file, path)):
        holder = _holder(file)
        before = _is_this_job_before(holder)
        if time.monotonic() >= until or (_is_alive_here(holder) and not before):
            break
        if not told and patience >= 1:
            print(f"run_dir: {path} is locked by {_words(holder)}: waiting up to {patience:.0f} s", flush=True)
            told = True
        time.sleep(min(0.5, max(0.01, patience / 10)))
    else:
        return answer == "locked"
    if before:
        from nemo_fiberpo.aligner.lifecycle.preemption import NOT_FINISHED, Stopped

        print(
            f"run_dir: {path} is still locked by {_words(holder)}, an earlier start of this job: that one may be "
            f"alive. Ending with status {NOT_FINISHED}, to be started again later",
            flush=True,
        )
        raise Stopped
    raise ValueError(
        f"run_dir: {path.parent} is in use by {_words(holder)}; wait for its end, or give a run_dir of its own. If "
        f"that process is certainly dead, remove {path}"
    )


def _try_to_lock(file: int, path: Path) -> Literal["locked", "no locks", ""]:
    """Once; "" where another process has the lock."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return ""
        if error.errno not in _UNSUPPORTED:
            raise ValueError(f"run_dir: {path} cannot be locked: {error.strerror} (errno {error.errno})") from error
        print(
            f"warning: run_dir: the file system of {path} has no locks ({error.strerror}); nothing keeps a second job "
            "from training in the same directory",
            flush=True,
        )
        return "no locks"
    return "locked"


def _myself() -> dict[str, Any]:
    """`job` is that of the whole array where this is a `task` of one."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID"),
        "task": int(task) if task else None,
        "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _holder(file: int) -> dict[str, Any]:
    """What the holder wrote down; {} where it has not yet, or where that cannot be read."""
    try:
        found = json.loads(os.pread(file, 4096, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive_here(holder: dict[str, Any]) -> bool:
    """Whether it is another process of this node. One with the id of this process is not of this node: containers that
    share a hostname all have a process 1."""
    if holder.get("host") != socket.gethostname() or holder.get("pid") == os.getpid():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except (ProcessLookupError, KeyError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _is_this_job_before(holder: dict[str, Any]) -> bool:
    """Whether it is an earlier start of this SLURM job, or an earlier task of the same array."""
    mine = _myself()
    try:
        starts = [(int(one["task"] or 0), int(one["restart"])) for one in (holder, mine)]
    except (KeyError, TypeError, ValueError):
        return False
    return mine["job"] is not None and holder.get("job") == mine["job"] and starts[0] < starts[1]


def _words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    task = "" if holder.get("task") is None else f"_{holder['task']}"
    job = f", SLURM job {holder['job']}{task}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}, since {holder.get('since')}"
