"""Which checkpoint of a run to resume from, and what becomes of damaged and unfinished ones.

A checkpoint is a directory under `checkpoints/`; `<name>-unfinished` beside it is NeMo's marker while it is written or
removed. It is whole if it has a manifest whose files are as that says. Nothing here needs process groups.
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
UNPACKED = "model_weights"  # NeMo's folder for what goes into a .nemo file; no checkpoint
DAMAGED = "checkpoints-damaged"  # beside the directory of checkpoints
STATE = ("step", "consumed_samples", "ppo_optimization_step")  # what the trainer restores


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
    found = [path for path in reading.entries(directory) if path.name != UNPACKED]
    found = [path for path in found if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: (-step_of(path), path.name.endswith("-last"), path.name))


def whole_in(directory: Path) -> list[tuple[str, int]]:
    """Name and RL step of the checkpoints that have a manifest, newest first."""
    return [
        (path.name, step_of(path)) for path in checkpoints_in(directory) if reading.content(path / NAME) is not None
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


def choose(
    directory: Path, recorded: Mapping[str, Any] | None, verify: Verify = problems, run: str | None = None
) -> Choice:
    """The newest whole checkpoint of a directory.

    recorded  what the run wrote down of its newest whole checkpoint ("step", "name"), None if it never had one
    run       which run it is; a checkpoint that another one wrote is not whole here

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
        known = f"; the newest that was whole is {recorded['name']}, of RL step {recorded['step']}" if recorded else ""
        raise ValueError(
            f"{directory}: no checkpoint is whole ({'; '.join(out.lines) or 'there is none'}){known}. Put a whole one "
            "back, or begin again with a run_dir of its own"
        )
    found = out.manifest.state["step"] if out.manifest is not None else -1
    if recorded and found < recorded["step"] and not (directory / recorded["name"]).exists():
        out.lines.append(f"{recorded['name']}: gone, although it was whole")
    return out


def _foreign(manifest: Manifest, run: str | None) -> list[str]:
    """What shows that a manifest is none of a checkpoint of this run."""
    if lacking := [name for name in STATE if name not in manifest.state]:
        return [f"{NAME}: state: {lacking[0]} is missing"]
    if None not in (run, manifest.run) and manifest.run != run:
        return [f"{NAME}: run: of another run, {manifest.run!r}; this one is {run!r}"]
    return []


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
