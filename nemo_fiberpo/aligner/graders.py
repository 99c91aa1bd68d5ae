"""What runs in a grading process: the graders that ship, and the loop that calls them on a policy's answers.

`grader_pool` starts this file as a script. It imports the standard library and the grading libraries that the data ask
for, never this package: a grading process holds no torch, no CUDA context and no process group.

A grader is a function `(record, response) -> score`: `record` is the prompt's grader fields (a dict from the JSONL
line), `response` the policy's text. An answer that is merely wrong or unreadable scores 0; an exception means that the
grader failed on it. An own grader is named "package.module:function" in the config.

Two processes per worker: a supervisor imports the libraries once and forks the worker, which grades. A worker that
hangs is killed by the pool, one that crashes has died by itself; either way the supervisor forks the next one in
milliseconds. Messages are JSON, each shorter than PIPE_BUF from here to the pool, so a killed worker never leaves half
of one:
    pool -> supervisor   {"sys_path", "graders": {name: target}, "samples": [[name, record]], "memory_limit"}   once
    supervisor -> pool   {"refused": text} | {"died": text}
    worker -> pool       {"pid": n} once; per chunk {"chunk": length}, then per answer {"score": x} | {"error": text}
    pool -> worker       a chunk: [[name, record, response], ...]
"""

from __future__ import annotations

import ctypes
import difflib
import functools
import importlib
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Grader = Callable[[dict[str, Any], str], float]

# name -> (fields that a record must have, fields that it may have), each with the type it has in JSON
GRADER_FIELDS: dict[str, tuple[dict[str, type], dict[str, type]]] = {
    "reasoning_gym": ({"task": str, "entry": dict}, {"answer_form": str}),
    "math_verify": ({"answer": str}, {}),
}
ANSWER_FORMS = ("text", "digit_list", "answer_tag")
_OUT_OF_MEMORY = 86  # exit code of a worker that met its memory limit; any other number would do
_TEXT_LIMIT = 800  # characters of an error text; keeps a message below PIPE_BUF (4096 bytes) even when escaped


def reasoning_gym(record: dict[str, Any], response: str) -> float:
    """The task's own `score_answer(answer, entry)` of reasoning-gym, in [0, 1].

    `answer_form` says how the answer is read from the response: "text" (default) passes it unchanged; "answer_tag"
    takes what stands between the last <answer> and </answer>; "digit_list" reads `1579` as the list `[1,5,7,9]`, for
    tasks whose answer is a list of digits.
    """
    form = record.get("answer_form", "text")
    answer: str | None = response
    if form == "digit_list":
        answer = "[" + ",".join(response) + "]"
    elif form == "answer_tag":
        answer = importlib.import_module("reasoning_gym.utils").extract_answer(response)
    elif form != "text":
        raise ValueError(f"answer_form is {form!r}; valid are {', '.join(ANSWER_FORMS)}")
    return float(_score_answer(record["task"])(answer, record["entry"]))


@functools.cache
def _score_answer(task: str) -> Callable[[str | None, dict[str, Any]], float]:
    """The scorer of a reasoning-gym task. ValueError with the nearest valid name if there is no such task."""
    factory = importlib.import_module("reasoning_gym.factory")
    importlib.import_module("reasoning_gym")  # registers the tasks
    if task not in factory.DATASETS:
        near = difflib.get_close_matches(task, factory.DATASETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"task: {task!r} is not a task of reasoning-gym{hint}")
    return factory.get_score_answer_fn(task)


def math_verify(record: dict[str, Any], response: str) -> float:
    """1.0 if math-verify finds the response equal to `record["answer"]`, else 0.0 (a response without a formula too).

    The library's own time limits are off (the pool has one) and its errors are raised, not swallowed as "wrong".
    """
    library = importlib.import_module("math_verify")
    found = library.parse(response, parsing_timeout=None, raise_on_error=True)
    gold = _gold_answer(record["answer"])
    return float(library.verify(gold, found, timeout_seconds=None, raise_on_error=True))


@functools.lru_cache(maxsize=4096)
def _gold_answer(answer: str) -> list[Any]:
    """The reference answer as math-verify's expressions; it may be bare LaTeX (`\\frac{1}{2}`) or have its own $."""
    library = importlib.import_module("math_verify")
    candidates = [answer] if "$" in answer or "\\boxed" in answer else [f"${answer}$", answer]
    for candidate in candidates:
        if gold := library.parse(candidate, parsing_timeout=None, raise_on_error=True):
            return gold
    raise ValueError(f"answer: math-verify reads no expression in the reference answer {answer!r}")


def _prepare(grader: Grader, record: dict[str, Any]) -> None:
    """Do before the first answer what would count against its time limit: imports, tables, compiled regexes."""
    if grader is reasoning_gym:
        _score_answer(record["task"])
    elif grader is math_verify:
        math_verify({"answer": "1"}, "$1$")


def load_grader(target: str) -> Grader:
    """The function that "package.module:function" names, or a grader of this file by its name."""
    if ":" not in target:
        return {"reasoning_gym": reasoning_gym, "math_verify": math_verify}[target]
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Signal `number` to this process when process `parent` ends, even by SIGKILL: the kernel does it on Linux, a
    thread elsewhere, which ends the process. If it has ended already, so does this one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _grade(grader: Grader, record: dict[str, Any], response: str) -> dict[str, Any]:
    try:
        score = float(grader(record, response))
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except BaseException as error:  # a grader may call sys.exit; that too costs one answer
        return {"error": f"{type(error).__name__}: {error}"[:_TEXT_LIMIT]}
    if not math.isfinite(score):
        return {"error": f"the score is {score}, not a finite number"}
    return {"score": score}


def _work(inbox: Connection, outbox: Connection, graders: dict[str, Grader], memory_limit: int) -> None:
    """The worker: grade chunks until the pool closes its end."""
    os.setsid()  # a group of its own, so that killing it also ends what a grader may have started
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = memory_limit if hard == resource.RLIM_INFINITY else min(memory_limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _send(outbox, {"pid": os.getpid()})
    while True:
        chunk = json.loads(inbox.recv_bytes())
        _send(outbox, {"chunk": len(chunk)})  # from here on the pipe is empty: a successor starts clean
        for name, record, response in chunk:
            _send(outbox, _grade(graders[name], record, response))


def _send(outbox: Connection, message: dict[str, Any]) -> None:
    outbox.send_bytes(json.dumps(message).encode())


def _cause(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == _OUT_OF_MEMORY:
        return "out of memory (its limit, or the machine's)"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def main() -> None:
    """The supervisor: import the graders, then keep one worker alive."""
    # What ends a run early is the trainer's to decide, not its graders'. A handler, since programs that a grader starts
    # would inherit that a signal is ignored, and `timeout` for one needs SIGTERM.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1, signal.SIGTERM))
    inbox, outbox = Connection(int(sys.argv[1]), writable=False), Connection(int(sys.argv[2]), readable=False)
    die_with_parent(int(sys.argv[3]))
    setup = json.loads(inbox.recv_bytes())
    sys.path[:] = setup["sys_path"]
    try:
        graders = {name: load_grader(target) for name, target in setup["graders"].items()}
        for name, record in setup["samples"]:
            _prepare(graders[name], record)
    except BaseException as error:
        _send(outbox, {"refused": f"{type(error).__name__}: {error}"[:_TEXT_LIMIT]})
        return
    supervisor = os.getpid()
    while True:
        pid = os.fork()
        if pid == 0:
            try:
                die_with_parent(supervisor)
                _work(inbox, outbox, graders, setup["memory_limit"])
            finally:  # whatever it was (the pool closing its end is the usual one), never return into the supervisor
                os._exit(1)
        _send(outbox, {"died": _cause(os.waitpid(pid, 0)[1])})


if __name__ == "__main__":
    try:
        main()
    except (EOFError, BrokenPipeError):  # the pool is gone
        os._exit(0)
