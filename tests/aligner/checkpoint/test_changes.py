"""What of a run may change when it is resumed, and what is refused by the name of the key."""

from __future__ import annotations

import json
import re

import pytest
from omegaconf import OmegaConf

from nemo_fiberpo.aligner.checkpoint.run_record import RunRecord
from nemo_fiberpo.aligner.config.sections import check_resume
from nemo_fiberpo.storage import reading
from tests.support.damage import UNREADABLE


def changed(cfg, *changes: str):
    return OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(changes)))


def budget(cfg, value: float):
    out = cfg.copy()
    out.hierarchy.strata.domain.budget.pos = value
    return out


REFUSED = {
    "seed=4": "seed",
    "algorithm.prompts_per_rollout=16": "algorithm.prompts_per_rollout",
    "model.micro_batch_size=2": "model.micro_batch_size",
    "model.optim.lr=0.1": "model.optim.lr",
    "rewards.score=raw": "rewards.score",
    "trainer.precision=bf16": "trainer.precision",
    "algorithm.kl.coefficient=0.1": "algorithm.kl.coefficient",
    "hierarchy.token_clip=0.3": "hierarchy.token_clip",
}


def test_another_expert_parallel_size_is_a_layout_unless_it_makes_the_partitions(cfg):
    def of(size: int, **partitions):
        experts = {
            "strata": {"expert_partition": {"budget": {"pos": 0.1, "neg": 0.05}}},
            "expert_partitions": partitions,
        }
        out = OmegaConf.merge(cfg, {"hierarchy": experts} if partitions else {})
        out.model.expert_model_parallel_size = size
        return RunRecord(out)

    for same in ({}, {"by": "expert"}):
        of(2, **same).remember(0)
        of(4, **same).check()
        of(2, **same).path.unlink()
    of(2, by="expert_parallel").remember(0)
    with pytest.raises(ValueError, match=r"^hierarchy\.expert_partitions\.by: 'expert_parallel, 4 ranks', but the run"):
        of(4, by="expert_parallel").check()


@pytest.mark.parametrize("change", REFUSED)
def test_a_changed_run_is_refused_by_the_name_of_the_key(cfg, change):
    RunRecord(cfg).remember(0)
    RunRecord(cfg).check()
    with pytest.raises(ValueError, match=rf"^{REFUSED[change]}: .*resume\.allow=\[{REFUSED[change]}[,\]]"):
        RunRecord(changed(cfg, change)).check()


def test_a_changed_budget_is_named_by_its_stratum(cfg):
    RunRecord(cfg).remember(0)
    with pytest.raises(ValueError, match=r"^hierarchy\.strata\.domain\.budget\.pos: 0\.05, but .* has 0\.04"):
        RunRecord(budget(cfg, 0.05)).check()


def test_other_strata_are_refused(cfg):
    RunRecord(cfg).remember(0)
    other = cfg.copy()
    del other.hierarchy.strata.domain
    with pytest.raises(ValueError, match=r"^hierarchy\.strata\.order: \['trajectory'\]"):
        RunRecord(other).check()


def test_the_keys_of_a_stratum_that_was_taken_out_can_be_allowed(cfg):
    """Every key that an error names is one that `resume.allow` takes."""
    RunRecord(cfg).remember(0)
    other = cfg.copy()
    del other.hierarchy.strata.domain
    with pytest.raises(ValueError) as error:
        RunRecord(other).check()
    other.resume.allow = re.fullmatch(r".* with resume\.allow=\[(.*)\]", str(error.value))[1].split(",")
    RunRecord(other).check()
    assert sorted(other.resume.allow) == [
        "hierarchy.strata.domain.budget.neg",
        "hierarchy.strata.domain.budget.pos",
        "hierarchy.strata.domain.enabled",
        "hierarchy.strata.order",
    ]


def test_all_changed_keys_are_named_at_once(cfg, tmp_path):
    RunRecord(cfg).remember(0)
    with pytest.raises(ValueError) as error:
        RunRecord(changed(budget(cfg, 0.05), "seed=4", "model.optim.lr=0.1", "resume.allow=[seed]")).check()
    assert str(error.value) == (
        f"hierarchy.strata.domain.budget.pos: 0.05, but the run in {tmp_path} has 0.04; model.optim.lr: 0.1, but it "
        f"has 0.001; use another run_dir, such as run_dir={tmp_path}-2, or accept the changes "
        "with resume.allow=[hierarchy.strata.domain.budget.pos,model.optim.lr]"
    )


def test_other_prompts_in_the_same_file_are_refused(cfg, tmp_path):
    RunRecord(cfg).remember(0)
    (tmp_path / "train.jsonl").write_text('{"prompt": "2"}\n')
    with pytest.raises(ValueError, match=r"^data\.train\.sha256: "):
        RunRecord(cfg).check()


def test_the_same_prompts_in_another_place_are_the_same(cfg, tmp_path):
    RunRecord(cfg).remember(0)
    (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")
    RunRecord(changed(cfg, f"data.train={tmp_path}/moved.jsonl")).check()


@pytest.mark.parametrize("change", ["algorithm.rl_steps=9", "algorithm.save_interval=1", "rewards.workers=8"])
def test_how_long_and_how_fast_may_change(cfg, change):
    RunRecord(cfg).remember(0)
    RunRecord(changed(cfg, change)).check()


@pytest.mark.parametrize("allow", ["hierarchy", "hierarchy.strata.domain", "hierarchy.strata.domain.budget.pos"])
def test_an_allowed_change_is_recorded_with_its_rl_step(cfg, tmp_path, allow):
    RunRecord(cfg).remember(0)
    record = RunRecord(changed(budget(cfg, 0.05), f"resume.allow=[{allow}]"))
    record.check()
    assert record.remember(2) == {"hierarchy.strata.domain.budget.pos": [0.04, 0.05]}
    RunRecord(budget(cfg, 0.05)).check()  # from now on this is the run
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["changes"] == [{"rl_step": 2, "changed": {"hierarchy.strata.domain.budget.pos": [0.04, 0.05]}}]


def test_allowing_one_key_does_not_allow_another(cfg):
    RunRecord(cfg).remember(0)
    with pytest.raises(ValueError, match=r"^hierarchy\.strata\.domain\.budget\.pos"):
        RunRecord(changed(budget(cfg, 0.05), "resume.allow=[hierarchy.token_clip]")).check()


def test_a_mistyped_key_in_allow_is_refused(cfg):
    record = RunRecord(changed(cfg, "resume.allow=[hierarchie]"))
    for check in (record.check, record.check_allowed):
        with pytest.raises(ValueError, match=r"^resume\.allow: 'hierarchie' .*did you mean 'hierarchy'"):
            check()


@pytest.mark.parametrize("value", [{"allow": "hierarchy"}, {"allow": [1]}, {"alow": []}])
def test_a_resume_section_that_makes_no_sense_is_refused(cfg, value):
    cfg.resume = value
    with pytest.raises(ValueError, match=r"^resume\."):
        check_resume(cfg)


def test_another_layout_resumes_and_is_recorded(cfg, monkeypatch):
    RunRecord(cfg).remember(0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    record = RunRecord(changed(cfg, "model.tensor_model_parallel_size=2"))
    record.check()
    assert record.remember(2) == {"model.tensor_model_parallel_size": [1, 2], "ranks": [1, 4]}


def test_a_whole_checkpoint_is_remembered_through_a_restart(cfg):
    record = RunRecord(cfg)
    assert record.checkpoint is None
    record.remember(0)
    record.note_checkpoint("fiberpo-step=2", {"step": 2, "consumed_samples": 16})
    RunRecord(cfg).remember(2)
    assert RunRecord(cfg).checkpoint == {"name": "fiberpo-step=2", "step": 2}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff{}",
        b"[]",
        b"null",
        b'{"identity": {}}',
        b'{"identity": 3, "changes": [], "checkpoint": null}',
        b'{"identity": {}, "changes": [], "checkpoint": {"step": "x"}}',
    ],
)
def test_a_damaged_record_of_the_run_is_an_error_that_names_it_and_the_ways_out(cfg, tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/run\.json: not the record of a run") as error:
        RunRecord(cfg).check()
    for remedy in ("intact copy", "remove it", f"run_dir={tmp_path}-2"):
        assert remedy in str(error.value)


def test_a_record_that_cannot_be_read_is_no_damaged_one(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "WAITS", (0.0,))
    (tmp_path / "run.json").symlink_to(UNREADABLE)
    with pytest.raises(ValueError, match=r"run\.json: Input/output error \(errno 5\): .* try again"):
        RunRecord(cfg).check()
