"""The layout of generation: every rank runs whole sequences, and context-parallel ranks act as data-parallel ranks.

Decoding takes one token at a time, so there is no sequence to split. Sequence and context parallelism are switched off
for the existing model, and back on for log-probs and training. Megatron-core 0.11 reads the context-parallel group from
`parallel_state` at every use; Transformer Engine's modules keep theirs and have a setter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from nemo_aligner.utils import parallel_state

from nemo_fiberpo.megatron.patching import Patch, Patches

_SPLITS = {
    "sequence_parallel": False,
    "_sequence_parallel": False,  # NeMo's adapters
    "reduce_scatter_embeddings": False,
    "context_parallel_size": 1,
}
_single_rank_group: dist.ProcessGroup | None = None


def is_extended() -> bool:
    """Whether there are context-parallel ranks to generate on, in either layout."""
    return mpu.get_data_parallel_world_size(with_context_parallel=True) > mpu.get_data_parallel_world_size()


def generation_axis() -> tuple[int, int, dist.ProcessGroup]:
    """(rank, size, group) of the axis over which prompts are dealt: data parallel times context parallel.

    Within NeMo-Aligner's region that reshards for TensorRT-LLM, rank and size are those of generation, and the group is
    the smaller one of training.
    """
    if not is_extended():
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        return rank, size, mpu.get_data_parallel_group()
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    return dist.get_rank(group), dist.get_world_size(group), group


@contextlib.contextmanager
def whole_sequences(chunks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Switch off sequence and context parallelism of the model's chunks within the block."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    holders = {id(holder): holder for module in modules for holder in (module, getattr(module, "config", None))}
    with contextlib.ExitStack() as stack:
        if mpu.get_context_parallel_world_size() > 1:
            stack.enter_context(_no_context_parallel(modules))
        stack.enter_context(_switched_off(holders.values(), _SPLITS))
        yield


def config_without_sequence_parallel(actor: Any) -> contextlib.AbstractContextManager[None]:
    """Disable sequence parallelism in the configs that NeMo's generation reads beside the modules' own."""
    configs = (actor.cfg, actor.model_parallel_config, actor.transformer_config)
    return _switched_off(configs, {"sequence_parallel": False})


@contextlib.contextmanager
def _switched_off(holders: Iterable[Any], off: Mapping[str, Any]) -> Iterator[None]:
    """Give the attributes that `holders` have the values of `off` within the block."""
    before = [
        (holder, name, getattr(holder, name))
        for holder in holders
        for name, value in off.items()
        if getattr(holder, name, value) != value
    ]
    try:
        for holder, name, _ in before:
            setattr(holder, name, off[name])
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


@contextlib.contextmanager
def _no_context_parallel(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    global _single_rank_group
    if _single_rank_group is None:
        _single_rank_group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    keeping = [module for module in modules if hasattr(module, "set_context_parallel_group")]
    names = ("cp_group", "cp_global_ranks", "cp_stream", "cp_comm_type")
    kept = [[getattr(module, name, None) for name in names] for module in keeping]
    patches = Patches(
        (
            Patch("megatron.core.parallel_state", "_CONTEXT_PARALLEL_GROUP", "only this rank", _single_rank_group),
            Patch("megatron.core.parallel_state", "_CONTEXT_PARALLEL_GLOBAL_RANKS", "this rank", [dist.get_rank()]),
        )
    )
    patches.apply()
    RotaryEmbedding.forward.cache_clear()  # it caches embeddings sliced for this rank
    for module in keeping:
        module.set_context_parallel_group(None, None, None)  # type: ignore[operator]
    try:
        yield
    finally:
        for module, (group, ranks, stream, comm_type) in zip(keeping, kept, strict=True):
            more: dict[str, Any] = {} if comm_type is None else {"cp_comm_type": comm_type}
            module.set_context_parallel_group(group, ranks, stream, **more)  # type: ignore[operator]
        patches.undo()
        RotaryEmbedding.forward.cache_clear()
