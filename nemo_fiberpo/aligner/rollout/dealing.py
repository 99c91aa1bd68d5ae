"""Which prompts an RL step takes, and which samples of the rollout every rank trains on, in whole prompt groups."""

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
    """NeMo's random sampler with the order of prompts a function of `consumed_samples` (prompts) alone.

    RL step s of an epoch takes prompts [s p, (s + 1) p) of that epoch's permutation, p = global_batch_size, dealt to
    the data-parallel ranks in micro-batches. NeMo's own deals each rank a fixed part of the data set and, where p does
    not divide it, ends an epoch with a rollout that is too short; here what is left over sits out the epoch, and each
    epoch leaves out others. So a resumed run neither skips nor repeats a prompt, on any number of ranks.
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
    """NeMo-Aligner's batches of prompts, every prompt `repeats` times in a row."""

    repeats = 1

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in super().__iter__():
            yield {name: column.repeat_interleave(self.repeats, dim=0) for name, column in batch.items()}


def repeated_prompts(repeats: int) -> type[RepeatedPrompts]:
    """The batch iterator class that `PPOTrainer` wants, for a number of samples per prompt."""
    return type("RepeatedPrompts", (RepeatedPrompts,), {"repeats": repeats})


def deal_groups(
    group: Tensor, minibatches: int, ranks: int, seed: int, whole_groups: bool = False
) -> list[list[Tensor]]:
    """Indices of the samples of each rank's minibatches: [rank][minibatch] -> int64.

    group  int64 [N], the prompt group of each sample. The groups are shuffled by `seed`, each minibatch gets as many
           whole groups, and its samples go to the ranks in turn, so that every rank has equally many; with
           `whole_groups` in runs, so that the samples of a group stay together.

    Raises ValueError where that cannot be done. A pure function: every rank computes the same.
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
        for rank in range(ranks):
            dealt[rank].append(samples.chunk(ranks)[rank] if whole_groups else samples[rank::ranks])
    return dealt


class GroupedRollout(PPORolloutBatch):
    """NeMo-Aligner's rollout batch, split by whole prompt groups into the minibatches of the optimizer steps."""

    minibatches = 1
    whole_groups = False

    def gather_and_balance_globally(self) -> GroupedRollout:
        """All samples of the rollout on every rank, those of context-parallel ranks too."""
        if not is_extended():
            return super().gather_and_balance_globally()
        _, _, group = generation_axis()
        gathered = type(self)()
        for name, column in self.data.items():
            gathered[name] = rebalance_nd_tensor(column, group=group)
        return gathered

    def chunk(self, rank: int, split_size: int, seed: int) -> GroupedRollout:
        """This rank's samples, ordered by minibatch; equally many each. `trajectory` numbers the samples of the
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
    """bool [b, width]: True at entries of response tokens. Entry t belongs to the token at position t + 1.

    prompt_lengths and response_lengths (prompt included) [b], in tokens.
    """
    position = torch.arange(1, width + 1, device=prompt_lengths.device)
    return (position >= prompt_lengths[:, None]) & (position < response_lengths[:, None])


def padded_share(items: Sequence[int], rank: int, ranks: int, batch: int) -> list[tuple[list[int], int]]:
    """This rank's batches of `items`: (items, how many of them are real), the rest repeats to fill a batch.

    As many batches on every rank, so that collectives inside generation match.
    """
    per_round = ranks * batch
    batches = []
    for start in range(0, len(items), per_round):
        own: list[Any] = list(items[start : start + per_round])[rank::ranks]
        batches.append((own + [items[0]] * (batch - len(own)), len(own)))
    return batches
