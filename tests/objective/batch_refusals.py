"""Labels, masks, names, shapes and data sets that a hierarchy refuses: random sound batches with one thing wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tests.objective.config_refusals import (
    CHAIN,
    DOMAIN,
    GROUP,
    TRAJECTORY,
    config,
    edited,
    stratum,
)
from tests.objective.random_hierarchies import Draw

NUM = 24
NAMES = {"domain": ["code", "math"]}
TREE = config(DOMAIN, stratum("task", only={"domain": ["math"]}), TRAJECTORY)
NESTED = config(DOMAIN, stratum("task", only={"domain": ["math"]}), stratum("topic", only={"task": ["b"]}), TRAJECTORY)
JOIN = config(stratum("crossing", join=["domain", "modality"]), TRAJECTORY)
BRANCH = config(DOMAIN, TRAJECTORY, branches=(stratum("modality"),))
SOFT = config(DOMAIN, GROUP, TRAJECTORY, stratum("trajectory_expert", join=["trajectory", "expert"]))


@dataclass(frozen=True)
class Batch:
    """Sound arguments; `at` is a live token, drawn at random, where something is made wrong."""

    labels: dict[str, Any]
    mask: Any
    log_ratio: Tensor
    weight: Tensor
    at: int
    config: dict[str, Any] = field(default_factory=lambda: CHAIN)
    names: Any = field(default_factory=lambda: NAMES)
    shape: Any = None

    def having(self, name: str, label: Any) -> Batch:
        return replace(self, labels={**self.labels, name: label})

    def without(self, name: str) -> Batch:
        return replace(self, labels={key: label for key, label in self.labels.items() if key != name})

    def marked(self, name: str, value: Any) -> Batch:
        """With another label at the token `at`."""
        label = self.labels[name].clone()
        label[self.at] = value
        return self.having(name, label)

    def cells(self, fpo: Any) -> Any:
        return fpo.load_hierarchy(self.config).cells(self.labels, self.mask, self.names, self.shape)

    def surrogate(self, fpo: Any, **more: Any) -> Any:
        return fpo.surrogate(self.log_ratio, self.weight, self.cells(fpo), fpo.load_hierarchy(self.config), **more)

    def part(self, first: int, last: int) -> Batch:
        """Tokens from first to last."""
        labels = {name: label[first:last] for name, label in self.labels.items()}
        tokens = (value[first:last] for value in (self.mask, self.log_ratio, self.weight))
        return replace(self, **dict(zip(("mask", "log_ratio", "weight"), tokens, strict=True)), labels=labels)


def sound(seed: int, **more: Any) -> Batch:
    """Two domains of three groups, two trajectories each, in an order drawn at random; some tokens are masked."""
    draw = Draw(seed)
    trajectory = torch.from_numpy(draw.rng.permutation(NUM)) % 12
    labels = {"trajectory": trajectory, "prompt_group": trajectory // 2, "domain": trajectory // 6}
    labels |= {"task": trajectory // 3, "topic": trajectory // 3, "modality": torch.arange(NUM) % 2}
    share = torch.zeros(NUM, 3, dtype=torch.uint8)
    share[:, 0] = torch.from_numpy(draw.values(200, NUM))
    share[:, 2] = 255 - share[:, 0]
    at = draw.whole(0, NUM // 2 - 1)
    mask = torch.from_numpy(draw.values(6, NUM) > 0)
    mask[at] = mask[-1] = True
    ell, weight = (torch.from_numpy(draw.normal(NUM)) for _ in range(2))
    return Batch({**labels, "expert": share}, mask, 0.05 * ell, weight, at, **more)


def with_bad_token(batch: Batch, name: str, value: float) -> Batch:
    tokens = getattr(batch, name).clone()
    tokens[batch.at] = value
    return replace(batch, **{name: tokens})


def refused_labels() -> Iterator[tuple[str, Batch]]:
    """Labels, masks, names and shapes that `Hierarchy.cells` refuses."""
    b = sound(1)
    group = b.labels["prompt_group"]
    yield "no labels of a stratum", b.without("prompt_group")
    yield "no labels at all", replace(b, labels={})
    yield "int32 labels", b.having("prompt_group", group.int())
    yield "float labels", b.having("domain", b.labels["domain"].double())
    yield "a list of labels", b.having("trajectory", [0] * NUM)
    yield "labels in two dimensions", b.having("trajectory", b.labels["trajectory"].view(4, 6))
    yield "a label too few", b.having("prompt_group", group[1:])
    yield "a mask of int64", replace(b, mask=b.mask.long())
    yield "a mask too short", replace(b, mask=b.mask[:-2])
    yield "a list as mask", replace(b, mask=[True] * NUM)
    for shape in ((5, 6), (-4, -6), (4.0, 6.0), (24,), (True, 24)):
        yield f"shape {shape}", replace(b, shape=shape)
    yield "names of no stratum", replace(b, names={**NAMES, "domian": ["a"]})
    yield "a name twice", replace(b, names={"domain": ["code", "code"]})
    yield "overrides without names", replace(b, names=None)
    yield "an override of no cell", replace(b, names={"domain": ["cod", "math"]})
    for seed in range(3):
        b = sound(10 + seed)
        other = (int(b.labels["prompt_group"][b.at]) + 3) % 6
        yield f"a trajectory in two groups, {seed}", b.marked("prompt_group", other)
        yield f"a group in two named domains, {seed}", b.marked("domain", 1 - int(b.labels["domain"][b.at]))
        yield f"a label without name, {seed}", b.marked("domain", 2 + seed)
        yield f"a negative label of a stratum with names, {seed}", b.marked("domain", -1 - seed)


def refused_made_labels() -> Iterator[tuple[str, Batch]]:
    """The same for missing levels, joins, branches and soft membership."""
    for seed in range(2):
        inside = next(b for n in range(100, 200) if int((b := sound(n + 100 * seed)).labels["domain"][b.at]) == 1)
        tree = replace(inside, config=TREE)
        yield f"no label where a stratum is there, {seed}", tree.marked("task", -1 - seed)
        yield (
            f"a cell across the edge of a missing level, {seed}",
            tree.having("trajectory", torch.where(torch.arange(NUM) == inside.at, 3, inside.labels["trajectory"])),
        )
        yield f"a branch without a label, {seed}", replace(inside, config=BRANCH).marked("modality", -3 - seed)
        yield f"a join without a label, {seed}", replace(inside, config=JOIN).marked("modality", -2 - seed)
        soft = replace(inside, config=SOFT)
        share = soft.labels["expert"].clone()
        share[soft.at, 1] += 1 + seed
        yield f"shares that do not sum to 255, {seed}", soft.having("expert", share)
        yield f"a label without name beside shares, {seed}", soft.marked("domain", 4 + seed)
        yield f"a trajectory in two groups beside shares, {seed}", soft.marked("prompt_group", 0)
    b = sound(2)
    tree, join, soft = (replace(b, config=entry) for entry in (TREE, JOIN, SOFT))
    unnamed = edited(TREE, "strata", 0, stratum("domain"))
    yield "only without names", replace(b, config=unnamed, names=None)
    yield "only of no cell", replace(b, config=edited(TREE, "strata", 1, "only", "domain", ["maths"]))
    yield "only of a cell of a stratum that is missing", replace(b, config=NESTED, names={**NAMES, "task": ["a", "c"]})
    yield "no labels of a stratum with only", tree.without("task")
    yield "no labels of a part", join.without("modality")
    yield "int32 labels of a part", join.having("modality", b.labels["modality"].int())
    yield "a part too large to be joined", join.marked("modality", 1 << 31)
    yield "names of a join", replace(join, names={**NAMES, "crossing": ["a"]})
    parts = ["domain", "modality", "task"]
    yield "three parts without names", replace(join, config=edited(JOIN, "strata", 0, "join", parts), names=None)
    named = {**NAMES, "modality": ["text", "image"]}
    yield "a part without name", replace(join.marked("modality", 5), names=named)
    crossed = edited(JOIN, "strata", 1, stratum("prompt_group"))
    yield "a join that is no refinement", replace(b, config=crossed, names=named)
    yield "no labels of a branch", replace(b, config=BRANCH).without("modality")
    yield "shares in 3 values with 2 names", replace(soft, names={**NAMES, "expert": ["low", "high"]})
    yield "two columns of shares", soft.having("trajectory", b.labels["expert"])
    yield "shares of uint8 in one dimension", soft.having("expert", b.labels["modality"].to(torch.uint8))
    yield "shares of int64", soft.having("expert", b.labels["expert"].long())
    yield "a mask too short for shares", replace(soft, mask=b.mask[1:])
    yield "a label too few beside shares", soft.having("prompt_group", b.labels["prompt_group"][1:])
    yield "shares and a wrong shape", replace(soft, shape=(5, 5))


def refused_data_sets() -> Iterator[tuple[str, dict[str, Any], dict[str, list[int]]]]:
    """Configurations that count twice what a data set shows to be the same; its tokens are prompts."""
    group = {"prompt_group": [0, 1, 2, 3]}
    beside = config(stratum("domain"), GROUP, branches=(stratum("modality", beside="domain"),))
    after = config(stratum("domain"), GROUP, branches=(stratum("modality"),))
    two = config(
        stratum("domain"), GROUP, branches=(stratum("modality", beside="domain"), stratum("b", beside="domain"))
    )
    join = config(stratum("domain"), stratum("crossing", join=["domain", "modality"]), GROUP)
    yield "a branch that the finest stratum refines", after, {**group, "domain": [0, 0, 1, 1], "modality": [0, 1, 0, 1]}
    yield "a branch that its stratum refines", beside, {**group, "domain": [0, 1, 2, 3], "modality": [0, 1, 0, 1]}
    yield "a branch that nests", beside, {**group, "domain": [0, 0, 1, 1], "modality": [0, 1, 2, 3]}
    crossed = {**group, "domain": [0, 0, 1, 1], "modality": [0, 1, 0, 1]}
    yield "a branch that another refines", two, {**crossed, "b": [0, 1, 0, 1]}
    yield "a join that is its part", join, {**group, "domain": [0, 0, 1, 1], "modality": [0, 1, 2, 3]}
    yield "a join that is its other part", join, {**group, "domain": [0, 1, 2, 3], "modality": [0, 1, 0, 1]}
