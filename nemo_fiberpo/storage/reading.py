"""Files on a shared file system: what is missing is one thing, what could not be read another.

Only the first says something about a checkpoint. A read that fails otherwise (ESTALE, EIO, EACCES, a server that does
not answer) is tried again, and is an OSError with the file's name if it goes on failing.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import TypeVar

WAITS = (0.5, 2.0, 5.0)  # seconds before each further attempt
# No such file; another kind of thing in its place, as `opened` has it for a FIFO or a device.
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)
LARGEST = 256 * 2**20  # bytes of a file that is read whole: a manifest of a million files

T = TypeVar("T")


def attempt(read: Callable[[Path], T], path: Path) -> T:
    """`read(path)`, again after WAITS where it cannot be read. OSErrors carry the path; those of MISSING are final."""
    for wait in (*WAITS, None):
        try:
            return read(path)
        except OSError as error:
            error.filename = error.filename or str(path)
            if wait is None or error.errno in MISSING:
                raise
            time.sleep(wait)
    raise AssertionError("unreachable")


def opened(path: Path) -> BufferedReader:
    """The file, open. OSError with ENXIO for what is no regular file. FileNotFoundError only if a fresh listing of its
    folder has not got it either: an NFS client keeps for a while that a name did not exist, but asks the server again
    when it opens a folder."""
    try:
        return regular(path)
    except FileNotFoundError:
        if path.name not in os.listdir(path.parent) or path.is_symlink():
            raise
        try:
            return regular(path)
        except FileNotFoundError:
            raise OSError(errno.ESTALE, "its folder lists it, but it cannot be opened", str(path)) from None


def regular(path: Path) -> BufferedReader:
    """The file, or the one that a link leads to, open. A FIFO, whose opening would wait for a writer, and a device,
    which may have no end, are an OSError with ENXIO."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENXIO, "is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def content(path: Path) -> bytes | None:
    """The bytes of a file of at most LARGEST, None if there is none. OSError if it cannot be read."""

    def read(path: Path) -> bytes:
        with opened(path) as file:
            found = file.read(LARGEST + 1)
        if len(found) > LARGEST:
            raise OSError(errno.EFBIG, f"has more than {LARGEST} bytes", str(path))
        return found

    try:
        return attempt(read, path)
    except FileNotFoundError:
        return None


def entries(directory: Path) -> list[Path]:
    """What a directory holds; nothing if there is none. OSError if it cannot be listed."""
    try:
        return [directory / name for name in attempt(os.listdir, directory)]
    except FileNotFoundError:
        return []


def in_words(error: OSError) -> str:
    """File, reason and errno of a read that failed."""
    return f"{error.filename}: {error.strerror or type(error).__name__} (errno {error.errno})"
