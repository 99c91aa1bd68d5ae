"""One job at a time in a run's directory: a lock that the kernel or the file server gives back when its holder dies.

`run.lock` in the directory is locked by fcntl (POSIX, `lockf`) for as long as the first rank lives. Such a lock belongs
to a process, so SIGKILL releases it and no forked helper keeps it; it is also lost when its process closes any other
descriptor of the file, so nothing else here opens it. What the file says is for the message and decides nothing alone.

What is guaranteed: on a local file system, on NFS with a lock manager (every NFSv4) and on Lustre mounted with `flock`,
two jobs never train in one directory, on whatever nodes. With `local_lock` (NFS) or `localflock` (Lustre) that holds
between processes of one node only. A file system without locks is said in a warning and the run goes on. The lock of a
node that died with its job is the file server's to release: NFSv4 after its lease, 90 seconds by default.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import Any

NAME = "run.lock"
# Seconds for which the lock of a job that may be dead is waited for: longer than the lease of NFSv4.
PATIENCE = 120.0
_TAKEN = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_held: dict[str, tuple[int, int]] = {}  # directory -> (process, descriptor), open until that process ends


def hold(run_dir: str | os.PathLike[str], patience: float = PATIENCE) -> None:
    """Lock a run's directory until this process ends. First rank; a second call does nothing.

    ValueError that names the directory and its holder if another process has it: at once if that one is alive on this
    node, else after `patience` seconds, in which the lock of a dead node lapses. Where the holder is the same SLURM job
    before it was requeued, SLURM has seen its end, and the run goes on without the lock, with a warning.
    """
    directory = Path(run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    key, me = str(directory.resolve()), os.getpid()
    if _held.get(key, (0, 0))[0] == me:
        return
    path = directory / NAME
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ValueError(f"run_dir: {path} cannot be opened: {error.strerror} (errno {error.errno})") from error
    _held[key] = me, file
    try:
        if not _locked(file, path, patience):
            return
    except ValueError:
        del _held[key]
        os.close(file)
        raise
    os.pwrite(file, text := (json.dumps(_myself()) + "\n").encode(), 0)
    os.ftruncate(file, len(text))
    os.fsync(file)


def _locked(file: int, path: Path, patience: float) -> bool:
    """Wait for the lock. False where the run is to go on without it, ValueError where it is not."""
    until, told = time.monotonic() + patience, False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                print(
                    f"warning: run_dir: the file system of {path} has no locks ({error.strerror}); nothing keeps a "
                    "second job from training in the same directory",
                    flush=True,
                )
                return False
            if error.errno not in _TAKEN:
                why = f"{error.strerror} (errno {error.errno})"
                raise ValueError(f"run_dir: {path} cannot be locked: {why}") from error
        holder = _holder(file)
        if _is_alive_here(holder):
            break
        if time.monotonic() >= until:
            if _is_this_job_before(holder):
                print(f"warning: run_dir: {path} is still locked by {_words(holder)}, which was requeued", flush=True)
                return False
            break
        if not told and patience >= 1:
            print(f"run_dir: {path} is locked by {_words(holder)}: waiting up to {patience:.0f} s", flush=True)
            told = True
        time.sleep(min(0.5, max(0.01, patience / 10)))
    raise ValueError(
        f"run_dir: {path.parent} is in use by {_words(holder)}; wait for its end, or give a run_dir of its own. If "
        f"that process is certainly dead, remove {path}"
    )


def _myself() -> dict[str, Any]:
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID"),
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
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_this_job_before(holder: dict[str, Any]) -> bool:
    mine, restart = _myself(), holder.get("restart")
    return mine["job"] is not None and holder.get("job") == mine["job"] and restart in range(mine["restart"])


def _words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    job = f", SLURM job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}, since {holder.get('since')}"
