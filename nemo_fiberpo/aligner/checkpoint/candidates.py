"""Which checkpoint to resume from, and what to do with damaged and unfinished ones.

A checkpoint is a directory under `checkpoints/`; `<name>-unfinished` beside it is NeMo's marker while it is written or
removed. It is whole if its manifest exists and matches its files. Nothing here needs process groups.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_fiberpo.storage import reading
from nemo_fiberpo.storage.manifest import NAME, Manifest, problems, read

MARKER = "-unfinished"  # NeMoModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX
UNPACKED = "model_weights"  # NeMo's staging folder of a .nemo file, not a checkpoint
DAMAGED = "checkpoints-damaged"  # beside the directory of checkpoints
STATE = ("step", "consumed_samples", "ppo_optimization_step")  # of the trainer


@dataclass
class Choice:
    """The newest whole checkpoint (None: there never was one), messages to print, and what to clean up."""

    checkpoint: Path | None = None
    manifest: Manifest | None = None
    lines: list[str] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoint folders, newest first; a `-last` copy after the checkpoint of the same RL step. Links are skipped:
    their targets are listed themselves."""
    found = [path for path in reading.list_directory(directory) if path.name != UNPACKED]
    found = [path for path in found if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: (-step_of(path), path.name.endswith("-last"), path.name))


def whole_in(directory: Path) -> list[tuple[str, int]]:
    """Name and RL step of the checkpoints that have a manifest, newest first."""
    return [
        (path.name, step_of(path)) for path in checkpoints_in(directory) if reading.read_bytes(path / NAME) is not None
    ]


def step_of(checkpoint: Path) -> int:
    """The RL step of a checkpoint from its manifest, else from its name; -1 if neither has it."""
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


def choose(
    directory: Path, recorded: Mapping[str, Any] | None, verify: Verify = problems, run: str | None = None
) -> Choice:
    """The newest whole checkpoint of a directory. Changes nothing on disk.

    recorded  the run's record of its newest whole checkpoint ("step", "name"), None if it never had one
    run       id of the run; a checkpoint of another run is not whole

    ValueError if none is whole although one existed, as shown by `recorded`, by a damaged checkpoint, or by one with
    neither manifest nor marker: training must not silently start over. Otherwise the run was stopped before its first
    checkpoint was complete, and starts at RL step 0. OSError if a file cannot be read: the checkpoint may be whole.
    """
    out = Choice()
    once_whole = recorded is not None
    for path in checkpoints_in(directory):
        marked = marker_of(path).exists()
        if out.checkpoint is not None:  # older ones are not read
            if marked:
                out.lines.append(f"{path.name}: unfinished or half removed")
                out.unfinished.append(path)
            continue
        try:
            manifest, wrong = read(path), [f"{NAME}: missing"]
        except ValueError as error:
            manifest, wrong = None, [str(error)]
        if manifest is not None:
            wrong = _foreign(manifest, run) or verify(path, manifest)
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
        known = f"; the newest whole one was {recorded['name']}, of RL step {recorded['step']}" if recorded else ""
        raise ValueError(
            f"{directory}: no checkpoint is whole ({'; '.join(out.lines) or 'there is none'}){known}. Restore a whole "
            "one, or start again in another run_dir"
        )
    found = out.manifest.state["step"] if out.manifest is not None else -1
    if recorded and found < recorded["step"] and not (directory / recorded["name"]).exists():
        out.lines.append(f"{recorded['name']}: missing, although it was whole")
    return out


def _foreign(manifest: Manifest, run: str | None) -> list[str]:
    """Why a manifest cannot be of a checkpoint of this run."""
    if lacking := [name for name in STATE if name not in manifest.state]:
        return [f"{NAME}: state: {lacking[0]} is missing"]
    if None not in (run, manifest.run) and manifest.run != run:
        return [f"{NAME}: run: belongs to another run, {manifest.run!r}; this one is {run!r}"]
    return []


def clear_away(choice: Choice) -> list[str]:
    """Move damaged checkpoints aside, and remove unfinished ones and stale markers. Returns messages."""
    messages = list(choice.lines)
    for path in choice.damaged:
        aside = path.parent.resolve().parent / DAMAGED  # on the same file system even if `checkpoints` is a link
        aside.mkdir(exist_ok=True)
        target = aside / path.name
        number = 1
        while target.exists():
            target, number = aside / f"{path.name}.{number}", number + 1
        path.rename(target)
        marker_of(path).unlink(missing_ok=True)
        messages.append(f"{path.name}: moved to {target}")
    for path in choice.unfinished:
        shutil.rmtree(path)
        marker_of(path).unlink(missing_ok=True)
        messages.append(f"{path.name}: removed")
    if choice.checkpoint is not None:  # NeMo removes checkpoints that have a marker
        marker_of(choice.checkpoint).unlink(missing_ok=True)
    return messages
