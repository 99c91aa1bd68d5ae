"""Comparing runs: figures by hand, groups by what differs, what is left out, and the files that come out."""

from __future__ import annotations

import csv
import math
import re

import numpy as np
import pytest

from nemo_fiberpo.analysis.compare import compare, comparison_csv, comparison_tables
from nemo_fiberpo.analysis.groups import labels, settings_of
from nemo_fiberpo.analysis.runs import Run
from nemo_fiberpo.analysis.summary import area, first_at, over_seeds
from nemo_fiberpo.analysis.tables import Table
from nemo_fiberpo.cli import main
from tests.analysis.runs import answer, optimizer_step, rollout, write, write_identity

DRIFTS = {"domain": ([0.02], [0.045]), "trajectory": ([0.1, 0.3], [0.05, 0.1])}


def make_run(folder, rewards, after=None, **identity):
    """Each RL step has a rollout, an on-policy step and one with DRIFTS; two prompts were wrong before training."""
    rows = []
    for step, reward in enumerate(rewards):
        rows += [rollout(step, reward, entropy=1.0 - 0.1 * step), *optimizer_step(step, 2 * step, {})]
        rows += optimizer_step(step, 2 * step + 1, DRIFTS)
        rows += [{"rl_step": step, "step": step, "timers/rollout_time": 1.0, "timers/train_time": 2.0}]
    write(folder / "metrics.jsonl", *rows)
    write_identity(folder, **identity)
    write(folder / "heldout_before.jsonl", answer(0, 0.0), answer(1, 0.0), answer(2, 0.0, domain="code"))
    if after is not None:
        write(folder / "heldout_after.jsonl", answer(0, after), answer(1, after), answer(2, 0.0, domain="code"))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two seeds of one setting, one run with another learning rate that has not ended, and no run."""
    return [
        make_run(tmp_path / "a0", [0.0, 0.2, 0.4, 0.4, 0.4, 0.6], 1.0, seed=0),
        make_run(tmp_path / "a1", [0.0, 0.2, 0.4, 0.4, 0.4, 0.4], 0.5, seed=1, data__train__sha256="b"),
        make_run(tmp_path / "fast", [0.1, 0.3], model__optim__lr=1e-3),
        tmp_path / "none",
    ]


def test_the_figures_of_a_run(runs):
    found = compare(runs, level=0.4)
    one = next(one for one in found.summaries if one.run.name == "a0")
    # by hand: trapezoids of 0.1, 0.3, 0.4, 0.4, 0.5 over 5 RL steps; 0.4 is the mean of RL steps 2 to 6
    assert one.area == pytest.approx(1.7 / 5) and one.reached == 6 and one.rl_steps == 6
    assert one.drift == pytest.approx({"domain": 0.045, "trajectory": 0.3})
    assert one.beyond == {"domain": 1.0, "trajectory": 1.0}, "0.045 > 0.03; 0.3 > 0.25"
    assert one.entropy == (1.0, 0.5) and one.seconds == 18.0 and one.seconds_per_step == 3.0
    of_domain = {row.domain: (row.before, row.after) for row in one.heldout}
    assert of_domain == {"code": (0.0, 0.0), "math": (0.0, 1.0), "all": (0.0, pytest.approx(2 / 3))}
    assert list(of_domain) == ["code", "math", "all"]
    assert next(one for one in found.summaries if one.run.name == "a1").reached is None


def test_runs_are_grouped_by_what_differs_besides_seeds_and_folders(runs):
    found = compare(runs)
    assert {group: [one.run.name for one in members] for group, members in found.groups.items()} == {
        "lr=6e-05": ["a0", "a1"],
        "lr=0.001": ["fast"],
    }


def test_a_label_has_no_more_keys_than_tell_the_groups_apart():
    grpo = {"algorithm.objective": "grpo", "algorithm.gating.low": 0.2, "model.optim.lr": 1e-4, "model.a.lr": 1}
    fiberpo = {"algorithm.objective": "fiberpo", "algorithm.gating.low": None, "model.optim.lr": 1e-4, "model.a.lr": 1}
    slow = {**grpo, "model.optim.lr": 1e-5, "model.a.lr": 2}
    assert labels([grpo, grpo, fiberpo]) == ["objective=grpo", "objective=grpo", "objective=fiberpo"]
    assert labels([grpo, slow, fiberpo])[1] == "objective=grpo, optim.lr=1e-05", "lr alone would be two keys"
    assert labels([grpo, grpo]) == ["grpo", "grpo"]


def test_paths_inside_the_folder_of_a_run_do_not_tell_runs_apart(tmp_path):
    for name in ("one", "two"):
        write_identity(tmp_path / name, model__tokenizer=f"runs/{name}/data/tokenizer", seed=len(name))
    one, two = (settings_of(Run(tmp_path / name)) for name in ("one", "two"))
    assert one == two and one["model.tokenizer"] == "RUN/data/tokenizer"


def test_what_is_missing_is_left_out_and_noted(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty" / "metrics.jsonl")
    write_identity(tmp_path / "empty")
    found = compare([*runs, tmp_path / "empty"])
    said = "\n".join(found.notes)
    assert f"{tmp_path / 'none'}: left out, no metrics.jsonl and run.json in it" in said
    assert f"{tmp_path / 'empty'}: left out, metrics.jsonl has no line yet" in said
    assert f"{tmp_path / 'fast'}: no heldout_after.jsonl" in said
    unfinished = next(one for one in found.summaries if one.run.name == "fast")
    assert not unfinished.heldout and unfinished.before["math", "sampled"] == 0.0 and unfinished.area == 0.2
    write_identity(runs[0], data__heldout__sha256="other")
    assert any("not tested on the same held-out prompts" in note for note in compare(runs).notes)
    with pytest.raises(ValueError, match="none: left out"):
        compare([tmp_path / "none"])


def test_an_interval_over_seeds_is_that_of_student():
    # by hand: mean 2, standard error 1/sqrt(3), t(2, 0.975) = 4.30265
    mean, low, high = over_seeds([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), rel=1e-5)
    assert over_seeds([0.5])[0] == 0.5 and math.isnan(over_seeds([0.5])[1])


def test_an_area_is_per_rl_step_and_a_level_needs_several_steps():
    assert area([(1, 0.0), (3, 1.0)]) == 0.5 and area([(1, 0.3)]) == 0.3 and math.isnan(area([]))
    assert first_at([(step, 1.0) for step in range(1, 5)], 0.5) is None, "four steps are too few"
    assert first_at([(step, float(step > 2)) for step in range(1, 9)], 0.6) == 5


def test_tables_over_seeds_need_two_runs(runs):
    tables = {table.title: table for table in comparison_tables(compare(runs))}
    over = tables["Held-out reward over seeds"].rows
    assert {(row[0], row[1], row[3]) for row in over} == {
        ("lr=6e-05", domain, "2") for domain in ("all", "code", "math")
    }
    # by hand: changes of 1 and 0.5 have the mean 0.75, and half an interval of t(1, 0.975) / 4 = 3.177
    assert next(row for row in over if row[1] == "math")[4:] == ["0.750", "+0.750", "[-2.427, +3.927]"]
    assert "Held-out reward over seeds" not in {table.title for table in comparison_tables(compare(runs[:1]))}


def test_the_csv_has_a_line_for_every_domain(runs):
    rows = list(csv.DictReader(comparison_csv(compare(runs, 0.4)).splitlines()))
    assert [(row["run"].split("/")[-1], row["domain"]) for row in rows] == [
        *(("a0", domain) for domain in ("code", "math", "all")),
        *(("a1", domain) for domain in ("code", "math", "all")),
        *(("fast", domain) for domain in ("all", "code", "math")),
    ]
    assert rows[1]["change"] == "1.0" and rows[1]["reached"] == "6" and rows[4]["reached"] == ""
    assert rows[-1]["before"] == "0.0" and rows[-1]["after"] == "" and float(rows[-1]["area"]) == pytest.approx(0.2)


def test_html_is_escaped():
    page = Table("a < b", ["run", "x"], [["<script>", "1"]]).as_html()
    assert "<script>" not in page and "&lt;script&gt;" in page and "a &lt; b" in page


def test_the_command_writes_a_picture_a_page_and_a_table(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", *map(str, runs), "--reward", "0.4", "--out", str(out), "--title", "Two <rates>"]) == 0
    said = capsys.readouterr()
    assert "reaches 0.4" in said.out and "note: " in said.err and "none: left out" in said.err
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "compare.csv").read_text() == comparison_csv(compare(runs, 0.4))
    page = (out / "compare.html").read_text()
    assert "Two &lt;rates&gt;" in page and "none: left out" in page
    links = re.findall(r"""(?:src|href)=["']?([^"'> ]{0,30})|url\(([^)]{0,30})""", page)
    assert links and all(link.startswith("data:") for link, _ in links), "nothing from outside the file"
    assert main(["compare", str(tmp_path / "none")]) == 2


def test_a_run_without_strata_and_without_named_domains_is_drawn(tmp_path):
    rows = [{"rl_step": 0, "train_rollouts/rewards": 0.5, "train_rollouts/entropy": 0.1}]
    write(tmp_path / "run" / "metrics.jsonl", *rows)
    write_identity(tmp_path / "run")
    assert main(["compare", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert np.isnan(compare([tmp_path / "run"]).summaries[0].tv)
