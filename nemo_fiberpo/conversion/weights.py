"""The files of a Hugging Face model's folder, and which of them holds which tensor.

Only regular files inside the folder are read, or those in the `blobs` of a Hugging Face cache that links lead to.
Shapes and precisions are read from the headers, before anything is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PRECISIONS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def belongs(file: Path) -> bool:
    """Whether this is a regular file of its folder: itself, or through a link that stays inside or leads into the
    `blobs` of the Hugging Face cache that the folder is a snapshot of."""
    if not file.is_file():
        return False
    folder, real = file.parent.resolve(), file.resolve()
    if folder in real.parents:
        return True
    return folder.parent.name == "snapshots" and real.parent == folder.parents[1] / "blobs"


def needed(file: Path) -> Path:
    """ValueError unless this is a file that belongs to its folder."""
    if not belongs(file):
        why = "is not a regular file of this folder" if file.exists() or file.is_symlink() else "there is no such file"
        raise ValueError(f"{file}: {why}")
    return file


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file that belongs to its folder; ValueError for anything else."""
    try:
        found = json.loads(needed(file).read_bytes())
    except ValueError as error:
        if str(error).startswith(f"{file}: "):
            raise
        raise ValueError(f"{file}: is not valid JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{file}: is not valid JSON: it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: must be a JSON object")
    return found


class Weights:
    """The tensors of a folder of safetensors, read one by one.

    The folder's index names the file of each tensor; other files, such as shards of another save, are not read.
    ValueError if a file that the index names is missing, cut short, or lacks one of its tensors.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        named = _shards(folder)
        self._of: dict[str, Any] = {}
        for file, names in named.items():
            opened = _open(folder / file)
            held = set(opened.keys())
            for name in sorted(held) if names is None else names:
                if name not in held:
                    raise ValueError(f"{folder / file}: has no tensor {name}, which {_INDEX} places there")
                self._of[name] = opened

    @property
    def names(self) -> set[str]:
        return set(self._of)

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._needed(name).get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._needed(name).get_slice(name).get_shape())

    def precision(self, name: str) -> torch.dtype:
        """The precision of a tensor. ValueError unless it is a floating-point type of 16 to 64 bits, as for quantized
        weights."""
        found = self._needed(name).get_slice(name).get_dtype()
        if found not in _PRECISIONS:
            raise ValueError(
                f"{self._folder}: {name} is stored as {found}; this conversion reads {', '.join(_PRECISIONS)}"
            )
        return _PRECISIONS[found]

    def _needed(self, name: str) -> Any:
        if name not in self._of:
            raise ValueError(f"{self._folder}: has no tensor {name}")
        return self._of[name]


def _shards(folder: Path) -> Mapping[str, list[str] | None]:
    """The files to read, each with the names of its tensors, or None for all that it holds."""
    index, single = folder / _INDEX, folder / _SINGLE
    if not index.exists() and not index.is_symlink():
        if single.exists() or single.is_symlink():
            return {_SINGLE: None}
        other = next(iter([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]), None)
        why = f"; {other.name} is a pickle, save the model as safetensors" if other is not None else ""
        raise ValueError(f"{folder}: neither {_SINGLE} nor {_INDEX} there{why}")
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index}: weight_map must name the file of every tensor")
    shards: dict[str, list[str]] = {}
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: weight_map.{name}: {file!r} is not a *.safetensors file of this folder")
        shards.setdefault(file, []).append(name)
    if single.exists() and _SINGLE not in shards:
        raise ValueError(
            f"{folder}: {_SINGLE} and the shards of {_INDEX} are two models, and tools differ in which they read; "
            "remove the stale one"
        )
    return shards


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(needed(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: is cut short or damaged: {error}") from error
