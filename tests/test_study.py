"""examples/study: the config of every run is accepted, results are read right, the tables are those of the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "examples" / "study"))
try:
    import results
    import study_result
    import study_runs
finally:
    sys.path.remove(str(ROOT / "examples" / "study"))

RUNS = {run.name: run for stage in study_runs.read_study().values() for run in stage}
ONE_OF_EACH = {(run.setting, run.objective): run for run in RUNS.values()}


@pytest.mark.parametrize("run", ONE_OF_EACH.values(), ids=lambda run: f"{run.setting}-{run.objective}")
def test_the_config_of_a_run_is_accepted(run):
    compose = pytest.importorskip("nemo_fiberpo.cli.compose").compose
    checks = pytest.importorskip("nemo_fiberpo.aligner.config.checks")
    hydra_config = pytest.importorskip("nemo_fiberpo.hydra_support.command_line")
    settings = pytest.importorskip("nemo_fiberpo.aligner.config.sections").algorithm_settings
    cfg = compose("quickstart", ["run_dir=/nowhere", *hydra_config.overrides(run.overrides)])
    hierarchy = checks.check_sections(cfg)[0]
    settings(cfg).check_passes(hierarchy.active, cfg.model.micro_batch_size)
    assert cfg.model.optim.lr == run.lr
    assert settings(cfg).samples_per_step == cfg.model.micro_batch_size, "one micro-batch a step, as passes: 1 wants"


def test_every_result_is_of_a_run_of_the_study():
    stored = {path.stem: json.loads(path.read_text()) for path in (ROOT / "docs/study/results").glob("*.json")}
    assert stored and set(stored) <= set(RUNS)
    for name, result in stored.items():
        assert (result["name"], result["lr"], result["seed"]) == (name, RUNS[name].lr, RUNS[name].seed)
        assert len(result["commit"]) == 40 and {len(digits) for digits in result["heldout"]["before"].values()} == {256}


def test_the_tables_are_those_of_the_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["results.py", "--out", str(tmp_path)])
    results.main()
    assert capsys.readouterr().out == (ROOT / "docs" / "study" / "tables.md").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} <= {path.name for path in (ROOT / "docs/study").glob("*.png")}


def write_run(folder: Path, after: list[tuple[str, str, float | None]]) -> None:
    for moment, rows in (
        ("before", [("a", "sampled", 1.0), ("a", "greedy", 1.0), ("b", "sampled", 0.0)]),
        ("after", after),
    ):
        lines = (json.dumps({"domain": domain, "mode": mode, "reward": reward}) for domain, mode, reward in rows)
        (folder / f"heldout_{moment}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    steps = [
        {"rl_step": 0, "train_rollouts/rewards": 0.5, "train_rollouts/table": 1.0},
        {"rl_step": 0, "train_optim/gates/domain/pos/drift_max": 0.25, "train_optim/grad_norm": 1.0},
        {"rl_step": 0, "train_optim/gates/domain/pos/drift_max": 0.125, "train_optim/grad_norm": 2.0},
        {"rl_step": 2, "train_rollouts/rewards": 0.75},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    (folder / "output.txt").write_text("a warning\nValueError: grad_norm is inf\nlast words\n")


def test_a_result_holds_every_sampled_answer_and_a_value_for_each_rl_step(tmp_path):
    run = next(iter(RUNS.values()))
    write_run(tmp_path, [("a", "sampled", 1.0), ("b", "sampled", None)])
    result = study_result.read_result(run, tmp_path, 0, 7)
    assert result["heldout"] == {"before": {"a": "1", "b": "0"}, "after": {"a": "1", "b": "-"}}
    assert result["summary"] == "held-out reward 0.500 to 1.000" and result["error"] is None
    assert result["curves"] == {
        "train_rollouts/rewards": [0.5, None, 0.75],
        "train_optim/gates/domain/pos/drift_max": [0.25],
        "train_optim/grad_norm": [1.5],
    }
    (tmp_path / "heldout_after.jsonl").unlink()
    failed = study_result.read_result(run, tmp_path, 1, 7)
    assert failed["error"] == "ValueError: grad_norm is inf" and results.collapsed(failed)
    assert results.area(result) == pytest.approx((0.5 + 0.75) / results.planned_steps(result))


@pytest.mark.parametrize(
    ("before", "after", "collapsed"), [("1111", "1100", False), ("1111", "1000", True), ("1100", "1---", False)]
)
def test_a_collapse_is_a_final_reward_below_half_of_that_before(before: str, after: str, collapsed: bool):
    assert results.collapsed({"setting": "s", "heldout": {"before": {"a": before}, "after": {"a": after}}}) is collapsed


def test_the_interval_holds_the_spread_of_seeds_and_of_prompts():
    generator = np.random.default_rng(1)
    prompts = [generator.choice([-1.0, 0.0, 1.0], p=[0.1, 0.6, 0.3], size=400) for _ in range(5)]
    low, high = results.interval(prompts, np.random.default_rng(0))
    spread = 1.96 * np.sqrt(np.var(np.concatenate(prompts)) / 2000 + np.var([values.mean() for values in prompts]) / 5)
    assert (high - low) / 2 == pytest.approx(spread, rel=0.1)
    assert (high + low) / 2 == pytest.approx(np.mean(prompts), abs=0.01)
    shifted = [np.full(400, shift) for shift in (0.0, 0.1, 0.2, 0.3, 0.4)]
    low, high = results.interval(shifted, np.random.default_rng(0))
    assert 0.05 < low < 0.1 and 0.3 < high < 0.35, "seeds differ, prompts do not"


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.01, 0.1, "better"), (-0.02, 0.1, "not inferior"), (-0.05, 0.1, "undecided"), (-0.2, -0.04, "inferior")],
)
def test_verdicts(low: float, high: float, said: str):
    assert results.verdict(low, high) == said


def test_only_arms_with_five_seeds_are_compared():
    digits = {"before": {"a": "10" * 50}, "after": {"a": "11" * 50}}
    worse = {"before": {"a": "10" * 50}, "after": {"a": "10" * 50}}
    common = {"setting": "s", "overrides": ["algorithm.rl_steps=1"], "curves": {"train_rollouts/rewards": [0.5]}}

    def table(seeds: int) -> list[str]:
        arms = {
            ("s", "grpo", 1e-4): {seed: common | {"heldout": digits} for seed in range(seeds)},
            ("s", "domain_paper", 1e-4): {seed: common | {"heldout": worse} for seed in range(seeds)},
        }
        return results.tables(arms)

    def row(seeds: int, objective: str) -> str:
        return next(line for line in table(seeds) if line.startswith(f"| {objective} |"))

    assert row(5, "grpo").endswith("| reference |")
    assert row(5, "domain_paper").endswith("| inferior |") and "-0.500" in row(5, "domain_paper")
    assert "inferior" not in row(4, "domain_paper") and "-0.500" in row(4, "domain_paper")


def test_steps_to_a_gain_are_those_of_the_seeds_that_reach_it():
    def result(curve: list[float | None]) -> dict:
        return {"setting": "s", "heldout": {"before": {"a": "10"}}, "curves": {"train_rollouts/rewards": curve}}

    early, late, never = [0.6, 0.7] * 5, [0.5] * 5 + [0.7] * 5, [0.5] * 10
    assert results.steps_to_gain([result(early)]) == "5.0"
    assert results.steps_to_gain([result([None, *early]), result(late)]) == f"{(6 + 8) / 2:.1f}"
    assert results.steps_to_gain([result(late), result(never)]) == "8.0, 1 never"
    assert results.steps_to_gain([result(never)]) == "1 never"


def test_the_seeds_of_the_evaluation_are_not_those_of_the_selection():
    seeds = SimpleNamespace(**study_runs.OmegaConf.load(study_runs.FILE).seeds)
    assert not set(seeds.selection) & set(seeds.evaluation) and len(set(seeds.evaluation)) >= results.SEEDS
