"""The worker and its grading processes: see `process.py`, which forks the worker."""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from . import builtin, checks, signals
from .isolation import Isolation

_OUT_OF_MEMORY = 86  # exit code of a grading process at its memory limit (arbitrary)
TEXT_LIMIT = 800  # characters; keeps a message below PIPE_BUF (4096 bytes) even when escaped
_LINE_LIMIT = 1 << 16  # bytes of a line from a grading process
_START_LIMIT = 60.0  # seconds for a grading process to start, on a busy machine
_SPARE = 1 << 20  # bytes that a grading process must have free at its start
_CHECK = 4  # gradings per check of a line

Item = tuple[int, str, dict[str, Any], Any]


# the grading process


def _begin(results: int, jail: Isolation, worker: int) -> None:
    """Keep only the pipe, and confine this process."""
    first = 3
    for kept in sorted({results, jail.landlock or results}):
        os.closerange(first, kept)
        first = kept + 1
    os.closerange(first, jail.descriptors)
    os.setsid()
    jail.confine()
    signals.die_with_parent(worker)  # last: a change of the uid would undo it


def _grade_run(run: list[Item], loaded: dict[str, Any], results: int) -> None:
    grading = os.getpid()
    os.write(results, b"[]\n")
    for number, name, record, response in run:
        verdict = _grade(name, loaded[name], record, response)
        if os.getpid() != grading:
            os._exit(0)  # a copy that the response forked
        os.write(results, json.dumps([number, verdict]).encode() + b"\n")


def _grade(name: str, grader: Any, record: dict[str, Any], response: Any) -> dict[str, Any]:
    try:
        if isinstance(response, dict):
            found = checks.complaint(grader, name, record, **response)
            return {"error": found[:TEXT_LIMIT]} if found else {"score": 1.0}
        score = float(grader(record, response))
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except BaseException as error:  # even sys.exit in a grader costs only one response
        return {"error": f"{type(error).__name__}: {error}"[:TEXT_LIMIT]}
    if not math.isfinite(score):
        return {"error": f"the score is {score}, not a finite number"}
    return {"score": score}


# the worker


@dataclass
class _Grading:
    """A grading process as seen by its worker: the lines it writes, each within its time limit."""

    pid: int
    results: int
    buffer: bytes = b""
    cause: str = ""  # why there are no more lines

    def lines(self, limits: Iterator[float], pool: int) -> Iterator[Any]:
        """Each line, waited for up to the next limit. Ends with `cause` set; EOFError if the pool is gone."""
        poll = select.poll()
        poll.register(self.results, select.POLLIN)
        poll.register(pool, 0)  # only to notice that the other end was closed
        for limit in limits:
            deadline = time.monotonic() + limit
            while b"\n" not in self.buffer:
                ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1e3))
                if pool in ready:
                    raise EOFError
                if not ready:
                    self.cause = "timeout"
                    return
                data = os.read(self.results, _LINE_LIMIT)
                self.buffer += data
                if not data or len(self.buffer) > _LINE_LIMIT:
                    self.cause = "ended" if not data else "wrote too much"
                    return
            line, _, self.buffer = self.buffer.partition(b"\n")
            yield json.loads(line)


@dataclass
class Worker:
    inbox: Connection
    outbox: Connection
    loaded: dict[str, Any]
    jail: Isolation
    token: str
    time_limit: float

    def send(self, message: dict[str, Any]) -> None:
        send(self.outbox, self.token, message)

    def serve(self) -> None:
        """Grade chunks until the pool closes its end."""
        self.send({"ready": self.probe()})
        while True:
            chunk = json.loads(self.inbox.recv_bytes())
            self.send({"chunk": len(chunk)})  # the pipe is empty now: a successor starts clean
            for run in _runs(chunk, self.loaded):
                while run:
                    run = run[self.grade(run) :]

    def probe(self) -> str:
        """The isolation in force, tested in a short-lived process. RuntimeError if confinement fails."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                self.jail.confine()
                bytearray(_SPARE)
                os.write(writer, "; ".join(self.jail.in_force).encode())
                os._exit(0)
            except MemoryError:
                os.write(writer, b"out of memory; is memory_limit_mib too small?")
                os._exit(1)
            except BaseException as error:
                os.write(writer, f"{type(error).__name__}: {error}".encode()[:TEXT_LIMIT])
                os._exit(1)
        os.close(writer)
        with open(reader) as file:
            text = file.read()
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError(f"a grading process cannot be confined: {text}")
        return text or "none but a process of its own"

    def grade(self, run: list[Item]) -> int:
        """Grade a run of responses in one grading process and send the results; returns how many are done. All
        processes started have ended."""
        reader, writer = os.pipe()
        worker = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                _begin(writer, self.jail, worker)
                _grade_run(run, self.loaded, writer)
            finally:
                os._exit(0)
        os.close(writer)
        grading = _Grading(pid, reader)
        try:
            done = self.relay(grading, run)
        finally:
            os.close(reader)
            status = self.end(pid, kill=grading.cause != "ended")
        if done < len(run):
            self.send({"item": run[done][0]} | self.blame(grading, status, run[done]))
            done += 1
        self.clean()
        return done

    def relay(self, grading: _Grading, run: list[Item]) -> int:
        """Forward the verdicts to the pool; returns their number."""
        limits = [_START_LIMIT, *(self.limit(item) for item in run)]
        done = -1
        try:
            for line in grading.lines(iter(limits), self.inbox.fileno()):
                if done >= 0:
                    number, verdict = line
                    if number != run[done][0]:
                        raise ValueError
                    self.send({"item": number} | _message_of(verdict))
                done += 1
        except (ValueError, TypeError, AttributeError, RecursionError):
            grading.cause = "wrote something else than its verdict"
        return max(done, 0)

    def limit(self, item: Item) -> float:
        return self.time_limit * (_CHECK if isinstance(item[3], dict) else 1)

    def blame(self, grading: _Grading, status: int, item: Item) -> dict[str, Any]:
        if grading.cause == "timeout":
            return {"failure": "timeout", "reason": f"no score within {self.limit(item):g} s"}
        if grading.cause == "ended" and os.waitstatus_to_exitcode(status) == _OUT_OF_MEMORY:
            return {"failure": "memory", "reason": f"the grading process died: {cause_of(status)}"}
        reason = f"died: {cause_of(status)}" if grading.cause == "ended" else grading.cause
        return {"failure": "crash", "reason": f"the grading process {reason}"}

    def end(self, pid: int, kill: bool) -> int:
        """Exit status of the grading process, once every process that it started has ended too."""
        status = None
        if not kill:
            status = _status_within(pid, 1.0)
        while True:
            try:
                _kill_everything(pid if status is None else None)
                ended, code = os.waitpid(-1, 0)
            except ChildProcessError:
                return status if status is not None else signal.SIGKILL
            if ended == pid:
                status = code

    def clean(self) -> None:
        """Empty the scratch folder."""
        with os.scandir(self.jail.scratch) as entries:
            for entry in list(entries):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)


def _message_of(verdict: dict[str, Any]) -> dict[str, Any]:
    """A verdict as a message to the pool; ValueError if malformed."""
    if set(verdict) == {"score"} and isinstance(verdict["score"], float) and math.isfinite(verdict["score"]):
        return verdict
    if set(verdict) == {"error"} and isinstance(verdict["error"], str):
        return {"failure": "crash", "reason": verdict["error"][:TEXT_LIMIT]}
    raise ValueError


def _runs(chunk: list[Item], loaded: dict[str, Any]) -> Iterator[list[Item]]:
    """The chunk in runs, each for one process: a response that may run as code on its own, others together."""
    run: list[Item] = []
    for item in chunk:
        if not isinstance(item[3], dict) and builtin.runs_answers(loaded[item[1]], item[2]):
            if run:
                yield run
            yield [item]
            run = []
        else:
            run.append(item)
    if run:
        yield run


def _kill_everything(grading: int | None) -> None:
    """Kill all descendants of this process: its PID namespace if it is init, else its children and theirs (orphans are
    reparented to it)."""
    if os.getpid() == 1:
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return
    found: set[int] = set() if grading is None else {grading}
    level = [os.getpid()]
    while level:
        below = [child for pid in level for child in _children(pid)]
        level = [pid for pid in below if pid not in found]
        found.update(level)
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _status_within(pid: int, seconds: float) -> int | None:
    """Exit status of a child that has closed its pipe; None if it is still alive after that time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.001)
    return None


def send(outbox: Connection, token: str, message: dict[str, Any]) -> None:
    outbox.send_bytes(json.dumps({"token": token} | message).encode())


def cause_of(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == _OUT_OF_MEMORY:
        return "out of memory (its limit, or the machine's)"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
