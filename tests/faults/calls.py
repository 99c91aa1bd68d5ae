"""Pickles that call something, each of which would write a file."""

from __future__ import annotations

import codecs
import gzip
import io
import logging
import os
import pickle
import runpy
import shelve
import shutil
import sqlite3
import subprocess
import timeit
import zipfile
from pathlib import Path
from typing import Any

import numpy
import torch


class Call:
    """A pickle that calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def calls(flag: Path, most: int | None = None) -> dict[str, Any]:
    """Objects whose unpickling makes the file `flag`, each by another function; at most so many."""

    text, code = str(flag), f"open({str(flag)!r}, 'w').close()"
    script = flag.with_name("script.py")
    script.write_text(code)
    every = {
        "os.system": Call(os.system, f"touch {text}"),
        "os.spawnlp": Call(os.spawnlp, os.P_WAIT, "touch", "touch", text),
        "os.mkdir": Call(os.mkdir, text),
        "os.mknod": Call(os.mknod, text),
        "os.open": Call(os.open, text, os.O_CREAT),
        "subprocess.call": Call(subprocess.call, ["touch", text]),
        "subprocess.check_output": Call(subprocess.check_output, ["touch", text]),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, text, "w"),
        "io.FileIO": Call(io.FileIO, text, "w"),
        "codecs.open": Call(codecs.open, text, "w"),
        "gzip.open": Call(gzip.open, text, "w"),
        "zipfile.ZipFile": Call(zipfile.ZipFile, text, "w"),
        "Path.touch": Call(Path.touch, flag),
        "Path.write_text": Call(Path.write_text, flag, "x"),
        "shutil.copyfile": Call(shutil.copyfile, str(script), text),
        "runpy.run_path": Call(runpy.run_path, str(script)),
        "timeit.timeit": Call(timeit.timeit, code, "pass", timeit.default_timer, 1),
        "logging.FileHandler": Call(logging.FileHandler, text),
        "sqlite3.connect": Call(sqlite3.connect, text),
        "shelve.open": Call(shelve.open, text),
        "numpy.memmap": Call(numpy.memmap, text, "uint8", "w+", 0, (1,)),
        "numpy.save": Call(numpy.save, text, numpy.zeros(1)),
        "torch.save": Call(torch.save, torch.zeros(1), text),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {text}"))),
        "os.link": Call(os.link, str(script), text),
        "getattr": Call(getattr, Call(os.system, f"touch {text}"), "real"),
    }
    return dict(list(every.items())[:most])
