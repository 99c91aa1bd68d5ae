"""Cells and bytes of a step: against the real exchange, reducer and objective on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_fiberpo import load_hierarchy
from nemo_fiberpo.objective import Hierarchy, PpoClip, RatioGating
from nemo_fiberpo.plan.cells import Partitions, PromptLabels, step_cells
from tests.plan.configs import ROOT
from tests.support import distributed

GROUP, PROMPTS = 4, 6
NAMES = ("cold", "warm", "hot")


def hierarchy_of(name: str) -> Hierarchy:
    return load_hierarchy(ROOT / "conf" / "hierarchy" / f"{name}.yaml")


def joined() -> Hierarchy:
    """A chain with a stratum of the experts that trajectories use."""
    budget = {"pos": 0.1, "neg": 0.1}
    strata = [
        {"name": "domain", "budget": budget, "budgets": {"code": budget}},
        {"name": "prompt_group", "budget": budget},
        {"name": "trajectory", "budget": budget},
        {"name": "trajectory_expert", "join": ["trajectory", "expert_partition"], "budget": budget},
    ]
    return load_hierarchy({"token_clip": 0.1, "strata": strata, "expert_partitions": {"by": "expert"}})


def clip_alone() -> Hierarchy:
    """Its one stratum is switched off."""
    strata = [{"name": "trajectory", "budget": {"pos": 0.1, "neg": 0.1}, "enabled": False}]
    return load_hierarchy({"token_clip": 0.1, "strata": strata})


CASES: list[tuple[str, int, int, RatioGating | None]] = [
    ("domain", 2, 1, None),
    ("domain", 2, 2, None),
    ("trajectory", 3, 1, None),
    ("modality_join", 2, 1, None),
    ("modality_sweep", 2, 1, None),
    ("domain", 2, 1, PpoClip(0.2, 0.2)),
    ("joined", 2, 2, None),
    ("clip_alone", 2, 1, None),
]
MADE_HERE = {"joined": joined, "clip_alone": clip_alone}


def labels_and_case(name: str) -> tuple[Hierarchy, PromptLabels, Partitions | None]:
    hierarchy = MADE_HERE[name]() if name in MADE_HERE else hierarchy_of(name)
    labels = PromptLabels.assumed(hierarchy, PROMPTS, {"domain": 3, "modality": 2})
    return hierarchy, labels, Partitions(NAMES) if name == "joined" else None


def counted(rank: int, world: int, name: str, cp: int, gating: RatioGating | None) -> tuple[dict[str, int], int, int]:
    """Cells, calls and bytes of a step whose samples have many tokens each, dealt and split as in training."""
    from nemo_fiberpo.megatron.agreement import agreement
    from nemo_fiberpo.megatron.exchange import exchange
    from nemo_fiberpo.megatron.groups import Axis, Reducer, TokenAxes
    from nemo_fiberpo.objective import surrogate

    hierarchy, prompts, partitions = labels_and_case(name)
    dp, length = world // cp, 12
    generator = torch.Generator().manual_seed(3)
    samples = torch.arange(PROMPTS * GROUP)[rank // cp :: dp]
    columns: dict[str, Any] = {"prompt_group": samples // GROUP, "trajectory": samples}
    columns |= {key: torch.tensor(values)[samples // GROUP] for key, values in prompts.labels.items()}
    labels = {key: columns[key][:, None].expand(-1, length).reshape(-1) for key in hierarchy.columns if key in columns}
    names = {key: prompts.names[key] for key in labels if key in prompts.names}
    if partitions is not None:
        labels["expert_partition"] = torch.arange(length).repeat(len(samples)) % len(NAMES)
        names["expert_partition"] = list(NAMES)
    cells = hierarchy.cells(labels, names=names, shape=(len(samples), length))
    axes = TokenAxes(
        (
            Axis("tp", 1, 0, sharded=False),
            Axis("cp", cp, rank % cp, sharded=True),
            Axis("dp", dp, rank // cp, sharded=True),
        )
    )
    shared = exchange([cells], axes)[0]
    reducer = Reducer(axes)
    log_ratio = torch.randn(cells.num_tokens, generator=generator) * 0.2
    riders = agreement(axes, 1, None, log_ratio.device)
    surrogate(log_ratio, log_ratio * 0.1, shared, hierarchy, reducer, gating, riders=riders)
    assert dist.get_world_size() == world
    return {level.name: level.num_cells for level in shared.levels}, reducer.calls, reducer.bytes


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "dp", "cp", "gating"), CASES)
def test_cells_calls_and_bytes_are_what_the_reducer_counts(name: str, dp: int, cp: int, gating: RatioGating | None):
    hierarchy, prompts, partitions = labels_and_case(name)
    planned = step_cells(
        hierarchy, prompts, prompts_per_step=PROMPTS, group=GROUP, dp=dp, cp=cp, positions=12, partitions=partitions,
        gating=gating,
    )  # fmt: skip
    for cells, calls, size in distributed.run(counted, dp * cp, name, cp, gating):
        assert {stratum: number for stratum, (number, _) in planned.strata.items()} == cells
        assert (planned.calls, planned.bytes) == (calls, size)


def test_soft_memberships_have_the_cells_of_hard_ones_at_most():
    hierarchy, prompts, partitions = labels_and_case("joined")
    assert partitions is not None
    sizes = {"prompts_per_step": PROMPTS, "group": GROUP, "dp": 2, "cp": 1, "positions": 8}
    hard = step_cells(hierarchy, prompts, partitions=partitions, **sizes)
    soft = step_cells(hierarchy, prompts, partitions=Partitions(NAMES, soft=True), **sizes)
    assert (
        soft.strata
        == hard.strata
        == {
            "domain": (3, 3),
            "prompt_group": (PROMPTS, PROMPTS),
            "trajectory": (PROMPTS * GROUP, 0),
            "trajectory_expert": (PROMPTS * GROUP * len(NAMES), 0),
        }
    )


def test_a_domain_of_three_by_hand():
    """Two ranks, 3 domains, 6 groups: 9 shared cells, two numbers each, in both reductions. Beside them, in the first
    one the objective's counts and the agreement; in the second J, the report (a level: 18 + 6 names + 6 x 2 ranks)."""
    hierarchy, prompts, _ = labels_and_case("domain")
    planned = step_cells(hierarchy, prompts, prompts_per_step=PROMPTS, group=GROUP, dp=2, cp=1, positions=1)
    assert {name: shared for name, (_, shared) in planned.strata.items()} == {
        "domain": 3,
        "prompt_group": 6,
        "trajectory": 0,
    }
    one = step_cells(hierarchy, prompts, prompts_per_step=PROMPTS, group=GROUP, dp=1, cp=1, positions=1)
    # Alone, a rank has no shared cells and one slot for maxima instead of two: 3 levels x 6 and the largest log-ratio.
    assert planned.bytes - one.bytes == 8 * (2 * 2 * 9 + 3 * 6 + 1)


def test_states_are_as_many_as_there_are_positions():
    planned = step_cells(
        hierarchy_of("state"), PromptLabels.assumed(hierarchy_of("state"), 4, {}),
        prompts_per_step=4, group=2, dp=2, cp=1, positions=10,
    )  # fmt: skip
    assert planned.strata["state"] == (40, 40)


def test_assumed_labels_nest_and_have_the_names_that_budgets_use():
    hierarchy = hierarchy_of("tree")
    prompts = PromptLabels.assumed(hierarchy, 32, {"domain": 4, "task": 6})
    assert prompts.names["domain"][:2] == ["code", "math"]
    assert len(set(prompts.labels["domain"])) == 4
    parents = set(zip(prompts.labels["task"], prompts.labels["domain"], strict=True))
    assert len(parents) == len({task for task, _ in parents})


def test_the_most_varied_prompts_of_a_data_set():
    prompts = PromptLabels({"domain": [0] * 10 + [1, 2]}, {"domain": ["a", "b", "c"]}, counted=True)
    chosen = prompts.most_varied(4)
    assert {prompts.labels["domain"][prompt] for prompt in chosen} == {0, 1, 2} and len(chosen) == 4


def test_one_pass_has_one_reduction_without_cells():
    hierarchy, prompts, _ = labels_and_case("trajectory")
    sizes = {"prompts_per_step": PROMPTS, "group": GROUP, "dp": 2, "cp": 1, "positions": 1}
    assert step_cells(hierarchy, prompts, passes=1, **sizes).calls == 1


def test_labels_of_tokens_make_cells_in_every_combination():
    budget = {"budget": {"pos": 0.1, "neg": 0.1}}
    strata = {"trajectory": budget, "inside": {"join": ["trajectory", "segment", "time"], **budget}}
    hierarchy = load_hierarchy({"token_clip": 0.1, "strata": strata, "branches": {"tool": budget}})
    of_tokens = {"segment": ["think", "answer"], "time": ["0-7", "8-end"], "tool": ["a", "b", "c"], "unused": ["x"]}
    prompts = PromptLabels.assumed(hierarchy, 4, {}, of_tokens)
    sizes = {"prompts_per_step": 4, "group": 2, "dp": 2, "cp": 1, "positions": 1}
    planned = step_cells(hierarchy, prompts, of_tokens=of_tokens, **sizes)
    assert planned.strata == {"trajectory": (8, 0), "inside": (32, 0), "tool": (3, 3)}
    assert planned.calls == hierarchy.num_reductions == 4
