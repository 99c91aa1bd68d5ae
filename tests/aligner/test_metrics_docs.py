"""docs/metrics.md has every key that a run writes, and none that it should write and does not."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from nemo_fiberpo.aligner.experts import routing_metrics
from nemo_fiberpo.aligner.rewards import OK, reward_metrics
from tests.aligner.launching import ROOT

ROW = re.compile(r"^\| (`[^|]*`) \|[^|]*\| ([^|]*) \|", re.M)
PATTERNS = {"channel": "(pos|neg)", "cell": ".+", "stratum": "[^/.]+"}


def documented() -> dict[str, str]:
    """Regular expression of every documented key -> when it is written."""
    found = {"rl_step": "every line", "step": "every line"}
    for cell, when in ROW.findall((ROOT / "docs" / "metrics.md").read_text()):
        for key in re.findall(r"`([^`]*)`", cell):
            for choice in itertools.product(*(alternatives(part) for part in re.split(r"({[^}]*})", key))):
                pattern = re.sub(r"\\?<(\w+)\\?>", lambda m: PATTERNS.get(m[1], "[^/]+"), re.escape("".join(choice)))
                found[pattern] = when
    return found


def alternatives(part: str) -> list[str]:
    """`{a,"b,c"}` -> a and b,c."""
    if not part.startswith("{"):
        return [part]
    return [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|([^,{}"]+)', part)]


def unknown(keys: set[str]) -> list[str]:
    patterns = [re.compile(pattern) for pattern in documented()]
    return sorted(key for key in keys if not any(pattern.fullmatch(key) for pattern in patterns))


@pytest.mark.timeout(600)
def test_the_keys_of_a_run_are_documented(uninterrupted: Path):
    keys = {key for line in (uninterrupted / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert len(keys) > 80 and not unknown(keys)
    always = [
        p for p, when in documented().items() if when.startswith(("every RL", "every opt", "every str", "every li"))
    ]
    assert len(always) > 30
    assert not [pattern for pattern in always if not any(re.fullmatch(pattern, key) for key in keys)]


def test_the_keys_of_graders_and_of_routing_are_documented():
    graded = reward_metrics(torch.ones(2), torch.tensor([0, 1]), torch.full((2,), OK), ["a", "b"], True)
    routed = routing_metrics(torch.tensor([[3.0, 1.0], [1.0, 0.0]]), ["hot", "cold"])
    keys = {f"train_rollouts/{key}" for key in graded} | {f"train_optim/{key}" for key in routed}
    assert len(keys) == 11 and not unknown(keys)
    assert unknown({"train_optim/gates/domain/pos/median"}) == ["train_optim/gates/domain/pos/median"]
