"""Generation with NeMo's native loop, in lockstep over expert-parallel ranks.

NeMo decodes until every sample of its rank has ended. With expert parallelism each decoding step is a collective, so a
rank that stops early would leave its peers waiting forever. `Lockstep` makes all ranks of the group decode the same
number of steps: two guard rows give every rank the same shortest and longest prompt, and the first guard row ends only
when all samples of all ranks have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from nemo.collections.nlp.modules.common.text_generation_utils import synced_generate
from nemo_aligner.utils.text_generation_utils import TrackLengthGPTModelTextGenerationStrategy
from torch import Tensor

GUARD_ROWS = 2


def expert_group() -> dist.ProcessGroup | None:
    """The expert-parallel group of this rank, None if experts are not distributed."""
    return mpu.get_expert_model_parallel_group() if mpu.get_expert_model_parallel_world_size() > 1 else None


def add_guard_rows(tokens: Tensor, lengths: Tensor, eos_id: int, max_new_tokens: int, group: dist.ProcessGroup):
    """Prepend two rows, as long as the shortest and the longest prompt of any rank of `group`.

    tokens int64 [b, s], lengths int64 [b] -> the same with b + 2 rows and room for max_new_tokens after the longest
    prompt.
    """
    extremes = torch.stack([-lengths.min(), lengths.max()])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    shortest, longest = -int(extremes[0]), int(extremes[1])
    width = max(tokens.shape[1], longest + max_new_tokens)
    guarded = tokens.new_full((tokens.shape[0] + GUARD_ROWS, width), eos_id)
    guarded[GUARD_ROWS:, : tokens.shape[1]] = tokens
    # The content of a guard row does not matter; a prompt has tokens that the model knows.
    guarded[:GUARD_ROWS, : tokens.shape[1]] = tokens[0]
    return guarded, torch.cat([lengths.new_tensor([shortest, longest]), lengths])


class Lockstep(TrackLengthGPTModelTextGenerationStrategy):
    """NeMo-Aligner's strategy for a batch with `add_guard_rows`, ended for all ranks of `group` together."""

    def __init__(self, model: Any, context_lengths: Tensor, max_length: int, group: dist.ProcessGroup):
        super().__init__(model, context_lengths, max_length)
        self._group = group
        self._ended = torch.zeros(len(context_lengths), dtype=torch.bool, device=context_lengths.device)

    def end_of_generation_condition(self, tokens: Tensor, prev: Tensor, eod_id: int, end_strings: list[str]) -> Tensor:
        """Whether each row ends here. Guard row 0 ends when every sample of every rank has, guard row 1 at once."""
        ends = super().end_of_generation_condition(tokens, prev, eod_id, end_strings).bool()
        self._ended |= ends & (self._context_lengths < tokens.shape[1])
        waiting = torch.tensor([int(not bool(self._ended[GUARD_ROWS:].all()))], device=tokens.device)
        dist.all_reduce(waiting, op=dist.ReduceOp.MAX, group=self._group)
        ends = ends.clone()
        ends[0], ends[1] = not bool(waiting), True
        return ends


def generate_tokens(
    model: Any, tokens: Tensor, lengths: Tensor, strategy: Any, sampling: Mapping[str, Any], length: Mapping[str, Any]
) -> Tensor | None:
    """Sample responses: tokens int64 [b, s] with room behind each prompt, lengths [b] of the prompts.

    Returns int64 [b, longest], None on a middle pipeline stage. NeMo's `generate` also detokenizes every token, which
    nothing here needs. `min_length` is not supported: it would change the policy's distribution.
    """
    output = synced_generate(
        model,
        strategy,
        tokens,
        lengths,
        length["max_length"],
        all_probs=False,
        temperature=sampling["temperature"],
        top_k=sampling["top_k"],
        top_p=sampling["top_p"],
        greedy=sampling["use_greedy"],
        compute_attention_mask=not getattr(model, "get_attention_mask_from_fusion", True),
        repetition_penalty=sampling["repetition_penalty"],
        end_strings=list(sampling["end_strings"]),
        min_tokens_to_generate=0,
    )
    return None if output is None else output[0]


@contextlib.contextmanager
def deterministic(seed: int, step: int, data_parallel_rank: int) -> Iterator[None]:
    """Sample from a generator seeded by (seed, step, data-parallel rank), so that a resumed run draws what the
    uninterrupted one would have. Equal on tensor- and pipeline-parallel ranks, which must sample alike."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + data_parallel_rank) % 2**63)
        yield
