"""The manifest of a checkpoint: size and SHA-256 of every file, and the state of the trainer.

`manifest.json` in a checkpoint is written last and atomically, so a directory without one was never finished. The
digests find truncated and damaged files; they do not say who wrote them. Nothing here needs process groups.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from nemo_fiberpo import cores
from nemo_fiberpo.storage import reading

NAME = "manifest.json"
FORMAT = 1
_BLOCK = 2**20

Entry = dict[str, Any]  # {"size": bytes, "sha256": hex}


@dataclass(frozen=True)
class Manifest:
    """files  entry of every file by its path in the checkpoint, with / between folders
    state  of the trainer: step (RL steps done), consumed_samples (prompts), epoch, ppo_optimization_step
    run    which run wrote it, as its run.json has it; None: of no run, or of an earlier version"""

    files: Mapping[str, Entry]
    state: Mapping[str, int]
    run: str | None = None

    def text(self) -> str:
        """The file: JSON that ends with the digest of the rest, which reveals damage of the manifest itself."""
        body: dict[str, Any] = {"format": FORMAT} | ({} if self.run is None else {"run": self.run})
        body |= {"state": dict(self.state), "files": dict(self.files)}
        seal = hashlib.sha256(json.dumps(body).encode()).hexdigest()
        return json.dumps(body | {"sha256": seal}, indent=1) + "\n"


def files_of(checkpoint: Path) -> list[str]:
    """All files of a checkpoint except its manifest, sorted."""
    found = (path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if path.as_posix() not in (NAME, NAME + ".tmp"))


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a crash leaves the old text or the new, also on disk."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def entries(checkpoint: Path, names: Sequence[str]) -> dict[str, Entry]:
    """Size and digest of files, which are on the disk afterwards. Streams, several files at a time."""

    def entry(name: str) -> Entry:
        with (checkpoint / name).open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"size": file.tell(), "sha256": digest}

    with ThreadPoolExecutor(_threads()) as pool:
        return dict(zip(names, pool.map(entry, names), strict=True))


def _threads() -> int:
    """For this rank's share of the machine; hashing does not hold Python's lock."""
    return min(8, cores.of_this_rank())


def write(checkpoint: Path, manifest: Manifest) -> None:
    """Mark a checkpoint as whole. Its folders are flushed to disk before its manifest."""
    for folder in {(checkpoint / name).parent for name in manifest.files} | {checkpoint}:
        sync(folder)
    write_atomically(checkpoint / NAME, manifest.text())


def read(checkpoint: Path) -> Manifest | None:
    """The manifest, None without one. ValueError if it is damaged, of another format or not a regular file, OSError if
    it is unreadable."""
    return read_file(checkpoint / NAME)


def read_file(seal: Path) -> Manifest | None:
    """As `read`, for a manifest that may be beside its files."""
    try:
        raw = reading.read_bytes(seal)
    except OSError as error:
        if error.errno not in reading.MISSING:
            raise
        raise ValueError(f"{seal.name}: {error.strerror}") from error
    return None if raw is None else parse(raw)


def parse(raw: bytes) -> Manifest:
    """ValueError if a manifest is damaged or of another format, or lists anything but files of a checkpoint."""
    try:
        text = raw.decode()
        values = json.loads(text)
        number, manifest = values["format"], Manifest(values["files"], values["state"], values.get("run"))
        intact = number == FORMAT and manifest.text() == text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        number, intact = FORMAT, False
    if number != FORMAT:
        raise ValueError(f"{NAME}: format {number!r}, this version reads {FORMAT}")
    if not intact:
        raise ValueError(f"{NAME}: its own SHA-256 differs, or it is cut short")
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    """ValueError unless names stay inside the checkpoint, entries are sizes and digests, and the state is counts."""
    for name, entry in manifest.files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.as_posix() != name or name in (".", "") or "\0" in name:
            raise ValueError(f"{NAME}: files: {name!r} is no path inside the checkpoint")
        if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"} or not _count(entry["size"]):
            raise ValueError(f"{NAME}: files.{name}: must have size and sha256, got {entry!r}")
    for name, value in manifest.state.items():
        if not _count(value):
            raise ValueError(f"{NAME}: state.{name}: must be a whole number of at least 0, got {value!r}")


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def problems(checkpoint: Path, manifest: Manifest, names: Iterable[str] | None = None) -> list[str]:
    """What is wrong with files (default: all of the manifest), one line each that begins with the file: missing, wrong
    size, altered. OSError if one cannot be read: it may still be whole."""

    def problem(name: str) -> str | None:
        wanted = manifest.files[name]

        def read(path: Path) -> str | None:
            with reading.open_listed(path) as file:  # opening has NFS ask the server for the size
                size = os.fstat(file.fileno()).st_size
                if size != wanted["size"]:
                    return f"{name}: {size} bytes instead of {wanted['size']}"
                digest = _digest(file, wanted["size"])
            return None if digest == wanted["sha256"] else f"{name}: its SHA-256 differs, {size} bytes"

        try:
            return reading.attempt(read, checkpoint / name)
        except OSError as error:
            if error.errno not in reading.MISSING:
                raise
            return f"{name}: {error.strerror}"

    with ThreadPoolExecutor(_threads()) as pool:
        return [line for line in pool.map(problem, manifest.files if names is None else names) if line]


def _digest(file: BinaryIO, size: int) -> str | None:
    """SHA-256 of a file of that many bytes; None if it is longer, as kernel files can be."""
    digest, left = hashlib.sha256(), size
    while left > 0 and (block := file.read(min(left, _BLOCK))):
        digest.update(block)
        left -= len(block)
    return None if file.read(1) else digest.hexdigest()


def holds(seal: Path, state: Mapping[str, int]) -> bool:
    """Whether a manifest beside its files has this trainer state, and they match it. False too if a file is missing,
    damaged or unreadable."""
    try:
        found = read_file(seal)
        return found is not None and found.state == dict(state) and not problems(seal.parent, found)
    except (OSError, ValueError):
        return False
