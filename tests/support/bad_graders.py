"""Graders that misbehave when the answer tells them to; named in the tests as "bad_graders:grade"."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time


def grade(record: dict, response: str) -> float:
    """Score 1.0 if the response is the record's `answer`; otherwise do what the response says."""
    word, _, rest = response.partition(" ")
    if word == "sleep":
        time.sleep(float(rest))
    elif word == "hold_gil":
        return float(len(str(10 ** (10**9))) * 0)  # one C call of minutes: no Python signal handler would run
    elif word == "exit":
        os._exit(int(rest))
    elif word == "sys_exit":
        sys.exit(int(rest))
    elif word == "raise":
        raise ZeroDivisionError("asked for")
    elif word == "segfault":
        ctypes.string_at(0)
    elif word == "allocate":
        return float(len(bytearray(int(rest))))
    elif word == "nan":
        return float("nan")
    elif word == "print":
        print("x" * 100_000, flush=True)
    elif word == "spawn":
        subprocess.Popen(["sleep", rest])
        time.sleep(60)
    elif word == "environment":
        return float(rest in os.environ)
    elif word == "imported":
        return float(rest in sys.modules)
    elif word == "run":  # what a grader does that evaluates answers
        found: dict = {}
        exec(rest, found)
        return float(found.get("score", 0.0))
    elif word == "half":
        return 0.5
    return float(response == record["answer"])
