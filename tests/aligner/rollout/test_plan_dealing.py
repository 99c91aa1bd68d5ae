"""`fiberpo plan` deals the samples of a step to ranks as the trainer does."""

from __future__ import annotations

import pytest
import torch

from nemo_fiberpo import load_hierarchy, nemo_cpu
from nemo_fiberpo.plan.cells import PromptLabels, step_cells

nemo_cpu.install()
from nemo_fiberpo.aligner.rollout.dealing import deal_groups  # noqa: E402

STRATA = [{"name": "prompt_group", "budget": {"pos": 0.1, "neg": 0.1}}]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_groups_on_several_ranks_are_those_that_the_trainer_deals_to_several(passes: int, ranks: int):
    prompts, samples = 6, 4
    group = torch.arange(prompts).repeat_interleave(samples)
    dealt = deal_groups(group, 1, ranks, seed=1, whole_groups=passes == 1)
    holders = [set(group[rank[0]].tolist()) for rank in dealt]
    several = sum(sum(number in held for held in holders) > 1 for number in range(prompts))
    hierarchy = load_hierarchy({"token_clip": 0.1, "strata": STRATA})
    planned = step_cells(
        hierarchy,
        PromptLabels.assumed(hierarchy, prompts, {}),
        prompts_per_step=prompts,
        group=samples,
        dp=ranks,
        cp=1,
        positions=1,
        passes=passes,
    )
    assert planned.strata == {"prompt_group": (prompts, several)}
