"""A pool of warm grading processes: a response that hangs, crashes or takes over a grader affects only itself.

The other end is `process.py`. Responses are sent in chunks; results come back one by one, each with its number and its
worker's token. The worker enforces the time limit. Grading processes share no CUDA context, process group or open file
with the trainer, and none outlives it, even after `kill -9`.

Pebble and multiprocessing's pools return results as pickles, by which a process that ran a policy's code could run code
in the trainer, and they do not support namespaces.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from nemo_fiberpo.graders.signals import signals_blocked

Failure = Literal["timeout", "memory", "crash"]
# grader's name, the prompt's grader fields, the response (or the line of data to check, see `process`)
Item = tuple[str, dict[str, Any], str | dict[str, Any]]

_KEEP_ENV = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "COVERAGE_PROCESS_START")
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_SCRIPT = Path(__file__).with_name("process.py")
_CHUNK = 256  # responses per message: amortizes a fork and the pipe, and still balances the workers
_DEATHS = 3  # deaths in a row, at its start or while grading, after which a worker is given up
_PATIENCE = 120.0  # seconds beyond all time limits after which a silent worker is replaced
_CLOSING = 5.0  # seconds for a worker to end its processes


@dataclass(frozen=True)
class Outcome:
    """The outcome of one response: its score, or why it has none."""

    score: float
    failure: Failure | None = None
    reason: str = ""


class _Slot:
    """One supervisor and its worker, seen from the pool."""

    def __init__(self, setup: dict[str, Any], start_limit: float):
        inbox, to_worker = os.pipe()
        from_worker, outbox = os.pipe()
        env = {name: os.environ[name] for name in _KEEP_ENV if name in os.environ} | _ONE_THREAD
        self.scratch = tempfile.mkdtemp(prefix="fiberpo-grader-")
        with signals_blocked():  # a scheduler signals every process of a job; graders ignore it
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT), str(inbox), str(outbox), str(os.getpid())],
                pass_fds=(inbox, outbox),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=env | {"CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,
            )
        os.close(inbox)
        os.close(outbox)
        self.inbox = Connection(from_worker, writable=False)
        self.to_worker = to_worker
        os.set_blocking(to_worker, False)  # a worker that does not read must not block us
        self.token = secrets.token_hex(8)
        self.pid: int | None = None  # of the worker
        self.isolation: str | None = None  # in force; None until the worker is ready
        self.unwritten = memoryview(b"")
        self.chunk: deque[int] = deque()  # items sent and not yet answered; the worker is on the first
        self.taken = False  # the worker has read the chunk
        self.deaths = 0
        self.deadline = time.monotonic() + start_limit
        self.send(setup | {"token": self.token, "scratch": self.scratch})

    def send(self, message: Any) -> bool:
        """Send a message in the framing of `Connection.send_bytes`; `flush` sends what does not fit the pipe. False if
        the worker is gone."""
        data = json.dumps(message).encode()
        self.unwritten = memoryview(struct.pack("!i", len(data)) + data)
        return self.flush()

    def flush(self) -> bool:
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[os.write(self.to_worker, self.unwritten) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            return False
        return True

    def close(self) -> None:
        """Give a reading worker time to end its processes, then kill it."""
        self.inbox.close()
        os.close(self.to_worker)
        try:
            self.process.wait(_CLOSING if self.isolation is not None else 0)
        except subprocess.TimeoutExpired:
            pass
        self.process.kill()  # its worker ends with it, see `die_with_parent`
        self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)


def _close_slots(slots: list[_Slot], owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child of the trainer, which has copies of these objects
        while slots:
            slots.pop().close()


class GraderPool:
    """`workers` grading workers, started at once and kept.

    `graders` maps a name to "package.module:function" or to a name of `builtin.py`; `samples` has one (name, grader
    fields) of each kind, for warming up. `time_limit` is wall-clock seconds per response, `memory_limit_mib` bounds a
    grading process's address space. Construct it in a thread that lives as long as the pool: Linux ends a child when
    the thread that started it ends. `grade` is not reentrant.
    """

    def __init__(
        self,
        graders: dict[str, str],
        samples: Sequence[tuple[str, dict[str, Any]]],
        workers: int = 1,
        time_limit: float = 2.0,
        memory_limit_mib: int = 4096,
        start_limit: float = 120.0,
    ):
        for field, value in (
            ("workers", workers),
            ("time_limit", time_limit),
            ("memory_limit_mib", memory_limit_mib),
            ("start_limit", start_limit),
        ):
            if not 0 < value < float("inf"):
                raise ValueError(f"{field} is {value}; it must be positive and finite")
        self.time_limit, self.start_limit = time_limit, start_limit
        self._setup = {
            "sys_path": [str(Path(entry).absolute()) if entry else os.getcwd() for entry in sys.path],
            "graders": graders,
            "samples": list(samples),
            "memory_limit": int(memory_limit_mib) * 2**20,
            "time_limit": time_limit,
        }
        self._slots: list[_Slot] = []
        self._finalizer = weakref.finalize(self, _close_slots, self._slots, os.getpid())
        for _ in range(int(workers)):
            self._slots.append(_Slot(self._setup, start_limit))

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End every grading process; may be called twice."""
        self._finalizer()

    def wait_until_ready(self) -> str:
        """Wait until every worker can grade; returns the isolation in force, see `isolation`. RuntimeError if a grader
        cannot be loaded."""
        try:
            while self._finalizer.alive and any(slot.isolation is None for slot in self._slots):
                self._collect(deque(), [])
        except BaseException:
            self.close()
            raise
        return "; or ".join(sorted({slot.isolation or "" for slot in self._slots}))

    def grade(self, items: Sequence[Item]) -> list[Outcome]:
        """The outcome of each item, in order.

        RuntimeError if the graders cannot be loaded, or if a worker dies repeatedly without a result; any exception
        closes the pool.
        """
        if not self._finalizer.alive:
            raise RuntimeError("the grading pool is closed")
        outcomes: list[Outcome | None] = [None] * len(items)
        todo = deque(range(len(items)))
        try:
            while todo or any(slot.chunk for slot in self._slots):
                self._distribute(items, todo, outcomes)
                self._collect(todo, outcomes)
        except BaseException:
            self.close()  # a later call would get the results of chunks in flight
            raise
        return [outcome for outcome in outcomes if outcome is not None]

    def _distribute(self, items: Sequence[Item], todo: deque[int], outcomes: list[Outcome | None]) -> None:
        size = max(1, min(_CHUNK, -(-len(items) // len(self._slots))))
        for number, slot in enumerate(self._slots):
            if not todo or slot.isolation is None or slot.chunk:
                continue
            slot.chunk.extend(todo.popleft() for _ in range(min(size, len(todo))))
            slot.taken = False
            slot.deadline = time.monotonic() + self._patience()
            if not slot.send([[index, *items[index]] for index in slot.chunk]):
                self._replace(number, todo, outcomes, "it was killed")

    def _patience(self) -> float:
        return _PATIENCE + 4 * self.time_limit

    def _collect(self, todo: deque[int], outcomes: list[Outcome | None]) -> None:
        """Wait for a message, room in a pipe or a deadline, and handle it."""
        wait = min(slot.deadline for slot in self._slots) - time.monotonic()
        with selectors.DefaultSelector() as selector:
            for slot in self._slots:
                selector.register(slot.inbox, selectors.EVENT_READ)
                if slot.unwritten:
                    selector.register(slot.to_worker, selectors.EVENT_WRITE)
            selector.select(None if wait == float("inf") else max(wait, 0.0))
        for number, slot in enumerate(self._slots):
            if slot.inbox.poll():  # even after the deadline: a result that has arrived counts
                self._receive(number, todo, outcomes)
            elif slot.unwritten and not slot.flush():
                self._replace(number, todo, outcomes, "it was killed")
            elif time.monotonic() >= slot.deadline:
                self._expire(number, todo, outcomes)

    def _receive(self, number: int, todo: deque[int], outcomes: list[Outcome | None]) -> None:
        """Handle all messages that this slot has ready."""
        slot = self._slots[number]
        while True:
            try:
                if not slot.inbox.poll():
                    return
                message = json.loads(slot.inbox.recv_bytes())
            except (EOFError, ConnectionError):
                self._replace(number, todo, outcomes, "its supervisor was killed")
                return
            if message.pop("token") != slot.token:
                continue
            if "pid" in message:
                slot.pid = message["pid"]
            elif "ready" in message:
                slot.isolation, slot.deadline = message["ready"], float("inf")
            elif "chunk" in message:
                slot.taken, slot.deadline = True, time.monotonic() + self._patience()
            elif "refused" in message:
                raise RuntimeError(f"a grader cannot be used: {message['refused']}")
            elif "died" in message:
                self._replace(number, todo, outcomes, message["died"])
                return
            else:
                self._answer(slot, outcomes, **message)

    def _answer(
        self,
        slot: _Slot,
        outcomes: list[Outcome | None],
        item: int,
        score: float = 0.0,
        failure: Failure | None = None,
        reason: str = "",
    ) -> None:
        if not slot.chunk or item != slot.chunk[0]:
            raise RuntimeError(f"a grading worker sent a score of response {item}, which it was not given")
        outcomes[slot.chunk.popleft()] = Outcome(score, failure, reason)
        slot.deaths = 0
        slot.deadline = time.monotonic() + self._patience() if slot.chunk else float("inf")

    def _replace(self, number: int, todo: deque[int], outcomes: list[Outcome | None], cause: str) -> None:
        """Replace a dead worker. The response it was grading counts as a crash; the rest of its chunk is requeued. The
        death of an idle worker, as by a signal, counts against no response."""
        old = self._slots[number]
        deaths = old.deaths
        if old.chunk and old.taken:
            outcomes[old.chunk.popleft()] = Outcome(0.0, "crash", f"the grading worker died: {cause}")
            deaths = 0
        elif old.chunk or old.isolation is None:
            deaths += 1
            if deaths >= _DEATHS:
                raise RuntimeError(f"grading workers die before they grade ({cause}); is memory_limit_mib too small?")
        todo.extendleft(reversed(old.chunk))
        old.chunk.clear()
        self._slots[number] = _Slot(self._setup, self.start_limit)
        self._slots[number].deaths = deaths
        old.close()

    def _expire(self, number: int, todo: deque[int], outcomes: list[Outcome | None]) -> None:
        slot = self._slots[number]
        if slot.isolation is None:
            raise RuntimeError(f"the graders were not ready within start_limit = {self.start_limit:g} s")
        os.kill(slot.process.pid, signal.SIGKILL)  # else closing would wait for it
        self._replace(number, todo, outcomes, "it did not answer")
