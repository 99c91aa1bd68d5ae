"""The code of grading processes. `pool` starts this file as a script; it imports its siblings as a package of their
own, so that neither the rest of this package nor torch is imported.

Three processes, of which only the last one reads responses:

    supervisor   imports the grading libraries, takes the namespaces (`isolation`), forks the worker, waits
    worker       init of its PID namespace: takes chunks from the pool, forks a grading process for each response of a
                 grader that may run it as code (`builtin.runs_answers`), else for a chunk; enforces the time limit,
                 and kills what a response left behind
    grading      permanently confined, with a pipe to the worker as its only descriptor; a copy that a response makes
                 of it (`os.fork`) exits

Messages between pool, supervisor and worker are JSON. Those to the pool carry the worker's token and are shorter than
PIPE_BUF, so that writes are atomic:

    pool -> supervisor   {"token", "sys_path", "graders", "samples", "memory_limit", "time_limit", "scratch"}   once
    supervisor -> pool   {"pid": of the worker} | {"refused": text} | {"died": cause}
    worker -> pool       {"ready": the isolation in force}, per chunk {"chunk": length}, per answer
                         {"item": n, "score": x} |
                         {"item": n, "failure": "timeout" | "memory" | "crash", "reason": text}
    pool -> worker       a chunk: [[item, name, record, response], ...]
    grading -> worker    lines: [] when it begins, then [item, {"score": x} | {"error": text}] for each answer

Instead of a response, {"prompt": text, "response": text | null} checks a line of data (`checks.complaint`):
the score is 1.0, or the error is the complaint.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

_SIBLINGS = ModuleType("_fiberpo_graders")
_SIBLINGS.__path__ = [str(Path(__file__).parent)]
sys.modules[_SIBLINGS.__name__] = _SIBLINGS
builtin, isolation, signals, worker = (
    importlib.import_module(f"{_SIBLINGS.__name__}.{name}") for name in ("builtin", "isolation", "signals", "worker")
)


def main() -> None:
    """Import the graders, fork the worker, report how it ended."""
    # Only the trainer decides to stop early. A no-op handler, since programs started by a grader would inherit SIG_IGN,
    # and `timeout`, for example, needs SIGTERM.
    for number in signals.SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)
    inbox, outbox = Connection(int(sys.argv[1]), writable=False), Connection(int(sys.argv[2]), readable=False)
    signals.die_with_parent(int(sys.argv[3]))
    setup = json.loads(inbox.recv_bytes())

    def refuse(error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}"[: worker.TEXT_LIMIT]
        worker.send(outbox, setup["token"], {"refused": text})

    sys.path[:] = setup["sys_path"]
    try:
        loaded = {name: builtin.load_grader(target) for name, target in setup["graders"].items()}
        for name, record in setup["samples"]:
            builtin.prepare(loaded[name], record)
    except BaseException as error:
        refuse(error)
        return
    jail = isolation.Isolation(setup["scratch"], setup["memory_limit"])
    jail.enter()
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy every page
    supervisor = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            signals.die_with_parent(supervisor)
            jail.settle(max(inbox.fileno(), outbox.fileno()) + 1)
            worker.Worker(inbox, outbox, loaded, jail, setup["token"], setup["time_limit"]).serve()
        except (EOFError, BrokenPipeError):  # the pool is gone
            os._exit(0)
        except BaseException as error:
            refuse(error)
        finally:
            os._exit(1)
    worker.send(outbox, setup["token"], {"pid": pid})
    inbox.close()
    worker.send(outbox, setup["token"], {"died": worker.cause_of(os.waitpid(pid, 0)[1])})


if __name__ == "__main__":
    try:
        main()
    except (EOFError, BrokenPipeError):  # the pool is gone
        os._exit(0)
