"""Which prompts a step takes and who trains on which samples."""

from collections import Counter

import pytest
import torch

from nemo_fiberpo import nemo_cpu

nemo_cpu.install()
from nemo_fiberpo.aligner.rollout.dealing import (  # noqa: E402
    PromptSampler,
    deal_groups,
    grouped_rollout,
    padded_share,
    response_mask,
)


def sampler(consumed, rank=0, ranks=1, total=23, per_step=8, micro=2, seed=5):
    return PromptSampler(
        total_samples=total,
        consumed_samples=consumed,
        micro_batch_size=micro,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        drop_last=True,
        global_batch_size=per_step,
        seed=seed,
    )


def step_prompts(step, ranks=1, **options):
    return [i for rank in range(ranks) for batch in sampler(8 * step, rank, ranks, **options) for i in batch]


def test_an_epoch_takes_every_prompt_at_most_once_and_a_rollout_is_always_whole():
    for epoch in range(4):
        taken = [i for step in (2 * epoch, 2 * epoch + 1) for i in step_prompts(step)]
        assert len(taken) == 16
        assert max(Counter(taken).values()) == 1
    left_out = [set(range(23)) - {i for step in (2 * e, 2 * e + 1) for i in step_prompts(step)} for e in range(4)]
    assert len({frozenset(missing) for missing in left_out}) > 1, "every epoch leaves out others"


def test_a_rollouts_prompts_do_not_depend_on_the_number_of_ranks():
    for step in range(5):
        assert sorted(step_prompts(step)) == sorted(step_prompts(step, ranks=2)) == sorted(step_prompts(step, ranks=4))


def test_deal_groups_keeps_groups_whole_and_ranks_equal():
    group = torch.arange(12).repeat_interleave(4)[torch.randperm(48, generator=torch.Generator().manual_seed(0))] * 7
    dealt = deal_groups(group, minibatches=3, ranks=2, seed=1)
    everything = torch.cat([samples for rank in dealt for samples in rank])
    assert sorted(everything.tolist()) == list(range(48))
    for number in range(3):
        assert [len(rank[number]) for rank in dealt] == [8, 8]
        groups = [set(group[torch.cat([rank[n] for rank in dealt])].tolist()) for n in range(3)]
    assert not groups[0] & groups[1] and not groups[1] & groups[2] and not groups[0] & groups[2]
    assert all(len(part) == 4 for part in groups)


def test_deal_groups_is_the_same_split_into_minibatches_on_any_number_of_ranks():
    group = torch.arange(8).repeat_interleave(4)
    whole = [{*part.tolist()} for part in deal_groups(group, 2, 1, seed=3)[0]]
    for ranks in (2, 4):
        dealt = deal_groups(group, 2, ranks, seed=3)
        assert [{i for rank in dealt for i in rank[n].tolist()} for n in range(2)] == whole


def test_whole_groups_stay_on_one_rank_and_together():
    group = torch.arange(8).repeat_interleave(4)[torch.randperm(32, generator=torch.Generator().manual_seed(2))]
    dealt = deal_groups(group, minibatches=2, ranks=2, seed=3, whole_groups=True)
    scattered = deal_groups(group, minibatches=2, ranks=2, seed=3)
    for number in range(2):
        ranks = [dealt[rank][number] for rank in range(2)]
        assert {*torch.cat(ranks).tolist()} == {i for rank in scattered for i in rank[number].tolist()}
        for samples in ranks:
            assert group[samples].view(2, 4).diff(dim=1).eq(0).all(), "runs of whole groups"


def test_deal_groups_refuses_what_cannot_be_split():
    with pytest.raises(ValueError, match=r"optimizer_steps: 3 must divide the 4 prompt groups"):
        deal_groups(torch.arange(4), 3, 1, seed=0)
    with pytest.raises(ValueError, match="5 samples per optimizer step"):
        deal_groups(torch.tensor([0, 0, 0, 0, 0]), 1, 2, seed=0)


def test_chunks_of_all_ranks_are_the_rollout():
    rollout = grouped_rollout(2)()
    rollout["prompt_index"] = torch.arange(4).repeat_interleave(2)
    rollout["rewards"] = torch.arange(8.0)
    chunks = [rollout.chunk(rank, 2, seed=9) for rank in range(2)]
    assert sorted(torch.cat([chunk["trajectory"] for chunk in chunks]).tolist()) == list(range(8))
    for chunk in chunks:
        assert torch.equal(chunk["rewards"], chunk["trajectory"].float())


def test_response_mask_by_hand():
    # prompt of 2 tokens, 3 of response: the tokens at 2, 3, 4 are predicted by entries 1, 2, 3
    mask = response_mask(torch.tensor([2, 1, 4]), torch.tensor([5, 2, 4]), width=5)
    assert mask.int().tolist() == [[0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_padded_share_covers_everything_once_in_equally_many_batches():
    shares = [padded_share(range(11), rank, 3, 2) for rank in range(3)]
    assert {len(share) for share in shares} == {2}
    assert all(len(batch) == 2 for share in shares for batch, _ in share)
    assert sorted(i for share in shares for batch, real in share for i in batch[:real]) == list(range(11))
