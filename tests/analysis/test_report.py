"""The report: which metrics it finds, the paired bootstrap, and that a picture comes out of whatever a run left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nemo_fiberpo.analysis.heldout import Row, format_table, heldout_table, paired_bootstrap
from nemo_fiberpo.analysis.picture import _plot_labels, plot_report
from nemo_fiberpo.analysis.report import format_markdown, make_report
from nemo_fiberpo.analysis.runs import Run, read_heldout
from tests.analysis.runs import answer, write


def curves_of(folder: Path, *rows) -> dict:
    write(folder / "metrics.jsonl", *rows)
    return Run(folder).curves


def metrics_rows(steps: int) -> list[dict]:
    """As a run writes them: a row for the rollout of a step, then one for each of its two optimizer steps."""
    rows = []
    for step in range(steps):
        rows.append({"rl_step": step, "step": step, "train_rollouts/reward/math": 0.1 * step, "timers/generate": 1.0})
        for number in range(2):
            gates = {
                f"train_optim/gates/{stratum}/{channel}/budget_used_max": 0.5 + number + step
                for stratum in ("domain", "trajectory")
                for channel in ("pos", "neg")
            }
            rows.append({"rl_step": step, "step": 2 * step + number, **gates})
    return rows


def test_metrics_are_found_by_name_and_an_rl_step_counts_with_its_largest_use(tmp_path):
    curves = curves_of(tmp_path, *metrics_rows(2))
    assert curves["train_reward"] == {("math",): [(1, 0.0), (2, 0.1)]}
    assert set(curves["budget_used"]) == {(s, c) for s in ("domain", "trajectory") for c in ("pos", "neg")}
    assert curves["budget_used"]["domain", "pos"] == [(1, 1.5), (2, 2.5)]


def test_a_half_written_last_line_is_skipped_and_any_other_is_named(tmp_path):
    rows = metrics_rows(2)
    assert curves_of(tmp_path, *rows, '{"rl_step": 2, "tr')["train_reward"]["math",][-1][0] == 2
    with pytest.raises(ValueError, match="metrics.jsonl:1: not valid JSON"):
        curves_of(tmp_path, '{"rl\n', *rows)
    with pytest.raises(ValueError, match="no 'rl_step'; it has step"):
        curves_of(tmp_path, {"step": 1})


def test_values_that_are_null_are_left_out(tmp_path):
    rows = [{"rl_step": step, "train_rollouts/reward/math": None if step else 0.5} for step in range(2)]
    assert curves_of(tmp_path, *rows)["train_reward"]["math",] == [(1, 0.5)]


def test_held_out_answers_are_averaged_per_prompt_and_failures_left_out(tmp_path):
    path = write(tmp_path / "h.jsonl", answer(3, 1.0), answer(3, 0.0), answer(4, None), answer(3, 1.0, mode="greedy"))
    assert read_heldout(path) == {("math", "sampled"): {3: 0.5}, ("math", "greedy"): {3: 1.0}}
    with pytest.raises(ValueError, match=r"h.jsonl:1: mode: 'beam' is unknown; valid: sampled, greedy"):
        read_heldout(write(path, answer(1, 1.0, mode="beam")))
    with pytest.raises(ValueError, match=r"h.jsonl:2: reward: missing"):
        read_heldout(write(path, answer(1, 1.0), {"prompt_index": 1, "domain": "math", "mode": "greedy"}))


def test_the_table_pairs_prompts():
    # by hand: prompts 0..3 rise by 1, 0, 1, 0: mean 0.5; prompt 9 stands on one side only
    before = {("math", "sampled"): {0: 0.0, 1: 0.0, 2: 0.0, 3: 1.0, 9: 1.0}}
    after = {("math", "sampled"): {0: 1.0, 1: 0.0, 2: 1.0, 3: 1.0}}
    (row,) = heldout_table(before, after)
    assert (row.before, row.after, row.difference, row.n) == (0.25, 0.75, 0.5, 4)
    assert (row.low, row.high) == (0.0, 1.0)  # P(all four draws rise) = 1/16 is above 2.5 percent
    text = format_table([row])
    assert "math" in text and "0.250" in text and "+0.500" in text and "[+0.000, +1.000]" in text
    with pytest.raises(ValueError, match="no prompt in common"):
        heldout_table(before, {("code", "sampled"): {0: 1.0}})


def test_the_interval_is_that_of_the_normal_law_for_many_pairs():
    # differences of +-1 and 0 with mean 0.3: the interval is mean +- 1.96 sd / sqrt(n) up to resampling noise
    differences = np.repeat([1.0, 0.0, -1.0], [500, 300, 200])
    low, high = paired_bootstrap(differences)
    half = 1.96 * differences.std() / np.sqrt(len(differences))
    assert low == pytest.approx(0.3 - half, abs=0.004) and high == pytest.approx(0.3 + half, abs=0.004)
    assert paired_bootstrap(differences) == (low, high)
    assert paired_bootstrap(differences, seed=1) != (low, high)
    assert paired_bootstrap(np.ones(7)) == (1.0, 1.0)
    assert paired_bootstrap(np.array([0.5])) == (0.5, 0.5)


@pytest.fixture
def run(tmp_path):
    write(tmp_path / "metrics.jsonl", *metrics_rows(5))
    for moment, reward in (("before", 0.0), ("after", 1.0)):
        rows = [answer(index, reward, mode=mode) for mode in ("sampled", "greedy") for index in range(4)]
        write(tmp_path / f"heldout_{moment}.jsonl", *rows)
    return tmp_path


PNG = b"\x89PNG\r\n\x1a\n"


def test_the_command_writes_the_picture_and_prints_the_table(run):
    command = [sys.executable, "-m", "nemo_fiberpo.analysis.report", str(run), "--title", "a run"]
    root = str(Path(__file__).parents[2])
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
    assert output.count("[+1.000, +1.000]") == 2 and "greedy" in output
    assert (run / "report.png").read_bytes().startswith(PNG)
    names = ["heldout_after.jsonl", "heldout_before.jsonl", "metrics.jsonl", "report.png"]
    assert sorted(path.name for path in run.iterdir()) == names


@pytest.mark.parametrize("missing", [["metrics.jsonl"], ["heldout_after.jsonl"]])
def test_what_a_run_did_not_leave_is_left_out_of_the_picture(run, missing):
    for name in missing:
        (run / name).unlink()
    assert len(make_report(run)) == (0 if "heldout_after.jsonl" in missing else 2)
    assert (run / "report.png").read_bytes().startswith(PNG)


def labelled_rows(labels: int) -> list[dict]:
    """Two optimizer steps of a run with a column `part` of labels, joined in `part_in_trajectory`, and domains."""
    share = {f"train_rollouts/token_share/part.p{label}": 1.0 / labels for label in range(labels)}
    rows: list[dict] = [{"rl_step": 0, "step": 0, **share}]
    for number in range(2):
        places = [f"part_in_trajectory.part.p{label}" for label in range(labels)] + ["part.p0", "domain.math"]
        drifts = {
            f"train_optim/gates/{place}/{channel}/drift": 0.01 * (number + at)
            for at, place in enumerate(places)
            for channel in ("pos", "neg")
        }
        rows.append({"rl_step": 0, "step": number, **drifts, "train_optim/gates/domain/pos/budget_used_max": 0.5})
    return rows


def test_the_drift_of_a_label_is_found_in_every_stratum_that_has_it(tmp_path):
    write(tmp_path / "metrics.jsonl", *labelled_rows(2))
    found = Run(tmp_path).label_drifts
    inside, itself = ("part_in_trajectory", "part"), ("part", "part")
    names = {(*inside, "p0"), (*inside, "p1"), (*itself, "p0")}
    assert set(found) == {(*name, channel) for name in names for channel in ("pos", "neg")}
    assert found[*inside, "p1", "pos"] == [(1, 0.02)], "the largest of the RL step"


@pytest.mark.parametrize("labels", [1, 2, 11])
def test_the_picture_has_a_column_more_with_labels(run, tmp_path, labels):
    width = {}
    for name, rows in (("without", metrics_rows(1)), ("with", labelled_rows(labels))):
        write(tmp_path / name / "metrics.jsonl", *rows)
        make_report(tmp_path / name)
        drawn = (tmp_path / name / "report.png").read_bytes()
        assert drawn.startswith(PNG)
        width[name] = int.from_bytes(drawn[16:20], "big")
    assert width["with"] == pytest.approx(1.5 * width["without"], abs=2)


def test_the_labels_with_most_tokens_are_drawn():
    drifts = {("p", "p", f"c{at}", channel): [(1, 0.1)] for at in range(11) for channel in ("pos", "neg")}
    shares = {("p", f"c{at}"): [(1, at / 55)] for at in range(11)}
    figure = Figure()
    FigureCanvasAgg(figure)
    [axes] = _plot_labels(figure.subfigures(), drifts, shares)
    entries = [text.get_text() for text in axes.get_legend().get_texts()]
    assert entries == [f"c{at} ({at / 55:.0%} of the tokens)" for at in range(3, 11)]
    assert axes.get_title(loc="left") == "p, 8 of 11 labels"
    assert len({line.get_color() for line in axes.lines}) == 8 and len(axes.lines) == 16


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither metrics.jsonl nor"):
        make_report(tmp_path)


def test_a_picture_of_nothing_of_one_step_and_of_a_use_of_zero_is_drawn(tmp_path):
    path = tmp_path / "r.png"
    one = {("domain", "pos"): [(1, 0.0)], ("domain", "neg"): [(1, 40.0)]}
    for rewards, budgets, heldout in (({}, {}, {}), ({("math",): [(1, 0.5)]}, one, {"math": (0.1, 0.9)})):
        path.unlink(missing_ok=True)
        plot_report(rewards, budgets, heldout, path)
        assert path.read_bytes().startswith(PNG)


def test_gates_at_work_counts_optimizer_steps_in_which_a_cell_left_pass_through(tmp_path):
    gate = "train_optim/gates/{}/{}/pass_through"
    rows = [
        {"rl_step": 0, "train_optim/on_policy": 1.0},
        {
            "rl_step": 0,
            gate.format("domain", "pos"): 1.0,
            gate.format("domain", "neg"): 1.0,
            gate.format("x", "pos"): 1.0,
        },
        {
            "rl_step": 0,
            gate.format("domain", "pos"): 1.0,
            gate.format("domain", "neg"): 0.5,
            gate.format("x", "pos"): 1.0,
        },
    ]
    write(tmp_path / "metrics.jsonl", *rows)
    assert Run(tmp_path).gates_at_work() == {"domain": 0.5, "x": 0.0}


def test_several_runs_make_one_markdown_table():
    row = Row("math", "sampled", 0.25, 0.5, 0.125, 0.375, n=256)
    text = format_markdown([("seed0", [row], {"domain": 0.5})])
    assert "| seed0 | math | sampled | 0.250 | 0.500 | +0.250 | [+0.125, +0.375] | 256 |" in text
    assert "| seed0 | 50% |" in text
