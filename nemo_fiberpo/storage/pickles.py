"""What may be unpickled: the few classes of which Megatron's and Lightning's checkpoints consist, and tensors.

A pickle names functions and has them called, so one that somebody else wrote runs their code. Megatron-core and NeMo
load `common.pt`, `.metadata`, the byte items of shards and weights of older formats without restriction. `restrict()`
changes that for the whole process and for those that it starts; nothing else in this package unpickles.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import re
from collections.abc import Iterator
from typing import IO, Any

import torch

from nemo_fiberpo.megatron.patching import Patch, Patches

_FORCE, _UNFORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_REFUSED = re.compile(r"(?:unsupported|Unsupported global:) GLOBAL ([\w.]+)|([\w.]+) does not belong in the metadata")
_DCP = "torch.distributed.checkpoint"
_METADATA: dict[str, tuple[str, ...]] = {
    f"{_DCP}.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("BytesStorageMetadata", "TensorStorageMetadata", "ChunkStorageMetadata"),
    ),
    f"{_DCP}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    f"{_DCP}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreSavePlan",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "collections": ("OrderedDict", "defaultdict"),
}
"""What the `.metadata` of a distributed checkpoint is made of."""


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in the metadata of a checkpoint: not loaded")


class _Restricted:
    """The module `pickle` to torch's reader of checkpoints, which loads only what `_Metadata` does."""

    def __getattr__(self, name: str) -> Any:
        return getattr(pickle, name)

    @staticmethod
    def load(file: IO[bytes]) -> Any:
        return _Metadata(file).load()


def _refused(_self: Any, *_arguments: Any, **_options: Any) -> Any:
    raise pickle.UnpicklingError("a codec that unpickles: not loaded")


_restricted: Patches | None = None


def restrict() -> None:
    """From now on torch.load accepts only tensors, plain values and `_safe_classes`, whatever its arguments, and the
    metadata of distributed checkpoints only its own classes. Anything else is an error that names it, see `named`."""
    global _restricted
    if _restricted is not None:
        return
    os.environ[_FORCE] = "1"
    os.environ.pop(_UNFORCE, None)
    torch.serialization.add_safe_globals(_safe_classes())
    patches = [Patch(f"{_DCP}.filesystem", "pickle", "unpickles .metadata", _Restricted())]
    if importlib.util.find_spec("numcodecs") is not None:  # of zarr, an older format of distributed checkpoints
        patches.append(Patch("numcodecs.pickles:Pickle", "decode", "unpickles", _refused))
    _restricted = Patches(patches)
    _restricted.apply()


@contextlib.contextmanager
def named(where: object) -> Iterator[None]:
    """Turn a refusal into a ValueError that names `where` and the class or function."""
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is not an Exception
        found = _REFUSED.search(str(error))
        if found is None:
            raise
        name = next(filter(None, found.groups()))
        raise ValueError(
            f"{where}: a pickle in it names {name}, which is not loaded; only tensors, plain values and the "
            "classes of Megatron-core's checkpoints are"
        ) from error


def lift() -> None:
    """Undo `restrict()`."""
    global _restricted
    if _restricted is None:
        return
    _restricted.undo()
    _restricted = None
    del os.environ[_FORCE]
    ours = _safe_classes()
    kept = [entry for entry in torch.serialization.get_safe_globals() if entry not in ours]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(kept)


def _safe_classes() -> list[Any]:
    """The classes of Lightning's part of a checkpoint: OmegaConf's configuration, counters, empty extra states."""
    from collections import OrderedDict, defaultdict
    from io import BytesIO
    from pathlib import PosixPath

    from omegaconf import DictConfig, ListConfig
    from omegaconf.base import ContainerMetadata, Metadata
    from omegaconf.nodes import AnyNode, BooleanNode, BytesNode, FloatNode, IntegerNode, PathNode, StringNode

    nodes = [AnyNode, BooleanNode, BytesNode, FloatNode, IntegerNode, PathNode, StringNode]
    return [
        *(DictConfig, ListConfig, ContainerMetadata, Metadata, *nodes),
        *(PosixPath, Any, bool, int, float, str, bytes, list, dict, tuple, set, OrderedDict, defaultdict, BytesIO),
    ]
