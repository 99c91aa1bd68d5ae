"""Budgets from recorded drifts: the quantile, the order of channels and levels, the shares beyond, and the YAML."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from nemo_fiberpo.analysis.calibrate import calibrate, round_up
from nemo_fiberpo.analysis.drifts import drifts_of
from nemo_fiberpo.analysis.explanation import divergence_bounds, explain, hierarchy_yaml
from nemo_fiberpo.analysis.runs import Run
from nemo_fiberpo.cli import main
from nemo_fiberpo.config import load_hierarchy
from nemo_fiberpo.objective import Budget, SlopeCap
from tests.analysis.runs import optimizer_step, write, write_identity

NAMES = ("code", "math")


def steps(rl_steps: int, *positions) -> list[dict]:
    """Each RL step: one on-policy optimizer step, then one with each of these drifts."""
    rows = []
    for rl_step in range(rl_steps):
        for at, drifts in enumerate(({}, *positions)):
            rows += optimizer_step(rl_step, rl_step * (len(positions) + 1) + at, drifts, NAMES)
    return rows


@pytest.fixture
def run(tmp_path) -> Path:
    """Trajectories drift evenly up to 0.1 (pos) and 0.06 (neg) at the last step, half as far at the one before."""
    even = np.arange(1, 101) / 100
    last = {"domain": ([0.02, 0.01], [0.01, 0.008]), "trajectory": (0.1 * even, 0.06 * even)}
    before = {"domain": ([0.01, 0.005], [0.005, 0.004]), "trajectory": (0.05 * even, 0.03 * even)}
    write(tmp_path / "metrics.jsonl", *steps(5, before, last))
    write_identity(tmp_path)
    return tmp_path


def test_a_budget_is_the_quantile_of_the_drift_at_the_last_optimizer_step(run):
    proposal = calibrate(run, passing=0.9)
    # by hand: the larger of two domains, at 0.02 and 0.01; 9 of 10 trajectories are up to 0.09 and 0.054, known from
    # histograms to within a bin, a factor of 2^(1/4)
    assert proposal.budgets["domain"] == Budget(0.02, 0.01)
    assert 0.09 / 2**0.25 < proposal.budgets["trajectory"].pos < 0.09 * 2**0.25
    assert 0.054 / 2**0.25 < proposal.budgets["trajectory"].neg < 0.054 * 2**0.25
    assert proposal.positions == (1, 2) and proposal.rollouts == 5
    assert proposal.cut == pytest.approx(0.09), "the mean of 0.03, 0.06 to 0.15 at steps 2, 5 to 14"
    assert proposal.gated["domain", "pos"] == (0.0, 0.0)
    for channel in ("pos", "neg"):
        before, last = proposal.gated["trajectory", channel]
        assert before == 0.0 and 0.0 < last <= 0.1
    assert proposal == calibrate(Run(run), passing=0.9), "the rule is deterministic"
    wider = calibrate(run, passing=0.99)
    assert wider.budgets["trajectory"].pos > proposal.budgets["trajectory"].pos


def test_cells_with_names_are_known_exactly_and_get_budgets_where_asked(run):
    proposal = calibrate(run)
    assert proposal.cells["domain"] == {"code": Budget(0.02, 0.01), "math": Budget(0.011, 0.008)}
    assert "budgets" not in proposal.hierarchy["strata"]["domain"]
    own = calibrate(run, cells=True).hierarchy["strata"]["domain"]
    assert own["budgets"] == {"code": {"pos": 0.02, "neg": 0.01}, "math": {"pos": 0.011, "neg": 0.008}}
    write_identity(
        run, hierarchy__strata__domain__budgets__math__pos=0.3, hierarchy__strata__domain__budgets__math__neg=0.1
    )
    assert set(calibrate(run).hierarchy["strata"]["domain"]["budgets"]) == {"math"}, "as in the run"


def test_channels_and_levels_keep_their_order_by_widening(tmp_path):
    # neg drifts further than pos, and the domain further than trajectories beyond it
    drifts = {"domain": ([0.01, 0.01], [0.03, 0.03]), "trajectory": ([0.012] * 8, [0.006] * 8)}
    write(tmp_path / "metrics.jsonl", *steps(3, drifts))
    write_identity(tmp_path)
    proposal = calibrate(tmp_path)
    assert proposal.budgets["domain"] == Budget(0.04, 0.03), "C- is 3/4 of C+"
    assert proposal.budgets["trajectory"] == Budget(0.04, 0.03), "no smaller than the coarser one"
    assert proposal.token_clip == 0.03, "the smaller budget of the finest stratum"
    why = "domain, pos: 0.01 by its drift, raised to 0.04 because neg is 0.03"
    assert any(why in line for line in proposal.widened)
    assert all(share == 0.0 for shares in proposal.gated.values() for share in shares)


def test_a_stratum_that_coincides_with_its_parent_gets_its_budget(tmp_path):
    drifts = {"domain": ([0.02, 0.0], [0.01, 0.0]), "trajectory": ([0.0] * 4, [0.0] * 4)}
    write(tmp_path / "metrics.jsonl", *steps(3, drifts))
    write_identity(tmp_path)
    proposal = calibrate(tmp_path)
    assert proposal.budgets["trajectory"] == proposal.budgets["domain"] == Budget(0.02, 0.01)
    assert set(proposal.cells["domain"]) == {"code"}, "math did not drift"


def test_the_hierarchy_is_that_of_the_run_with_other_budgets(run, tmp_path):
    proposal = calibrate(run)
    file = tmp_path / "calibrated.yaml"
    file.write_text(hierarchy_yaml(proposal, "a run"))
    hierarchy = load_hierarchy(file)
    assert {stratum.name: stratum.budget for stratum in hierarchy.strata} == proposal.budgets
    assert hierarchy.strata[1].slope == SlopeCap(32) and hierarchy.token_clip == proposal.token_clip
    assert yaml.safe_load(file.read_text())["strata"]["trajectory"]["slope"] == {"cap": 32}


def test_several_runs_count_as_one(run, tmp_path):
    other = tmp_path / "other"
    drifts = {"domain": ([0.03, 0.001], [0.001, 0.001]), "trajectory": ([0.001] * 100, [0.001] * 100)}
    write(other / "metrics.jsonl", *steps(5, drifts, drifts))
    write_identity(other, seed=2)
    both = calibrate([run, other], passing=0.7)
    # by hand: 20 domains, of 0.03, 0.02, 0.01 and 0.001 five each; 70 percent are up to 0.02
    assert both.budgets["domain"].pos == 0.02 and both.rollouts == 10
    write_identity(other, hierarchy__strata__domain__budget__pos=0.05)
    with pytest.raises(ValueError, match=r"other/run\.json: its hierarchy differs"):
        calibrate([run, other])


def test_strata_without_figures_keep_their_budgets(run):
    order = ["domain", "prompt_group", "trajectory"]
    write_identity(
        run,
        hierarchy__strata__order=order,
        hierarchy__strata__prompt_group__budget__pos=0.7,
        hierarchy__strata__prompt_group__budget__neg=0.6,
        hierarchy__strata__prompt_group__enabled=False,
    )
    proposal = calibrate(run)
    assert list(proposal.hierarchy["strata"]) == order and "prompt_group" not in proposal.budgets
    assert proposal.hierarchy["strata"]["prompt_group"] == {"budget": {"pos": 0.7, "neg": 0.6}, "enabled": False}


def test_a_stratum_without_cells_at_the_last_step_keeps_its_budget(run):
    later = {"trajectory": ([0.2] * 4, [0.1] * 4)}
    write(run / "metrics.jsonl", *steps(2, {"domain": ([0.02, 0.01], [0.01, 0.01])}, later))
    proposal = calibrate(run)
    assert set(proposal.budgets) == {"trajectory"} == {stratum for stratum, _ in proposal.gated}
    assert proposal.hierarchy["strata"]["domain"]["budget"] == {"pos": 0.04, "neg": 0.03}
    assert "trajectory" in explain(proposal, "a run")


def test_histograms_beyond_their_last_bins_end_at_the_largest_drift(tmp_path):
    # uses of 0, of 1000 and of 3000: below the first bin, and above the last one
    drifts = {"trajectory": ([0.0, 0.0, 250.0, 750.0], [1e-6] * 4)}
    write(tmp_path / "metrics.jsonl", *steps(1, drifts))
    found = drifts_of(Run(tmp_path).optimizer_steps, ["trajectory"])["trajectory", "pos"].cells[1]
    assert len(found) == 4 and found.max() <= 750.0 and (found > 0.25 * 2**8).sum() == 2
    assert (found < 0.25 * 2**-8).sum() == 2


def test_drifts_that_are_not_finite_are_left_out(run):
    before = calibrate(run)
    lost = {f"train_optim/gates/domain/{channel}/drift_max": None for channel in ("pos", "neg")}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"rl_step": 9, "step": 99, "train_optim/grad_norm": 1.0, **lost}) + "\n")
    assert calibrate(run) == before


def test_what_cannot_be_calibrated_is_explained(run):
    with pytest.raises(ValueError, match="passing: must be between 0 and 1"):
        calibrate(run, passing=1.0)
    still = {"domain": ([0.0, 0.0], [0.0, 0.0]), "trajectory": ([0.0] * 4, [0.0] * 4)}
    write(run / "metrics.jsonl", *steps(2, still))
    with pytest.raises(ValueError, match="stratum domain: did not drift"):
        calibrate(run)
    write(run / "metrics.jsonl", *steps(2))
    with pytest.raises(ValueError, match=r"no drift of a stratum.*algorithm\.optimizer_steps"):
        calibrate(run)
    write(run / "run.json", {"identity": {"seed": 1}})
    with pytest.raises(ValueError, match=r"run\.json: does not record a hierarchy"):
        calibrate(run)
    (run / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json: not the record of a run"):
        calibrate(run)


def test_numbers_are_rounded_up_to_two_digits():
    assert [round_up(x) for x in (0.0101, 0.01, 0.0999, 0.12, 3.14, 1e-5)] == [0.011, 0.01, 0.1, 0.12, 3.2, 1e-5]


def test_divergences_are_bounded_by_the_sums_of_the_budgets_up_the_chain():
    bounds = divergence_bounds([Budget(0.04, 0.03), Budget(0.12, 0.05)])
    assert np.allclose(bounds, [(0.03, 0.035), (0.08, 0.12)])
    # Log-ratios of one cell at its budgets: half of the tokens rise by 2 C+, half fall by 2 C-. Its KL to the second
    # order and its TV to the first are what the bounds say.
    ratio = np.exp([0.08, -0.06])
    assert -np.log(ratio).mean() <= 0.03 and np.abs(ratio - 1).mean() / 2 == pytest.approx(0.035, rel=0.05)


def test_the_command_prints_the_budgets_and_writes_the_hierarchy(run, tmp_path, capsys):
    out = tmp_path / "new" / "calibrated.yaml"
    arguments = ["calibrate", str(run), "--pass", "0.9", "--out", str(out)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "90% of a stratum's cells pass at optimizer step 3" in said and "What the budgets allow" in said
    assert explain(calibrate(run, 0.9), str(run)) in said
    assert load_hierarchy(out).strata[0].budget == Budget(0.02, 0.01)
    (run / "metrics.jsonl").unlink()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "metrics.jsonl" in error
