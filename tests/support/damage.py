"""Checkpoints of a few small files, and what can happen to them."""

from __future__ import annotations

from pathlib import Path

from nemo_fiberpo.storage import manifest
from nemo_fiberpo.storage.manifest import Manifest

# The files of one of Megatron's checkpoints on two ranks, and one of an older format that has folders.
FILES = [".metadata", "__0_0.distcp", "__0_1.distcp", "__1_0.distcp", "common.pt", "metadata.json", "model/shard_0.pt"]


def name_of(step: int, last: bool = False) -> str:
    return f"fiberpo-step={step}-consumed_samples={8 * step}-epoch=0{'-last' if last else ''}"


def state_of(step: int) -> dict[str, int]:
    return {"step": step, "consumed_samples": 8 * step, "ppo_optimization_step": 4 * step}


def save(directory: Path, step: int, last: bool = False, finished: bool = True, run: str | None = None) -> Path:
    """A checkpoint of a few files with a content of its own."""
    path = directory / name_of(step, last)
    for number, name in enumerate(FILES):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(bytes((step * 37 + number * 11 + at) % 256 for at in range(300 + number)))
    if finished:
        found = manifest.entries(path, manifest.files_of(path))
        manifest.write(path, Manifest(found, state_of(step), run))
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_first(path: Path) -> None:
    flip(path, 0)


def flip_last(path: Path) -> None:
    flip(path, 8 * path.stat().st_size - 1)


def flip_middle(path: Path) -> None:
    flip(path, 4 * path.stat().st_size)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


DAMAGES = [truncate, empty, flip_first, flip_middle, flip_last, Path.unlink]


UNREADABLE = Path("/proc/self/mem")  # every read at its beginning is EIO


def make_unreadable(checkpoint: Path, name: str) -> None:
    """A file of a checkpoint that is there, of the size in the manifest, and whose every read fails."""
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to(UNREADABLE)
    if name != manifest.NAME:
        found = manifest.read(checkpoint)
        files = {**found.files, name: {**found.files[name], "size": UNREADABLE.stat().st_size}}
        manifest.write(checkpoint, Manifest(files, found.state))
