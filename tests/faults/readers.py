"""How a checkpoint is read, by each of the files that Megatron unpickles."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

from nemo_fiberpo.conversion import gpt


def read_common(folder: Path, found: Any) -> None:
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    torch.save(found, folder / "common.pt")
    TorchCommonLoadStrategy().load_common(folder)


def read_legacy_common(folder: Path, found: Any) -> None:
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    torch.save(found, folder / "common.pt", _use_new_zipfile_serialization=False)
    TorchCommonLoadStrategy().load_common(folder)


def read_bare_common(folder: Path, found: Any) -> None:
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    (folder / "common.pt").write_bytes(pickle.dumps(found))
    TorchCommonLoadStrategy().load_common(folder)


def read_optimizer(folder: Path, found: Any) -> None:
    """Where Lightning and the optimizer keep their part of a checkpoint."""
    read_common(folder, {"optimizer_states": [{"state": {0: {"step": found}}}], "hyper_parameters": {}})


def read_metadata(folder: Path, found: Any) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    (folder / ".metadata").write_bytes(pickle.dumps(found))
    FileSystemReader(folder).read_metadata()


def read_bytes_of_shards(folder: Path, found: Any) -> None:
    """`_extra_state` of a layer."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    with gpt.single_process_megatron():
        dist_checkpointing.save({"x": ShardedObject("x", found, (1,), (0,))}, str(folder))
        dist_checkpointing.load({"x": ShardedObject("x", None, (1,), (0,))}, str(folder))


def read_zarr(folder: Path, found: Any) -> None:
    """Of an older format of distributed checkpoints."""
    import numcodecs.pickles

    numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE = True  # as a user may have set it
    numcodecs.pickles.Pickle().decode(pickle.dumps(numpy.array([found], dtype=object)))


PICKLES: dict[str, Callable[[Path, Any], None]] = {
    "resume, common.pt": read_common,
    "resume, common.pt, legacy": read_legacy_common,
    "resume, common.pt, bare": read_bare_common,
    "resume, optimizer's state": read_optimizer,
    "resume, .metadata": read_metadata,
    "resume, shards": read_bytes_of_shards,
    "restore_from_path, zarr": read_zarr,
}
