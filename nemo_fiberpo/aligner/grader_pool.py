"""A pool of warm grading processes that can be killed: an answer that hangs or crashes a grader costs itself alone.

The other end is `graders.py`. Answers travel in chunks and come back one by one, so each has its own time limit: the
clock of an answer starts when the answer before it came back. No CUDA context, process group or open file of the
trainer reaches a grading process, and none outlives the trainer, even after `kill -9`.
"""

from __future__ import annotations

import json
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from nemo_fiberpo.aligner.preemption import held_back

Failure = Literal["timeout", "crash"]
Item = tuple[str, dict[str, Any], str]  # grader's name, the prompt's grader fields, the response

_KEEP_ENV = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "COVERAGE_PROCESS_START")
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_SCRIPT = Path(__file__).with_name("graders.py")
_CHUNK = 64  # answers a message; large enough to hide the pipe, small enough to share among workers
_IDLE_DEATHS = 3  # a worker that dies this often in a row without an answer in hand will not get better


@dataclass(frozen=True)
class Outcome:
    """What became of one answer: its score, or why it has none."""

    score: float
    failure: Failure | None = None
    reason: str = ""


class _Slot:
    """One supervisor and its current worker, seen from the pool."""

    def __init__(self, setup: bytes):
        inbox, to_worker = os.pipe()
        from_worker, outbox = os.pipe()
        env = {name: os.environ[name] for name in _KEEP_ENV if name in os.environ} | _ONE_THREAD
        with held_back():  # a scheduler signals every process of a job; the grading process lets it pass
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
        self.outbox = Connection(to_worker, readable=False)
        self.pid: int | None = None  # of the worker; None while there is none to send to
        self.chunk: deque[int] = deque()  # items sent and not yet answered; the worker is on the first
        self.taken = False  # the worker has read the chunk
        self.victim: int | None = None  # the item for which the worker was killed
        self.killed = False
        self.idle_deaths = 0
        self.deadline = float("inf")
        self.outbox.send_bytes(setup)

    def kill_worker(self) -> None:
        self.victim, self.killed, self.deadline = self.chunk[0], True, float("inf")
        if self.pid is not None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it died by itself meanwhile; the supervisor's message is on its way

    def close(self) -> None:
        self.inbox.close()
        self.outbox.close()
        if self.pid is not None and self.process.poll() is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.kill()
        self.process.wait()


def _close_slots(slots: list[_Slot], owner: int) -> None:
    if os.getpid() == owner:  # a forked child of the trainer has copies of these objects, not the right to end them
        while slots:
            slots.pop().close()


class GraderPool:
    """`workers` grading processes, started at once and kept.

    `graders` maps a name to "package.module:function" or to a name of `graders.py`; `samples` has one (name, grader
    fields) of each kind, with which a process warms up. `time_limit` is in seconds of wall clock per answer,
    `memory_limit_mib` bounds a process's address space. Call from the thread that made it or from one that lives as
    long: Linux ends a child when the thread that started it ends. `grade` is not reentrant.
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
        self._setup = json.dumps(
            {
                "sys_path": [str(Path(entry).absolute()) if entry else os.getcwd() for entry in sys.path],
                "graders": graders,
                "samples": list(samples),
                "memory_limit": int(memory_limit_mib) * 2**20,
            }
        ).encode()
        self._slots: list[_Slot] = []
        self._finalizer = weakref.finalize(self, _close_slots, self._slots, os.getpid())
        for _ in range(int(workers)):
            self._slots.append(self._start())

    def _start(self) -> _Slot:
        slot = _Slot(self._setup)
        slot.deadline = time.monotonic() + self.start_limit
        return slot

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End every grading process. Closing twice is fine."""
        self._finalizer()

    def wait_until_ready(self) -> None:
        """Return when every worker can grade. RuntimeError if a grader cannot be loaded."""
        try:
            while self._finalizer.alive and any(slot.pid is None for slot in self._slots):
                self._collect(deque(), [])
        except BaseException:
            self.close()
            raise

    def grade(self, items: Sequence[Item]) -> list[Outcome]:
        """The outcome of each item, in order.

        RuntimeError if the graders cannot be loaded, or if a worker dies again and again with nothing to grade; the
        pool is closed then, as after any exception.
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
            self.close()  # chunks are under way: a later call would take their answers for its own
            raise
        return [outcome for outcome in outcomes if outcome is not None]

    def _distribute(self, items: Sequence[Item], todo: deque[int], outcomes: list[Outcome | None]) -> None:
        size = max(1, min(_CHUNK, -(-len(items) // len(self._slots))))
        for number, slot in enumerate(self._slots):
            if todo and slot.pid is not None and not slot.chunk and not self._send(slot, items, todo, size):
                self._replace(number, todo, outcomes)

    def _collect(self, todo: deque[int], outcomes: list[Outcome | None]) -> None:
        """Wait for messages or a deadline, whichever is first, and act on them."""
        wait = min(slot.deadline for slot in self._slots) - time.monotonic()
        inboxes = [slot.inbox for slot in self._slots]
        multiprocessing.connection.wait(inboxes, timeout=None if wait == float("inf") else max(wait, 0.0))
        for number, slot in enumerate(self._slots):
            if slot.inbox.poll():  # also where the deadline has passed: an answer that is here counts
                self._receive(number, todo, outcomes)
            elif time.monotonic() >= slot.deadline:
                self._expire(slot)

    def _send(self, slot: _Slot, items: Sequence[Item], todo: deque[int], size: int) -> bool:
        chunk = [todo.popleft() for _ in range(min(size, len(todo)))]
        try:
            slot.outbox.send_bytes(json.dumps([items[i] for i in chunk]).encode())
        except BrokenPipeError:
            todo.extendleft(reversed(chunk))
            return False
        slot.chunk.extend(chunk)
        slot.taken = False
        slot.deadline = time.monotonic() + self.time_limit
        return True

    def _receive(self, number: int, todo: deque[int], outcomes: list[Outcome | None]) -> None:
        """Take every message that this slot has ready."""
        slot = self._slots[number]
        while True:
            try:
                if not slot.inbox.poll():
                    return
                message = json.loads(slot.inbox.recv_bytes())
            except (EOFError, ConnectionError):
                self._replace(number, todo, outcomes)
                return
            if "pid" in message:
                slot.pid, slot.deadline = message["pid"], float("inf")
            elif "chunk" in message:
                slot.taken = True
                if not slot.killed:
                    slot.deadline = time.monotonic() + self.time_limit
            elif "died" in message and slot.chunk and not slot.taken:
                self._replace(number, todo, outcomes)  # part of the chunk may still be in the pipe
                return
            elif "died" in message:
                slot.pid = None
                slot.deadline = time.monotonic() + self.start_limit
                self._lose_worker(slot, todo, outcomes, message["died"])
            elif "refused" in message:
                raise RuntimeError(f"a grader cannot be used: {message['refused']}")
            else:
                self._answer(slot, outcomes, message)

    def _answer(self, slot: _Slot, outcomes: list[Outcome | None], message: dict[str, Any]) -> None:
        index = slot.chunk.popleft()
        if index == slot.victim:
            slot.victim = None  # it came in just before the kill
        if "score" in message:
            outcomes[index] = Outcome(message["score"])
        else:
            outcomes[index] = Outcome(0.0, "crash", message["error"])
        slot.idle_deaths = 0
        if not slot.killed:
            slot.deadline = time.monotonic() + self.time_limit if slot.chunk else float("inf")

    def _lose_worker(self, slot: _Slot, todo: deque[int], outcomes: list[Outcome | None], cause: str) -> None:
        """The worker is gone: settle the answer that it was on, give back the rest of its chunk."""
        at_work = bool(slot.chunk) and slot.taken
        if at_work and slot.victim is not None:
            outcomes[slot.chunk.popleft()] = Outcome(0.0, "timeout", f"no score within {self.time_limit:g} s")
        elif at_work and not slot.killed:
            outcomes[slot.chunk.popleft()] = Outcome(0.0, "crash", f"the grading process died: {cause}")
        elif not slot.killed or slot.victim is not None:
            slot.idle_deaths += 1
            if slot.idle_deaths >= _IDLE_DEATHS:
                raise RuntimeError(f"grading processes die before they grade ({cause}); is memory_limit_mib too small?")
        todo.extendleft(reversed(slot.chunk))
        slot.chunk.clear()
        slot.victim, slot.killed = None, False

    def _replace(self, number: int, todo: deque[int], outcomes: list[Outcome | None]) -> None:
        """Start over with a new supervisor: the old one died, or what its pipe holds is unknown."""
        old = self._slots[number]
        self._lose_worker(old, todo, outcomes, "its supervisor was killed or replaced")
        fresh = self._start()
        fresh.idle_deaths = old.idle_deaths
        self._slots[number] = fresh
        old.close()

    def _expire(self, slot: _Slot) -> None:
        if slot.chunk:
            slot.kill_worker()
            return
        raise RuntimeError(f"the graders were not ready within start_limit = {self.start_limit:g} s")
