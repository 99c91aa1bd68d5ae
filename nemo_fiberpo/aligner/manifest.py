"""Which checkpoints are whole: a manifest with size and SHA-256 of every file, and which one to resume from.

A checkpoint is a directory under `checkpoints/`; `<name>-unfinished` beside it is NeMo's marker while it is written or
removed. `manifest.json` in it is written last and atomically, so a directory without one was never finished. The
digests find truncated and damaged files; they do not say who wrote them. Nothing here needs process groups.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_fiberpo.aligner import storage

NAME = "manifest.json"
FORMAT = 1
MARKER = "-unfinished"  # NeMoModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX
UNPACKED = "model_weights"  # NeMo's folder for what goes into a .nemo file; no checkpoint
DAMAGED = "checkpoints-damaged"  # beside the directory of checkpoints

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


@dataclass
class Choice:
    """The newest whole checkpoint (None: there is none and never was), and what is to be said and cleared away."""

    checkpoint: Path | None = None
    manifest: Manifest | None = None
    lines: list[str] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoint folders, newest first; NeMo's `-last` copy after the checkpoint of the same RL step. Links are
    left out: what they lead to is listed itself."""
    found = [path for path in storage.entries(directory) if path.name != UNPACKED]
    found = [path for path in found if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: (-step_of(path), path.name.endswith("-last"), path.name))


def whole_in(directory: Path) -> list[tuple[str, int]]:
    """Name and RL step of the checkpoints that have a manifest, newest first."""
    return [
        (path.name, step_of(path)) for path in checkpoints_in(directory) if storage.content(path / NAME) is not None
    ]


def step_of(checkpoint: Path) -> int:
    """The RL step after which a checkpoint was saved, by its manifest, else by its name; -1 where neither says it."""
    try:
        if (manifest := read(checkpoint)) is not None:
            return int(manifest.state["step"])
    except ValueError:
        pass
    named = re.search(r"(?:^|[-_])step=(\d+)", checkpoint.name)
    return int(named.group(1)) if named else -1


def marker_of(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + MARKER)


Verify = Callable[[Path, Manifest], list[str]]


def choose(directory: Path, recorded: Mapping[str, Any] | None, verify: Verify = problems) -> Choice:
    """The newest whole checkpoint of a directory.

    recorded  what the run wrote down of its newest whole checkpoint ("step", "name"), None if it never had one

    ValueError if none is whole although there was one once: by `recorded`, by a damaged checkpoint, or by one that has
    no manifest and no marker. Training would silently begin again otherwise. Without such a trace the run was stopped
    before its first checkpoint was complete, and begins at RL step 0. OSError if a file cannot be read: going back for
    that would lose the steps of a checkpoint that may be whole. Changes nothing on the disk.
    """
    out = Choice()
    once_whole = recorded is not None
    for path in checkpoints_in(directory):
        marked = marker_of(path).exists()
        if out.checkpoint is not None:  # older ones are not read: resuming does not depend on them
            if marked:
                out.lines.append(f"{path.name}: unfinished or half removed")
                out.unfinished.append(path)
            continue
        try:
            manifest = read(path)
            wrong = [f"{NAME}: missing"] if manifest is None else verify(path, manifest)
        except ValueError as error:
            manifest, wrong = None, [str(error)]
        if manifest is not None and not wrong:
            out.checkpoint, out.manifest = path, manifest
        elif marked and not (path / NAME).exists():
            out.lines.append(f"{path.name}: unfinished: {wrong[0]}")
            out.unfinished.append(path)
        else:
            once_whole = True
            out.lines += [f"{path.name}: damaged: {line}" for line in wrong]
            out.damaged.append(path)
    if out.checkpoint is None and once_whole:
        known = f"; the newest that was whole is {recorded['name']}, of RL step {recorded['step']}" if recorded else ""
        raise ValueError(
            f"{directory}: no checkpoint is whole ({'; '.join(out.lines) or 'there is none'}){known}. Put a whole one "
            "back, or begin again with a run_dir of its own"
        )
    found = out.manifest.state["step"] if out.manifest is not None else -1
    if recorded and found < recorded["step"] and not (directory / recorded["name"]).exists():
        out.lines.append(f"{recorded['name']}: gone, although it was whole")
    return out


def clear_away(choice: Choice) -> list[str]:
    """Move damaged checkpoints out of NeMo's sight, remove unfinished ones and stale markers; a line for each."""
    said = list(choice.lines)
    for path in choice.damaged:
        aside = path.parent.resolve().parent / DAMAGED  # of the same file system, where `checkpoints` is a link too
        aside.mkdir(exist_ok=True)
        target = aside / path.name
        number = 1
        while target.exists():
            target, number = aside / f"{path.name}.{number}", number + 1
        path.rename(target)
        marker_of(path).unlink(missing_ok=True)
        said.append(f"{path.name}: moved to {target}")
    for path in choice.unfinished:
        shutil.rmtree(path)
        marker_of(path).unlink(missing_ok=True)
        said.append(f"{path.name}: removed")
    if choice.checkpoint is not None:  # NeMo would remove a checkpoint that has a marker
        marker_of(choice.checkpoint).unlink(missing_ok=True)
    return said
