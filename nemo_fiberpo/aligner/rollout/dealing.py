"""Which prompts an RL step uses, and which samples each rank trains on, in whole prompt groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from nemo.collections.nlp.data.language_modeling.megatron.data_samplers import MegatronPretrainingRandomSampler
from nemo_aligner.algorithms.ppo import PPORolloutBatch
from nemo_aligner.utils.batch_iterators import DefaultBatchIterator
from nemo_aligner.utils.distributed import rebalance_nd_tensor
from torch import Tensor

from nemo_fiberpo.aligner.generation.inference_layout import generation_axis, is_extended


class PromptSampler(MegatronPretrainingRandomSampler):
    """NeMo's random sampler with the order of prompts a function of only `consumed_samples` (prompts).

    RL step s of an epoch uses prompts [s p, (s + 1) p) of that epoch's permutation, p = global_batch_size, dealt to the
    data-parallel ranks in micro-batches. The remainder of an epoch is left out, others in each epoch; NeMo's sampler
    would end the epoch with a short rollout. A resumed run neither skips nor repeats a prompt, on any number of ranks.
    """

    def __iter__(self) -> Iterator[list[int]]:
        steps = self.total_samples // self.global_batch_size
        step, within = divmod(self.consumed_samples, self.global_batch_size)
        assert within == 0, "a rollout takes whole batches of prompts"
        generator = torch.Generator()
        generator.manual_seed(self.seed + step // steps)
        order = torch.randperm(self.total_samples, generator=generator)
        first = step % steps * self.global_batch_size
        mine = order[first : first + self.global_batch_size].view(-1, self.data_parallel_size, self.micro_batch_size)
        for ids in mine[:, self.data_parallel_rank].tolist():
            self.consumed_samples += self.micro_batch_times_data_parallel_size
            yield ids


class RepeatedPrompts(DefaultBatchIterator):
    """NeMo-Aligner's batches of prompts, with every prompt `repeats` times in a row."""

    repeats = 1

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in super().__iter__():
            yield {name: column.repeat_interleave(self.repeats, dim=0) for name, column in batch.items()}


def repeated_prompts(repeats: int) -> type[RepeatedPrompts]:
    """The batch iterator class for `PPOTrainer`, with `repeats` samples per prompt."""
    return type("RepeatedPrompts", (RepeatedPrompts,), {"repeats": repeats})


def deal_groups(
    group: Tensor, minibatches: int, ranks: int, seed: int, whole_groups: bool = False
) -> list[list[Tensor]]:
    """Indices of the samples of each rank's minibatches: [rank][minibatch] -> int64.

    group  int64 [N], the prompt group of each sample. Groups are shuffled by `seed` and dealt to the minibatches.
           The samples of a minibatch go to the ranks in turn, or in runs with `whole_groups`, to keep groups together.

    Raises ValueError if the sizes do not divide. A pure function: every rank computes the same.
    """
    labels = group.unique()
    if len(labels) % minibatches:
        raise ValueError(f"optimizer_steps: {minibatches} must divide the {len(labels)} prompt groups of the rollout")
    generator = torch.Generator()
    generator.manual_seed(seed)
    order = labels[torch.randperm(len(labels), generator=generator)]
    place = torch.empty(int(labels.max()) + 1, dtype=torch.int64)
    place[order] = torch.arange(len(order))
    minibatch = place[group] // (len(labels) // minibatches)
    dealt: list[list[Tensor]] = [[] for _ in range(ranks)]
    for number in range(minibatches):
        samples = (minibatch == number).nonzero().squeeze(1)
        samples = samples[place[group[samples]].argsort(stable=True)]
        if len(samples) % ranks:
            raise ValueError(
                f"{len(samples)} samples per optimizer step cannot be dealt equally to {ranks} data-parallel ranks"
            )
        parts = samples.chunk(ranks) if whole_groups else [samples[rank::ranks] for rank in range(ranks)]
        for own, part in zip(dealt, parts, strict=True):
            own.append(part)
    return dealt


class GroupedRollout(PPORolloutBatch):
    """NeMo-Aligner's rollout batch, split into minibatches of whole prompt groups."""

    minibatches = 1
    whole_groups = False

    def gather_and_balance_globally(self) -> GroupedRollout:
        """All samples of the rollout on every rank, including those of context-parallel ranks."""
        if not is_extended():
            return super().gather_and_balance_globally()
        _, _, group = generation_axis()
        gathered = type(self)()
        for name, column in self.data.items():
            gathered[name] = rebalance_nd_tensor(column, group=group)
        return gathered

    def chunk(self, rank: int, split_size: int, seed: int) -> GroupedRollout:
        """This rank's samples, ordered by minibatch, equally many in each. `trajectory` numbers the samples of the
        rollout."""
        group = self.data["prompt_index"].cpu()
        indices = torch.cat(deal_groups(group, self.minibatches, split_size, seed, self.whole_groups)[rank])
        chunk = type(self)()
        for name, column in self.data.items():
            chunk[name] = column[indices.to(column.device)].clone()
        chunk["trajectory"] = indices.to(group.device)
        return chunk


def grouped_rollout(minibatches: int, whole_groups: bool = False) -> type[GroupedRollout]:
    """The rollout batch class for a number of minibatches; `whole_groups` as in `deal_groups`."""
    return type("GroupedRollout", (GroupedRollout,), {"minibatches": minibatches, "whole_groups": whole_groups})


def response_mask(prompt_lengths: Tensor, response_lengths: Tensor, width: int) -> Tensor:
    """bool [b, width]: True for response tokens. Entry t belongs to the token at position t + 1.

    prompt_lengths and response_lengths (prompt included) [b], in tokens.
    """
    position = torch.arange(1, width + 1, device=prompt_lengths.device)
    return (position >= prompt_lengths[:, None]) & (position < response_lengths[:, None])


def padded_share(items: Sequence[int], rank: int, ranks: int, batch: int) -> list[tuple[list[int], int]]:
    """This rank's batches of `items`: (items, number of real ones), padded with repeats. Equally many batches on every
    rank, so that collectives inside generation match."""
    per_round = ranks * batch
    batches = []
    for start in range(0, len(items), per_round):
        own: list[Any] = list(items[start : start + per_round])[rank::ranks]
        batches.append((own + [items[0]] * (batch - len(own)), len(own)))
    return batches
