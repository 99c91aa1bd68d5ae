"""What a real run leaves: docs/metrics.md has every key of it, and `fiberpo compare` and `calibrate` read it."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch

from nemo_fiberpo.aligner.rewards.reward_model import reward_metrics
from nemo_fiberpo.aligner.rollout.experts import routing_metrics
from nemo_fiberpo.cli import main
from nemo_fiberpo.config import load_hierarchy
from nemo_fiberpo.rewards import OK
from tests.support.launching import ROOT, optimizer_steps

pytestmark = pytest.mark.timeout(600)
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


def test_the_keys_of_a_run_are_documented(uninterrupted: Path):
    keys = {key for line in (uninterrupted / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert len(keys) > 80 and not unknown(keys)
    always = [
        p for p, when in documented().items() if when.startswith(("every RL", "every opt", "every str", "every li"))
    ]
    assert len(always) > 30
    assert not [pattern for pattern in always if not any(re.fullmatch(pattern, key) for key in keys)]


def test_compare_and_calibrate_read_a_run(uninterrupted: Path, tmp_path: Path, capsys):
    assert main(["compare", str(uninterrupted), "--out", str(tmp_path / "out")]) == 0
    assert "no heldout_before.jsonl and heldout_after.jsonl" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.png", "compare.html", "compare.csv"}
    file = tmp_path / "calibrated.yaml"
    assert main(["calibrate", str(uninterrupted), "--pass", "0.8", "--out", str(file)]) == 0
    hierarchy = load_hierarchy(file)
    assert [stratum.name for stratum in hierarchy.strata] == ["domain", "prompt_group", "trajectory"]
    # By hand for the coarsest: at the last of 4 optimizer steps, the falls of every domain of every rollout.
    last = [row for row in optimizer_steps(uninterrupted) if row["step"] % 4 == 3]
    key = re.compile(r"train_optim/gates/domain\.\w+/neg/drift")
    drifts = sorted(value for row in last for name, value in row.items() if key.fullmatch(name))
    at_least = drifts[math.ceil(0.8 * len(drifts)) - 1]
    assert len(drifts) > 4 and at_least <= hierarchy.strata[0].budget.neg <= 1.1 * at_least


def test_the_keys_of_graders_and_of_routing_are_documented():
    graded = reward_metrics(torch.ones(2), torch.tensor([0, 1]), torch.full((2,), OK), ["a", "b"], True)
    routed = routing_metrics(torch.tensor([[3.0, 1.0], [1.0, 0.0]]), ["hot", "cold"])
    keys = {f"train_rollouts/{key}" for key in graded} | {f"train_optim/{key}" for key in routed}
    assert len(keys) == 11 and not unknown(keys)
    assert unknown({"train_optim/gates/domain/pos/median"}) == ["train_optim/gates/domain/pos/median"]
