"""Reading files on a shared file system, where "missing" and "unreadable" must be told apart.

Only a missing file says something about a checkpoint. Other failed reads (ESTALE, EIO, EACCES, a server that does not
answer) are retried, and raise an OSError with the file's name if they keep failing.
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
# No such file; or not a regular file, see `open_regular`.
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)
LARGEST = 256 * 2**20  # bytes of a file that is read at once: a manifest of a million files

T = TypeVar("T")


def attempt(read: Callable[[Path], T], path: Path) -> T:
    """`read(path)`, retried after WAITS if it fails. OSErrors carry the path; those of MISSING are not retried."""
    for wait in (*WAITS, None):
        try:
            return read(path)
        except OSError as error:
            error.filename = error.filename or str(path)
            if wait is None or error.errno in MISSING:
                raise
            time.sleep(wait)
    raise AssertionError("unreachable")


def open_listed(path: Path) -> BufferedReader:
    """The file, open; OSError with ENXIO unless it is a regular file. FileNotFoundError only if a fresh listing of its
    folder lacks it too: an NFS client caches that a name did not exist, but asks the server when it opens a folder."""
    try:
        return open_regular(path)
    except FileNotFoundError:
        if path.name not in os.listdir(path.parent) or path.is_symlink():
            raise
        try:
            return open_regular(path)
        except FileNotFoundError:
            raise OSError(errno.ESTALE, "its folder lists it, but it cannot be opened", str(path)) from None


def open_regular(path: Path) -> BufferedReader:
    """The file, or the target of a link, open. OSError with ENXIO for anything but a regular file: opening a FIFO would
    wait for a writer, and a device may have no end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENXIO, "is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path) -> bytes | None:
    """The bytes of a file of at most LARGEST, None if it does not exist. OSError if it cannot be read."""

    def read(path: Path) -> bytes:
        with open_listed(path) as file:
            found = file.read(LARGEST + 1)
        if len(found) > LARGEST:
            raise OSError(errno.EFBIG, f"has more than {LARGEST} bytes", str(path))
        return found

    try:
        return attempt(read, path)
    except FileNotFoundError:
        return None


def list_directory(directory: Path) -> list[Path]:
    """The entries of a directory; none if it does not exist. OSError if it cannot be listed."""
    try:
        return [directory / name for name in attempt(os.listdir, directory)]
    except FileNotFoundError:
        return []


def describe(error: OSError) -> str:
    """File, reason and errno of a failed read."""
    return f"{error.filename}: {error.strerror or type(error).__name__} (errno {error.errno})"
