"""One job at a time in a run's directory: a lock that the kernel or the file server releases when its holder dies.

`run.lock` is locked with fcntl (POSIX `lockf`) while the first rank lives. SIGKILL releases the lock, and forked
helpers do not inherit it. It is also lost when the process closes any other descriptor of the file, so nothing else
here opens it. The package filelock uses flock, which a helper forked by C code would keep. The content of the file is
informative only.

Guarantee: on a local file system, on NFS with a lock manager (every NFSv4) and on Lustre mounted with `flock`, two jobs
never train in one directory. With `local_lock` (NFS) or `localflock` (Lustre) this holds within a node. A file system
without locks gets a warning. The file server releases the lock of a dead node: NFSv4 after its lease, 90 seconds by
default. A lock held for longer has a living holder, whatever SLURM reports.
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
# Seconds to wait for the lock of a job that may be dead: longer than the lease of NFSv4.
PATIENCE = 120.0
_TAKEN = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_held: dict[str, tuple[int, int]] = {}  # directory -> (process, descriptor), open until that process ends


class HeldByEarlierStart(Exception):
    """An earlier start of the same SLURM job has the lock; the job should try again later."""


def hold(run_dir: str | os.PathLike[str], patience: float = PATIENCE) -> None:
    """Lock a run's directory until this process ends. First rank; a second call does nothing.

    ValueError naming the directory and the holder if another process has the lock: at once if it is alive on this node,
    else after `patience` seconds, in which the lock of a dead node expires. ValueError with the errno if the file
    cannot be created, locked or written. HeldByEarlierStart after `patience` seconds if the holder is an earlier start
    of the same SLURM job, which may be alive on a node that lost contact.
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
            os.close(file)  # releases the lock too
        raise
    _held[key] = me, file


@contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    """Turn an OSError into a ValueError that names what could not be done."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"run_dir: {path} cannot be {what}: {error.strerror} (errno {error.errno})") from error


def _locked(file: int, path: Path, patience: float) -> bool:
    """Wait for the lock. False if the file system has none; an error, as `hold`, if another process keeps it."""
    until, announced = time.monotonic() + patience, False
    while not (answer := _try_to_lock(file, path)):
        holder = _holder(file)
        before = _is_this_job_before(holder)
        if time.monotonic() >= until or (_is_alive_here(holder) and not before):
            break
        if not announced and patience >= 1:
            print(f"run_dir: {path} is locked by {_describe(holder)}: waiting up to {patience:.0f} s", flush=True)
            announced = True
        time.sleep(min(0.5, max(0.01, patience / 10)))
    else:
        return answer == "locked"
    if before:
        raise HeldByEarlierStart(
            f"run_dir: {path} is still locked by {_describe(holder)}, an earlier start of this job, which may be alive"
        )
    raise ValueError(
        f"run_dir: {path.parent} is in use by {_describe(holder)}; wait for it to end, or use another run_dir. If "
        f"that process is certainly dead, remove {path}"
    )


def _try_to_lock(file: int, path: Path) -> Literal["locked", "no locks", ""]:
    """One attempt; "" if another process has the lock."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return ""
        if error.errno not in _UNSUPPORTED:
            raise ValueError(f"run_dir: {path} cannot be locked: {error.strerror} (errno {error.errno})") from error
        print(
            f"warning: run_dir: the file system of {path} has no locks ({error.strerror}); nothing prevents a second "
            "job from training in the same directory",
            flush=True,
        )
        return "no locks"
    return "locked"


def _myself() -> dict[str, Any]:
    """This process; `job` is the id of the whole array if it is a `task` of one."""
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
    """What the holder wrote; {} if it has not yet, or if that is unreadable."""
    try:
        found = json.loads(os.pread(file, 4096, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive_here(holder: dict[str, Any]) -> bool:
    """Whether it is another living process of this node. One with our own pid is on another node: containers that share
    a hostname all have a process 1."""
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


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    task = "" if holder.get("task") is None else f"_{holder['task']}"
    job = f", SLURM job {holder['job']}{task}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}, since {holder.get('since')}"
