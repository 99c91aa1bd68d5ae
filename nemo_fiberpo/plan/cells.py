"""The cells of an optimizer step and the bytes of its reductions, by running the objective on stand-in tokens.

Every sample is one token on every context-parallel rank (or one for each combination of an expert partition and labels
of `token_labels`, or for each position if states are a stratum). Cells, censuses and buffer sizes are then those of a
run; where the number of cells depends on data, it is the maximum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import mul

import torch
from torch import Tensor

from nemo_fiberpo.labelling.expert_partitions import COLUMN, soft_membership
from nemo_fiberpo.objective import Cells, Hierarchy, RatioGating, SharedCells, build_cells, surrogate
from nemo_fiberpo.objective.report import empty_fields, pack

AGREEMENT = 4
"""Numbers of `megatron.agreement` in the first reduction of a step."""
OF_ROLLOUT = ("prompt_group", "trajectory", "state")


@dataclass(frozen=True)
class PromptLabels:
    """Labels of prompts: column -> label of each prompt, -1 for none; and the names of label values."""

    labels: Mapping[str, Sequence[int]]
    names: Mapping[str, Sequence[str]]
    counted: bool

    @classmethod
    def assumed(
        cls, hierarchy: Hierarchy, prompts: int, counts: Mapping[str, int], of_tokens: Collection[str] = ()
    ) -> PromptLabels:
        """For `prompts` prompts with `counts` label values per column (default 8): every column of the chain nests in
        the one before it, and those of joins and branches meet every combination that fits. `of_tokens` are columns
        without labels of prompts."""
        own = [name for name in hierarchy.columns if name not in (*OF_ROLLOUT, COLUMN, *of_tokens)]
        chain = [stratum.name for stratum in hierarchy.active if not stratum.join and stratum not in hierarchy.branches]
        labels: dict[str, list[int]] = {}
        names: dict[str, list[str]] = {}
        combinations = 1
        for name in sorted(own, key=lambda name: name not in chain):
            wanted = _wanted(hierarchy, name)
            count = max(counts.get(name, 8), len(wanted))
            if name in chain:
                combinations *= -(-count // combinations)
                count, labels[name] = combinations, [prompt % combinations for prompt in range(prompts)]
            else:
                labels[name] = [prompt // combinations % count for prompt in range(prompts)]
                combinations *= count
            names[name] = [*wanted, *(f"{name} {number}" for number in range(len(wanted), count))]
        return cls(labels, names, counted=False)

    def most_varied(self, prompts: int) -> list[int]:
        """`prompts` prompts of the data set with as many label combinations as possible."""
        columns = list(self.labels.values())
        total = len(columns[0]) if columns else prompts
        first: dict[tuple[int, ...], int] = {}
        for prompt in range(total):
            first.setdefault(tuple(column[prompt] for column in columns), prompt)
        chosen = list(first.values())[:prompts]
        return chosen + [chosen[index % len(chosen)] for index in range(prompts - len(chosen))]


def _wanted(hierarchy: Hierarchy, column: str) -> list[str]:
    """Names of label values that the hierarchy itself uses."""
    found: dict[str, None] = {}
    for stratum in hierarchy.active:
        found |= dict.fromkeys(stratum.only.get(column, ()))
        if stratum.name == column:
            found |= dict.fromkeys(stratum.budgets)
        elif column in stratum.join:
            parts = [name.split("/") for name in stratum.budgets]
            place = stratum.join.index(column)
            found |= {part[place]: None for part in parts if len(part) == len(stratum.join)}
    return list(found)


@dataclass(frozen=True)
class Partitions:
    """Partitions of experts: their names, and whether a token belongs to all of them by mass."""

    names: Sequence[str]
    soft: bool = False


@dataclass(frozen=True)
class StepCells:
    """Cells of one optimizer step.

    strata     stratum -> (cells over all ranks, those that several ranks hold)
    calls      reductions of a step that is not on-policy;  bytes: of all their buffers, as `groups.Reducer` counts
    exchanged  bytes of the censuses of one rank, for one step
    """

    strata: dict[str, tuple[int, int]]
    calls: int
    bytes: int
    exchanged: int


def step_cells(
    hierarchy: Hierarchy,
    prompts: PromptLabels,
    *,
    prompts_per_step: int,
    group: int,
    dp: int,
    cp: int,
    positions: int,
    partitions: Partitions | None = None,
    of_tokens: Mapping[str, Sequence[str]] | None = None,
    gating: RatioGating | None = None,
    passes: int = 2,
    whole_groups: bool = False,
) -> StepCells:
    """The cells of an optimizer step of whole prompt groups, dealt to the ranks as `dealing.deal_groups` deals them.

    positions   tokens of a response, where states are a stratum
    of_tokens   names of the labels of `token_labels` by column
    """
    chosen = prompts.most_varied(prompts_per_step)
    samples = torch.arange(prompts_per_step * group)
    together = whole_groups or passes == 1
    of_ranks = samples.chunk(dp) if together else [samples[rank::dp] for rank in range(dp)]
    shards = [own for own in of_ranks for _ in range(cp)]
    made = [
        _cells(hierarchy, prompts, chosen, own, group, positions, partitions, of_tokens or {})
        for own in shards[:: max(1, cp)]
    ]
    censuses = [cells.census() for cells in made for _ in range(cp)]
    cells = made[0].share(censuses, 0)
    table = torch.cat(censuses)
    strata = {}
    for index, level in enumerate(cells.levels):
        _, holders = table[table[:, 0] == index, 1].unique(return_counts=True)
        strata[level.name] = level.num_cells, int((holders > 1).sum())
    calls, numbers = _reductions(hierarchy, cells, gating, passes)
    trajectories = build_cells(["trajectory"], {"trajectory": shards[0]}).census()
    return StepCells(strata, calls, 8 * numbers, 8 * (censuses[0].numel() + trajectories.numel()))


def _cells(
    hierarchy: Hierarchy,
    prompts: PromptLabels,
    chosen: Sequence[int],
    samples: Tensor,
    group: int,
    positions: int,
    partitions: Partitions | None,
    of_tokens: Mapping[str, Sequence[str]],
) -> Cells:
    """The cells of one rank's samples."""
    sizes = {name: len(found) for name, found in of_tokens.items() if name in hierarchy.columns}
    if partitions is not None and not partitions.soft:
        sizes[COLUMN] = len(partitions.names)
    strides = dict(zip(sizes, itertools.accumulate(sizes.values(), mul, initial=1), strict=False))
    repeats = positions if "state" in hierarchy.columns else math.prod(sizes.values())
    sample = samples.repeat_interleave(repeats)
    within = torch.arange(repeats).repeat(len(samples))
    prompt = sample // group
    known = {"prompt_group": prompt, "trajectory": sample, "state": prompt * repeats + within}
    labels, names = {}, {**prompts.names, **of_tokens}
    for name in hierarchy.columns:
        if name == COLUMN:
            assert partitions is not None
            names[name] = list(partitions.names)
            even = torch.ones(len(sample), len(partitions.names))
            labels[name] = soft_membership(even) if partitions.soft else within // strides[name] % sizes[name]
        elif name in of_tokens:
            labels[name] = within // strides[name] % sizes[name]
        elif name in known:
            labels[name] = known[name]
        else:
            labels[name] = torch.tensor(prompts.labels[name])[torch.tensor(chosen)[prompt]]
    # Without an active stratum there are no labels; the mask gives the number of tokens.
    live = torch.ones(len(sample), dtype=torch.bool)
    return hierarchy.cells(labels, live, names={name: names[name] for name in labels if name in names})


def _reductions(hierarchy: Hierarchy, cells: SharedCells, gating: RatioGating | None, passes: int) -> tuple[int, int]:
    """Reductions of one step, and the numbers in their buffers."""
    if passes == 1:
        return 1, 1 + sum(part.numel() for part in pack(empty_fields(cells), cells).values())
    sizes: list[int] = []

    def reduce(buffer: Tensor) -> Tensor:
        sizes.append(buffer.numel())
        return buffer * cells.world_size  # as if every rank had the same

    nothing = torch.zeros(cells.num_tokens)
    surrogate(nothing, nothing, cells, hierarchy, reduce, gating, old_log_probs=nothing)
    return len(sizes), sum(sizes) + AGREEMENT
