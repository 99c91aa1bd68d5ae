"""The cost of an optimizer step in a plan: the measured f of docs/performance.md, or those of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from nemo_fiberpo import load_hierarchy
from nemo_fiberpo.objective import Gspo, Hierarchy, PpoClip, RatioGating
from nemo_fiberpo.plan.passes import Dealing, PassesCost, StepCosts, step_costs
from nemo_fiberpo.step_cost import FORWARD, FORWARD_RECOMPUTED, MEASURED, MeasuredShares, auto_cost
from tests.plan.configs import ROOT, Run, plan_of

SHUFFLED = Dealing(group=8, micro=8, whole_groups=False, cp=1, alone=False)
WHOLE = Dealing(group=8, micro=8, whole_groups=True, cp=1, alone=False)
SPLIT = Dealing(group=8, micro=8, whole_groups=False, cp=2, alone=False)
ALONE = Dealing(group=8, micro=8, whole_groups=False, cp=1, alone=True)
OVERRIDES = "algorithm.passes=auto", "trainer.devices=2"


def hierarchy_of(name: str, **more: object) -> Hierarchy:
    return load_hierarchy(yaml.safe_load((ROOT / "conf" / "hierarchy" / f"{name}.yaml").read_text()) | more)


def costs_of(
    hierarchy: Hierarchy, dealing: Dealing = SHUFFLED, gating: RatioGating | None = None, recomputed: bool = False
) -> StepCosts:
    return step_costs(hierarchy, gating, dealing, recomputed, None)


def auto_of(*given: object, **more: object) -> PassesCost:
    return costs_of(*given, **more).of["auto"]  # type: ignore[arg-type]


def row_of(entry: MeasuredShares) -> str:
    mean = sum(entry.shares) / len(entry.shares)
    by_place = ", ".join(f"{share:.2f}" for share in entry.shares)
    costs = f"{1 + mean:.2f} | {auto_cost(entry.shares, FORWARD):.2f}"
    return f"| {entry.rows} | {entry.microbatches} | {by_place} | {mean:.2f} | {costs} |"


def test_the_document_has_the_measured_shares_and_what_follows_from_them():
    text = (ROOT / "docs" / "performance.md").read_text()
    _, quickstart, study = text.split("\n| rows | micro-batches | f at step 2, 3, 4 |")
    study, _ = study.split("The same with 16 optimizer steps")
    tables = {"quickstart": quickstart, "study": study}
    for entry in MEASURED:
        assert row_of(entry) in tables[entry.run], row_of(entry)
    assert sum(table.count("\n| ") for table in tables.values()) == len(MEASURED)
    assert f"| `2` | 2 | {1 + FORWARD:.2f} | {1 + FORWARD_RECOMPUTED:.2f} |" in text


def test_a_mean_cost_by_hand():
    """Steps with f = 0.1 and 0.5: the first is optimistic, 1.1, the second has two passes, 1.32, 1.25 if recomputed.
    With f = 0.3 recomputation decides."""
    assert auto_cost((0.1, 0.5), FORWARD) == pytest.approx((1.1 + 1.32) / 2)
    assert auto_cost((0.1, 0.5), FORWARD_RECOMPUTED) == pytest.approx((1.1 + 1.25) / 2)
    assert auto_cost((0.3,), FORWARD) == 1.3 and auto_cost((0.3,), FORWARD_RECOMPUTED) == 1.25


@pytest.mark.parametrize(
    ("name", "dealing", "gating"),
    [
        ("trajectory", SHUFFLED, None),
        ("group", WHOLE, None),
        ("domain", ALONE, None),
        ("domain", SPLIT, PpoClip(0.2, 0.2)),
        ("domain", SHUFFLED, Gspo(0.2, 0.2)),
    ],
)
def test_f_is_zero_where_no_gate_couples_two_micro_batches(name: str, dealing: Dealing, gating: RatioGating | None):
    auto = auto_of(hierarchy_of(name), dealing, gating)
    assert auto.cost == auto.forward == (1.0, 1.0) and auto.why.startswith("f is 0")


@pytest.mark.parametrize(
    ("name", "dealing", "gating"),
    [
        ("trajectory", SPLIT, None),
        ("modality_sweep", SHUFFLED, None),
        ("domain", SPLIT, Gspo(0.2, 0.2)),
    ],
)
def test_what_was_not_measured_has_its_bounds(name: str, dealing: Dealing, gating: RatioGating | None):
    found = costs_of(hierarchy_of(name), dealing, gating)
    assert (
        found.of["auto"].cost == (1.0, 1.0 + FORWARD)
        and "not measured" in found.of["auto"].why
        and found.advice is None
    )


def test_gates_that_never_pass_take_two_passes():
    assert auto_of(hierarchy_of("domain", gate="soft")).forward == (2.0, 2.0)


def test_whole_groups_are_recommended_where_they_cost_less():
    shuffled, whole = costs_of(hierarchy_of("domain")), costs_of(hierarchy_of("domain"), WHOLE)
    assert shuffled.of["auto"].cost[1] > whole.of["auto"].cost[1]
    assert shuffled.advice is not None and "whole_groups" in shuffled.advice and whole.advice is None
    assert costs_of(hierarchy_of("trajectory")).advice is None
    narrow = costs_of(hierarchy_of("domain"), Dealing(group=8, micro=1, whole_groups=False, cp=1, alone=False)).advice
    assert narrow is not None and narrow.endswith(
        "model.micro_batch_size a multiple of algorithm.samples_per_prompt = 8"
    )


def test_one_pass_is_refused_by_the_stratum_that_spans_micro_batches():
    assert costs_of(hierarchy_of("domain")).of["1"].why == "refused if a cell of domain spans micro-batches"
    assert costs_of(hierarchy_of("trajectory")).of["1"].why == costs_of(hierarchy_of("group")).of["1"].why == ""


def test_recomputation_lowers_the_cost_of_two_passes():
    assert costs_of(hierarchy_of("domain"), recomputed=True).of["2"].cost == (1.25, 1.25)
    plan = plan_of("cluster/llama3_1_8b", "algorithm.passes=auto")
    assert plan.costs is not None and plan.costs.recomputed


def test_the_plan_prints_seven_lines_and_counts_the_third_reduction(run: Run):
    printed = run("quickstart", *OVERRIDES)[1]
    block = next(part for part in printed.split("\n\n") if "algorithm.passes" in part)
    assert len(block.splitlines()) <= 7 and "measured on quickstart and study, shuffled" in block
    two, auto = plan_of("quickstart", OVERRIDES[1]), plan_of("quickstart", *OVERRIDES)
    assert two.costs is None and two.cells is not None and auto.cells is not None and auto.batches is not None
    flags = 2 * auto.batches.microbatches(2)
    assert (auto.cells.calls, auto.cells.bytes) == (two.cells.calls + 1, two.cells.bytes + 8 * flags)
    assert json.loads(run("quickstart", *OVERRIDES, "--json")[1])["costs"]["of"]["auto"]["cost"]


def steps_of(folder: Path, *rollouts: Sequence[float | None]) -> Path:
    """A run: f of the off-policy optimizer steps of each rollout, None for a step of two passes."""
    lines: list[dict[str, float]] = []
    for rl_step, shares in enumerate(rollouts):
        for place, share in enumerate([None, *shares]):
            row: dict[str, float] = {"rl_step": rl_step, "step": len(lines), "train_optim/grad_norm": 1.0}
            row["train_optim/on_policy"] = float(place == 0)
            lines.append(row if share is None else row | {"train_optim/second_pass": share})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_f_of_a_run_replaces_what_was_measured(tmp_path: Path, run: Run):
    """Places: means 0.2 and 0.6, and one that was never tried, after that of 0.6. Costs 1.2, 1.32 and 1.32."""
    folder = steps_of(tmp_path, [0.1, 0.6, None], [0.3, None, None])
    printed = run("quickstart", *OVERRIDES, "--run", str(folder))[1]
    line = next(line for line in printed.splitlines() if line.startswith("  auto "))
    assert line.split()[1:] == ["1.73", "1.28", "f", "0.47,", "of", str(folder)]


def test_a_run_without_second_passes_is_refused(tmp_path: Path, run: Run):
    status, printed, said = run("quickstart", *OVERRIDES, "--run", str(steps_of(tmp_path, [None])))
    assert status == 2 and not printed and "no optimizer step has 'train_optim/second_pass'" in said
    assert run("quickstart", "--run", str(tmp_path / "none"))[0] == 2
