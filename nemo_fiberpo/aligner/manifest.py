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
from pathlib import Path
from typing import Any

from nemo_fiberpo.aligner import storage

NAME = "manifest.json"
FORMAT = 1

Entry = dict[str, Any]  # {"size": bytes, "sha256": hex}


@dataclass(frozen=True)
class Manifest:
    """files  entry of every file by its path in the checkpoint, with / between folders
    state  of the trainer: step (RL steps done), consumed_samples (prompts), epoch, ppo_optimization_step"""

    files: Mapping[str, Entry]
    state: Mapping[str, int]

    def text(self) -> str:
        """The file: JSON that ends with the digest of the rest, so that damage of the manifest itself shows."""
        body = {"format": FORMAT, "state": dict(self.state), "files": {name: self.files[name] for name in self.files}}
        seal = hashlib.sha256(json.dumps(body).encode()).hexdigest()
        return json.dumps(body | {"sha256": seal}, indent=1) + "\n"


def files_of(checkpoint: Path) -> list[str]:
    """Every file of a checkpoint but its manifest, sorted."""
    found = (path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if path.as_posix() not in (NAME, NAME + ".tmp"))


def write_atomically(path: Path, text: str) -> None:
    """After a crash at any moment `path` holds its old text or this one, on the disk too."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk hold a file or directory."""
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
    return max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def write(checkpoint: Path, manifest: Manifest) -> None:
    """Declare a checkpoint whole. Its folders are on the disk before its manifest."""
    for folder in {(checkpoint / name).parent for name in manifest.files} | {checkpoint}:
        sync(folder)
    write_atomically(checkpoint / NAME, manifest.text())


def read(checkpoint: Path) -> Manifest | None:
    """The manifest, None without one. ValueError if it is damaged or of another format, OSError if it is unreadable."""
    raw = storage.content(checkpoint / NAME)
    return None if raw is None else parse(raw)


def parse(raw: bytes) -> Manifest:
    """ValueError if a manifest is damaged or of another format."""
    try:
        text = raw.decode()
        values = json.loads(text)
        manifest = Manifest(values["files"], values["state"])
        if values["format"] != FORMAT:
            raise ValueError(f"{NAME}: format {values['format']!r}, this version reads {FORMAT}")
        intact = manifest.text() == text
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise ValueError(f"{NAME}: its own SHA-256 differs, or it is cut short")
    return manifest


def problems(checkpoint: Path, manifest: Manifest, names: Iterable[str] | None = None) -> list[str]:
    """What is wrong with files (default: all of the manifest), one line each that begins with the file: missing, of
    another size, altered. OSError if one cannot be read, which says nothing about what it holds."""

    def problem(name: str) -> str | None:
        wanted = manifest.files[name]

        def read(path: Path) -> str | None:
            with storage.opened(path) as file:  # opening has NFS ask the server for the size
                size = os.fstat(file.fileno()).st_size
                if size != wanted["size"]:
                    return f"{name}: {size} bytes instead of {wanted['size']}"
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            return None if digest == wanted["sha256"] else f"{name}: its SHA-256 differs, {size} bytes"

        try:
            return storage.attempt(read, checkpoint / name)
        except OSError as error:
            if error.errno not in storage.MISSING:
                raise
            return f"{name}: {error.strerror}"

    with ThreadPoolExecutor(_threads()) as pool:
        return [line for line in pool.map(problem, manifest.files if names is None else names) if line]


def holds(seal: Path, state: Mapping[str, int]) -> bool:
    """Whether a manifest that stands beside its files is of this state of the trainer, and they are as it says. False
    too where one of them is missing, damaged or cannot be read: what it seals is then made again."""
    try:
        raw = storage.content(seal)
        found = None if raw is None else parse(raw)
        return found is not None and found.state == dict(state) and not problems(seal.parent, found)
    except (OSError, ValueError):
        return False
