"""Refusal of what would count a drift twice: by the configuration alone, and by a data set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from tests.objective.cases import stratum


def joined(*parts: str, name: str = "both") -> fpo.Stratum:
    return stratum(name, 0.03, *parts)


DOMAIN, TRAJECTORY, EXPERT = stratum("domain"), stratum("trajectory"), stratum("expert")
CHAIN = (DOMAIN, stratum("prompt_group"), TRAJECTORY)
OFF = stratum("domain", enabled=False)
REFUSALS: list[tuple[str, tuple[Any, ...], tuple[Any, ...], str]] = [
    ("the chain's name", CHAIN, (DOMAIN,), r"branches\[0\]\.name: 'domain' is already .*would count its drift twice"),
    ("two of a name", CHAIN, (EXPERT, EXPERT), r"branches\[1\]\.name: 'expert' is already the name of branches\[0\]"),
    ("a join with itself", (joined("domain", "domain"),), (), r"strata\[0\]\.join: names 'domain' twice"),
    ("a join of one", (joined("domain"),), (), r"strata\[0\]\.join: must name two or more"),
    ("a join named as its part", (joined("both", "x"),), (), r"strata\[0\]\.join: names 'both' itself"),
    (
        "a join of nested strata",
        (*CHAIN, joined("prompt_group", "domain")),
        (),
        r"strata\[3\]\.join: every prompt_group lies in one domain, .* their join is prompt_group itself",
    ),
    ("a coarser part below", (joined("domain", "modality"), DOMAIN), (), r"strata\[0\]\.join: 'domain' is coarser"),
    (
        "a join of a join",
        (joined("domain", "modality"), joined("both", "task", name="all")),
        (),
        r"strata\[1\]\.join: 'both' is a join; name what it joins instead: \['domain', 'modality'\]",
    ),
    (
        "a join twice",
        (joined("domain", "modality"), joined("modality", "domain", name="again")),
        (),
        r"strata\[1\]\.join: strata\[0\] \('both'\) is the join of the same classifications",
    ),
    (
        "a branch that a join refines",
        (DOMAIN, joined("domain", "modality"), TRAJECTORY),
        (stratum("modality"),),
        r"branches\[0\]: every trajectory lies in one modality, .*nothing would be left for the budget of modality",
    ),
    (
        "a branch that is a part of another",
        CHAIN,
        (joined("expert", "layer"), EXPERT),
        r"branches\[1\]: every both lies in one expert.*Put expert before both",
    ),
    (
        "a branch that refines the finest",
        CHAIN,
        (joined("trajectory", "expert"),),
        r"branches\[0\]: every both lies in one trajectory.* belongs into `strata`, after trajectory",
    ),
    ("only in a branch", CHAIN, (stratum("expert", only={"domain": ["a"]}),), r"branches\[0\]\.only: .*cover every"),
    ("beside nothing", CHAIN, (stratum("x", beside="domian"),), r"branches\[0\]\.beside: .*did you mean 'domain'\?"),
    ("beside one off", (OFF, TRAJECTORY), (stratum("x", beside="domain"),), r"branches\[0\]\.beside: .* switched off"),
    ("no chain", (OFF,), (EXPERT,), r"branches\[0\]: a branch stands beside a chain"),
    ("beside in the chain", (stratum("a", beside="b"),), (), r"strata\[0\]\.beside: is for branches"),
    ("only of a finer one", (stratum("x", only={"domain": ["a"]}), DOMAIN), (), r"only\.domain: is not coarser"),
    ("only of nothing", (DOMAIN, stratum("x", only={"domian": ["a"]})), (), r"only\.domian: is no .*'domain'\?"),
    ("only of one off", (OFF, TRAJECTORY, stratum("x", only={"domain": ["a"]})), (), r"only\.domain: is switched off"),
]


@pytest.mark.parametrize(("strata", "branches", "message"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_what_double_counts_is_refused(strata: tuple[Any, ...], branches: tuple[Any, ...], message: str):
    with pytest.raises(ValueError, match=message):
        fpo.Hierarchy(strata, 0.1, branches)


def test_what_does_not_double_count_is_taken():
    fpo.Hierarchy((DOMAIN, joined("domain", "modality"), TRAJECTORY), 0.1, (stratum("modality", beside="domain"),))
    fpo.Hierarchy(CHAIN, 0.1, (joined("domain", "expert"), stratum("expert", beside="domain")))
    fpo.Hierarchy((joined("domain", "modality"), TRAJECTORY), 0.1, (EXPERT, replace(EXPERT, name="layer")))


def data(**labels: list[int]) -> dict[str, Tensor]:
    """Four prompts; a rollout has trajectories only."""
    return {"prompt_group": torch.arange(4), **{name: torch.tensor(values) for name, values in labels.items()}}


def test_what_double_counts_in_a_data_set_is_refused():
    crossed = data(domain=[0, 0, 1, 1], modality=[0, 1, 0, 1])
    beside = stratum("modality", beside="domain")
    good = fpo.Hierarchy(CHAIN, 0.1, (beside,))
    good.check_data(crossed)
    fpo.Hierarchy((DOMAIN, joined("domain", "modality"), TRAJECTORY), 0.1).check_data(crossed)
    fpo.Hierarchy(CHAIN, 0.1, (EXPERT,)).check_data(crossed)  # labels of the rollout
    everything = {**crossed, "trajectory": torch.arange(4)}
    with pytest.raises(ValueError, match=r"branch 'modality': in this data every trajectory lies in one modality"):
        fpo.Hierarchy(CHAIN, 0.1, (stratum("modality"),)).check_data(everything)
    with pytest.raises(ValueError, match=r"branch 'modality': in this data every domain lies in one modality"):
        good.check_data(data(domain=[0, 0, 1, 1], modality=[0, 0, 1, 1]))
    with pytest.raises(ValueError, match=r"branch 'modality': in this data .* belongs into `strata`, after domain"):
        good.check_data(data(domain=[0, 0, 1, 1], modality=[0, 1, 2, 2]))
    with pytest.raises(ValueError, match=r"branch 'b': in this data every modality lies in one b"):
        same = {**crossed, "b": crossed["modality"]}
        replace(good, branches=(beside, stratum("b", beside="domain"))).check_data(same)
    with pytest.raises(ValueError, match=r"stratum 'both', join: in this data every modality lies in one domain"):
        fpo.Hierarchy((DOMAIN, joined("domain", "modality")), 0.1).check_data(
            data(domain=[0, 0, 1, 1], modality=[0, 1, 2, 2])
        )
    # masked tokens are not looked at
    good.check_data({**crossed, "modality": torch.tensor([0, 1, 0, -1])}, torch.tensor([True, True, True, False]))
