"""What makes two runs the same depends neither on the form of their YAML nor on the version that recorded the first.

records/run.json was written by the command of `tests.support.launching` with `TWO_EPOCHS`, by a version that had strata
in lists and the YAML's own keys in `run.json`; RUN_DIR stands for its directory. records/identities.json has what the
same version recorded of the sections `hierarchy` and `algorithm` of other runs, by their overrides.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from nemo_fiberpo.aligner.checkpoint.identity import identity_of, identity_of_record
from nemo_fiberpo.aligner.checkpoint.run_record import RunRecord
from nemo_fiberpo.cli.compose import compose
from tests.support import forked
from tests.support.launching import TWO_EPOCHS, arguments, metrics

RECORDS = Path(__file__).parent / "records"
IDENTITIES: dict[str, dict[str, Any]] = json.loads((RECORDS / "identities.json").read_text())
OWN = """
defaults: [quickstart, _self_]
hierarchy:
  strata:
    - {name: domain, budget: {pos: 0.02, neg: 0.015}, budgets: {gsm8k.v2: {pos: 0.03, neg: 0.02}}, slope: 8}
    - {name: task.kind, budget: {pos: 0.03, neg: 0.02}, only: {domain: [gsm8k.v2, math]}}
    - {name: trajectory, budget: {pos: 0.12, neg: 0.05}, min_tokens: 8}
    - {name: order, budget: {pos: 0.12, neg: 0.05}, enabled: false, join: [task, language]}
  branches:
    - {name: modality, beside: domain, budget: {pos: 0.02, neg: 0.015}}
  sweeps: 2
"""
NAMED = """
token_clip: 0.2
strata:
  domain: {budget: {pos: 0.04, neg: 0.03}}
  prompt_group: {budget: {pos: 0.08, neg: 0.06}}
  trajectory: {budget: {pos: 0.24, neg: 0.12}, slope: {cap: 32}}
"""
LISTED = """
token_clip: 0.2
strata:
  - {name: domain, budget: {pos: 0.04, neg: 0.03}}
  - {name: prompt_group, budget: {pos: 0.08, neg: 0.06}}
  - {name: trajectory, budget: {pos: 0.24, neg: 0.12}, slope: {cap: 32}}
"""
SPELLED_OUT = """
token_clip: 0.2
strata:
  domain: {budget: {neg: 0.03, pos: 0.04}, budgets: {}, slope: null, enabled: true, join: [], only: {}, beside: null}
  prompt_group: {budget: {pos: 0.08, neg: 0.06}, min_tokens: null}
  trajectory: {slope: {cap: 32.0}, budget: {pos: 0.24, neg: 0.12}}
branches: {}
sweeps: 1
expert_partitions: null
"""
REORDERED = """
token_clip: 0.2
strata:
  prompt_group: {budget: {pos: 0.08, neg: 0.06}}
  domain: {budget: {pos: 0.04, neg: 0.03}}
  trajectory: {budget: {pos: 0.24, neg: 0.12}, slope: {cap: 32}}
"""


GATE = "hierarchy.gate=rollback"  # the default of the versions that wrote the records


def quickstart(run_dir: Path, *overrides: str) -> DictConfig:
    """The config of the tests' small runs in `run_dir`, with the gate of the records."""
    return compose("quickstart", [*arguments(run_dir, *overrides)[2:], GATE])


def record_of(run_dir: Path) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((RECORDS / "run.json").read_text().replace("RUN_DIR", str(run_dir)))
    return stored


def small_run(run_dir: Path, stored: dict[str, Any]) -> None:
    """A data file, and the record of the run that used it."""
    (run_dir / "data").mkdir()
    (run_dir / "data" / "train.jsonl").write_text('{"prompt": "1"}\n')
    digests = RunRecord(quickstart(run_dir)).identity()
    stored["identity"]["data.train.sha256"] = digests["data.train.sha256"]
    (run_dir / "run.json").write_text(json.dumps(stored))


def test_a_record_of_the_yaml_s_own_keys_is_of_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    small_run(tmp_path, record_of(tmp_path))
    record = RunRecord(quickstart(tmp_path, *TWO_EPOCHS))
    record.check()
    assert record.remember(4) == {"model.logprobs": [None, "auto"]}, "how log-probs are computed may change"
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["checkpoint"]["step"] == 4 and len(stored["changes"]) == 1
    assert stored["identity"]["hierarchy.sweeps"] == 1, "defaults are written down"
    RunRecord(quickstart(tmp_path, *TWO_EPOCHS)).check()


def test_a_change_since_such_a_record_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    small_run(tmp_path, record_of(tmp_path))
    wide = ["hierarchy.strata.domain.budget.pos=0.05", "hierarchy.sweeps=1", "algorithm.packing=true", "seed=4"]
    with pytest.raises(ValueError) as error:
        RunRecord(quickstart(tmp_path, *TWO_EPOCHS, *wide)).check()
    assert str(error.value).startswith("seed: 4, but the run in ")
    assert str(error.value).endswith(
        " with resume.allow=[seed,hierarchy.strata.domain.budget.pos,algorithm.packing,model.seed]"
    )


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_run_with_such_a_record_resumes_to_the_same_metrics(uninterrupted, tmp_path):
    run_dir = tmp_path / "before"
    shutil.copytree(uninterrupted, run_dir)
    checkpoints = run_dir / "nemo" / "checkpoints"
    (newest,), (first,) = (list(checkpoints.glob(f"fiberpo-step={step}-*")) for step in (4, 2))
    shutil.rmtree(newest)
    stored = record_of(run_dir)
    assert stored["identity"] != json.loads((uninterrupted / "run.json").read_text())["identity"]
    (run_dir / "run.json").write_text(json.dumps(stored | {"checkpoint": {"name": first.name, "step": 2}}))
    said = forked.launch("train_gpt_fiberpo.py", run_dir, *TWO_EPOCHS, "resume.allow=[hierarchy.gate]")
    assert f"resuming from {first.name}: RL step 2" in said
    assert set(re.findall(r"from RL step 2 on: ([\w.]+) is ", said)) == {"hierarchy.gate", "model.logprobs"}
    assert metrics(run_dir) == metrics(uninterrupted)


@pytest.mark.parametrize("overrides", IDENTITIES)
def test_what_was_recorded_of_other_runs_is_what_they_are(tmp_path, overrides):
    (tmp_path / "own_run.yaml").write_text(OWN)
    split = (
        overrides.replace(" hierarchy", "\nhierarchy").replace(" model", "\nmodel").replace(" algorithm", "\nalgorithm")
    )
    name, given = (str(tmp_path / "own_run.yaml"), []) if overrides == "own_run" else ("quickstart", split.split("\n"))
    if "algorithm=" not in overrides.replace("algorithm=fiberpo", ""):
        given = [*given, "algorithm.gating.use_min=false"]  # the default of the version that recorded it
    now = identity_of(compose(name, [*given, GATE, "run_dir=/nowhere"]))
    before = identity_of_record(IDENTITIES[overrides])
    sections = {key.partition(".")[0] for key in IDENTITIES[overrides]}
    assert before == {key: value for key, value in now.items() if key.partition(".")[0] in sections}
    assert identity_of_record(now) == now


def run_with(tmp_path: Path, hierarchy: str, *overrides: str) -> RunRecord:
    """Record of a run in `tmp_path` whose hierarchy is a file of that text."""
    folder = tmp_path / "conf"
    (folder / "hierarchy").mkdir(parents=True, exist_ok=True)
    (folder / "hierarchy" / "own.yaml").write_text(hierarchy)
    (folder / "own_run.yaml").write_text("defaults: [quickstart, {override hierarchy: own}, _self_]\n")
    return RunRecord(compose(str(folder / "own_run.yaml"), [f"run_dir={tmp_path}", *overrides]))


@pytest.mark.parametrize("first", [NAMED, LISTED, SPELLED_OUT], ids=["by name", "list", "spelled out"])
def test_the_form_of_the_yaml_and_defaults_that_are_spelled_out_do_not_matter(tmp_path, first):
    run_with(tmp_path, first).remember(0)
    for other in (NAMED, LISTED, SPELLED_OUT):
        run_with(tmp_path, other).check()
    spelled_out = ["algorithm.passes=2", "data.too_long=error", "rewards.score=threshold", "rewards.workers=1"]
    run_with(tmp_path, NAMED, *spelled_out).check()


def test_the_order_of_strata_matters(tmp_path):
    run_with(tmp_path, NAMED).remember(0)
    with pytest.raises(
        ValueError, match=r"^hierarchy\.strata\.order: \['prompt_group', 'domain', .* with .*strata\.order\]"
    ):
        run_with(tmp_path, REORDERED).check()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("hierarchy.strata.trajectory.slope.cap=16", "hierarchy.strata.trajectory.slope.cap"),
        ("hierarchy.strata.trajectory.min_tokens=8", "hierarchy.strata.trajectory.min_tokens"),
        ("hierarchy.strata.domain.enabled=false", "hierarchy.strata.domain.enabled"),
        ("hierarchy.strata.domain.budgets.a={pos: 0.2, neg: 0.1}", "hierarchy.strata.domain.budgets.a.pos"),
        ("algorithm.kl.coefficient=0.1", "algorithm.kl.coefficient"),
        ("rewards.time_limit=3", "rewards.time_limit"),
        ("data.too_long=drop", "data.too_long"),
        ("warm_start.lr=1", "warm_start.lr"),
    ],
)
def test_a_changed_value_matters_whether_it_was_written_or_a_default(tmp_path, change, key):
    run_with(tmp_path, LISTED).remember(0)
    with pytest.raises(ValueError, match=rf"^{key}: "):
        run_with(tmp_path, NAMED, change).check()


def test_a_default_that_a_record_does_not_have_is_no_change(tmp_path):
    """As with a key that a later version adds."""
    run_with(tmp_path, NAMED).remember(0)
    stored = json.loads((tmp_path / "run.json").read_text())
    for key in ("hierarchy.strata.domain.enabled", "hierarchy.sweeps", "algorithm.passes", "rewards.on_failure"):
        del stored["identity"][key]
    (tmp_path / "run.json").write_text(json.dumps(stored))
    run_with(tmp_path, NAMED).check()
    with pytest.raises(ValueError, match=r"^algorithm\.passes: 1, but the run in .* has 2;"):
        run_with(tmp_path, NAMED, "algorithm.passes=1").check()


def test_a_recorded_section_that_is_refused_today_is_compared_as_it_is(tmp_path):
    run_with(tmp_path, NAMED).remember(0)
    stored = json.loads((tmp_path / "run.json").read_text())
    stored["identity"] |= {"rewards.score": "thresh", "algorithm.gone": 3}
    (tmp_path / "run.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"^rewards\.score: 'threshold', but .* has 'thresh'; algorithm\.gone: None,"):
        run_with(tmp_path, NAMED).check()
    run_with(tmp_path, NAMED, "resume.allow=[rewards.score,algorithm.gone]").check()


def test_a_reward_server_may_change_and_graders_with_dots_may_not(tmp_path):
    own = ["rewards.graders={my.grader: 'module:function'}"]
    run_with(tmp_path, NAMED, *own).remember(0)
    run_with(tmp_path, NAMED, *own).check()
    with pytest.raises(ValueError, match=r"^rewards\.graders\.my\.grader: 'module:other', but"):
        run_with(tmp_path, NAMED, "rewards.graders={my.grader: 'module:other'}").check()
    (tmp_path / "run.json").unlink()
    server = ["rewards.kind=server", "rewards.server={host: a}"]
    run_with(tmp_path, NAMED, *server).remember(0)
    run_with(tmp_path, NAMED, "rewards.kind=server", "rewards.server={host: b}").check()


def test_an_identity_is_what_json_holds(tmp_path):
    cfg = quickstart(
        tmp_path, "hierarchy=expert_trajectory", "hierarchy.expert_partitions.by={cold: [0, 3], hot: [1, 2]}"
    )
    found = identity_of(cfg)
    assert json.loads(json.dumps(found)) == found
    assert found["hierarchy.expert_partitions.by.cold"] == [0, 3]
    assert OmegaConf.to_container(cfg.hierarchy)["expert_partitions"]["by"]["cold"] == [0, 3], "the config is only read"


def test_a_run_that_was_moved_is_the_same_run(tmp_path, monkeypatch):
    """The tokenizer of the quickstart lies in the run's own directory; so does the policy that a penalty refers to."""
    before, after = tmp_path / "before", tmp_path / "elsewhere" / "after"
    RunRecord(quickstart(before, *TWO_EPOCHS)).remember(0)
    record = json.loads((before / "run.json").read_text())
    identity = record["identity"]
    assert identity["model.tokenizer.type"] == "${run_dir}/data/tokenizer"
    assert identity["pretrained_checkpoint.restore_from_path"] == "${run_dir}/warm_start.nemo"
    assert str(tmp_path) not in json.dumps(record)
    after.parent.mkdir()
    before.rename(after)
    moved = RunRecord(quickstart(after, *TWO_EPOCHS))
    moved.check()
    assert moved.remember(2) == {} and moved.id == record["id"]
    monkeypatch.chdir(after.parent)
    RunRecord(quickstart(Path("after"), *TWO_EPOCHS)).check()
    other = quickstart(after, *TWO_EPOCHS, f"pretrained_checkpoint.restore_from_path={tmp_path}/another.nemo")
    with pytest.raises(ValueError, match=r"^pretrained_checkpoint\.restore_from_path: .*another\.nemo"):
        RunRecord(other).check()


def test_a_record_of_an_earlier_version_has_the_runs_directory_spelled_out(tmp_path):
    RunRecord(quickstart(tmp_path, *TWO_EPOCHS)).remember(0)
    path = tmp_path / "run.json"
    record = json.loads(path.read_text().replace("${run_dir}", str(tmp_path)))
    del record["id"]
    path.write_text(json.dumps(record))
    resumed = RunRecord(quickstart(tmp_path, *TWO_EPOCHS))
    resumed.check()
    assert resumed.id is None and resumed.remember(2) == {}
    assert isinstance(resumed.id, str)
