"""What makes a run the run it is, and how all ranks come to resume from the same checkpoint."""

from __future__ import annotations

import json
import re
import threading
import time

import pytest
import torch.distributed as dist
from omegaconf import OmegaConf

from nemo_fiberpo.aligner.checkpoint import resume
from nemo_fiberpo.aligner.checkpoint.run_record import RunRecord
from nemo_fiberpo.aligner.config.sections import check_resume
from nemo_fiberpo.aligner.lifecycle import first_rank, run_lock
from nemo_fiberpo.aligner.lifecycle.first_rank import Ranks, SaidByFirstRank
from nemo_fiberpo.aligner.lifecycle.preemption import Stopped
from nemo_fiberpo.storage import reading
from tests.aligner.lifecycle.test_run_lock import holder, pretend, start
from tests.support.damage import UNREADABLE, flip_middle, make_unreadable, name_of

CONFIG = {
    "run_dir": "",
    "seed": 3,
    "collective_timeout": 20,
    "resume": {"allow": []},
    "hierarchy": {
        "token_clip": 0.2,
        "strata": {
            "domain": {"budget": {"pos": 0.04, "neg": 0.03}},
            "trajectory": {"budget": {"pos": 0.24, "neg": 0.12}},
        },
    },
    "algorithm": {
        "samples_per_prompt": 4,
        "prompts_per_rollout": 8,
        "rl_steps": 4,
        "save_interval": 2,
        "kl": {"coefficient": 0.0},
    },
    "data": {"train": "", "heldout": None},
    "rewards": {"workers": 1, "score": "threshold"},
    "model": {"micro_batch_size": 4, "optim": {"lr": 1e-3}, "tensor_model_parallel_size": 1},
    "trainer": {"precision": 32, "gradient_clip_val": 1.0, "max_steps": -1},
    "pretrained_checkpoint": {"restore_from_path": "start.nemo"},
    "exp_manager": {"explicit_log_dir": ""},
}


@pytest.fixture
def cfg(tmp_path):
    made = OmegaConf.create(CONFIG)
    made.run_dir = str(tmp_path)
    made.exp_manager.explicit_log_dir = str(tmp_path / "nemo")
    made.data.train = str(tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").write_text('{"prompt": "1"}\n')
    return made


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
    other.resume.allow = re.fullmatch(r".* by resume\.allow=\[(.*)\]", str(error.value))[1].split(",")
    RunRecord(other).check()
    assert sorted(other.resume.allow) == [
        "hierarchy.strata.domain.budget.neg",
        "hierarchy.strata.domain.budget.pos",
        "hierarchy.strata.domain.enabled",
        "hierarchy.strata.domain.gate",
        "hierarchy.strata.order",
    ]


def test_all_changed_keys_are_named_at_once(cfg, tmp_path):
    RunRecord(cfg).remember(0)
    with pytest.raises(ValueError) as error:
        RunRecord(changed(budget(cfg, 0.05), "seed=4", "model.optim.lr=0.1", "resume.allow=[seed]")).check()
    assert str(error.value) == (
        f"hierarchy.strata.domain.budget.pos: 0.05, but the run in {tmp_path} has 0.04; model.optim.lr: 0.1, but it "
        f"has 0.001; give a run_dir of its own, such as run_dir={tmp_path}-2, or go on with the changes "
        "by resume.allow=[hierarchy.strata.domain.budget.pos,model.optim.lr]"
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
def test_an_allowed_change_is_written_down_with_its_rl_step(cfg, tmp_path, allow):
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


def test_another_layout_goes_on_and_is_written_down(cfg, monkeypatch):
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


def agree(cfg, directory, ranks: int) -> list:
    """What every rank resumes from, each in a thread, over one store. Of an error the text, of `Stopped` the class."""
    cfg.exp_manager.checkpoint_callback_params = {"dirpath": str(directory)}
    store = dist.HashStore()
    found: list = [AssertionError("no outcome")] * ranks

    def run(rank: int) -> None:
        member = Ranks(store, rank, ranks, cfg.collective_timeout)
        try:
            found[rank] = resume._lead(cfg, RunRecord(cfg), member) if rank == 0 else resume._follow(member)
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), f"{thread.name} hangs"
    for rank, outcome in enumerate(found):
        if isinstance(outcome, ValueError):
            assert isinstance(outcome, SaidByFirstRank) == (rank > 0), "an error is said once"
        elif isinstance(outcome, BaseException) and not isinstance(outcome, Stopped):
            raise outcome
    named = [str(outcome) if isinstance(outcome, ValueError) else outcome for outcome in found]
    return [Stopped if isinstance(outcome, Stopped) else outcome for outcome in named]


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", "common.pt", "model/shard_0.pt", ".metadata"])
def test_all_ranks_resume_from_the_same_checkpoint_whichever_reads_the_damaged_file(cfg, checkpoints, name, capsys):
    flip_middle(checkpoints / name_of(4) / name)
    found = agree(cfg, checkpoints, 3)
    assert {path for path, _ in found} == {checkpoints / name_of(2)}
    assert {state["step"] for state in (manifest.state for _, manifest in found)} == {2}
    assert f"checkpoint {name_of(4)}: damaged: {name}: its SHA-256 differs" in capsys.readouterr().out


def test_all_ranks_begin_at_step_0_where_there_is_no_checkpoint(cfg, tmp_path):
    assert agree(cfg, tmp_path / "none", 2) == [None, None]


def test_all_ranks_stop_where_no_checkpoint_is_whole(cfg, checkpoints):
    for step in (2, 4):
        flip_middle(checkpoints / name_of(step) / "common.pt")
    first, second = agree(cfg, checkpoints, 2)
    assert first == second and "no checkpoint is whole" in first


@pytest.mark.parametrize("ranks", [3, 4, 5])
def test_no_rank_goes_back_for_a_file_that_one_of_them_cannot_read(cfg, checkpoints, ranks, monkeypatch, capsys):
    monkeypatch.setattr(reading, "WAITS", (0.0,))
    newest, name = checkpoints / name_of(4), "common.pt"
    make_unreadable(newest, name)
    wanted = resume.manifest.read(newest)
    (reader,) = [rank for rank in range(ranks) if name in resume._share(wanted, rank, ranks)]
    said = set(agree(cfg, checkpoints, ranks))
    assert len(said) == 1, "every rank ends with the same error"
    (error,) = said
    assert error.startswith(f"{newest / name}: Input/output error") and "(errno 5)" in error
    assert (f"says rank {reader} on " in error) == (reader > 0)
    assert newest.is_dir() and "going on from" not in capsys.readouterr().out


def test_the_late_view_of_one_rank_is_waited_out_and_is_no_damage(cfg, checkpoints, monkeypatch, capsys):
    monkeypatch.setattr(reading, "WAITS", (0.0, 0.0))
    read, late = resume._read_share, []

    def late_twice(path, wanted, rank, ranks):
        answer = read(path, wanted, rank, ranks)
        if rank == 1 and len(late) < 2:
            late.append(rank)
            return {"problems": ["common.pt: No such file or directory"]}
        return answer

    monkeypatch.setattr(resume, "_read_share", late_twice)
    found = agree(cfg, checkpoints, 2)
    assert {path for path, _ in found} == {checkpoints / name_of(4)} and len(late) == 2
    assert "damaged" not in capsys.readouterr().out


def test_a_rank_that_never_sees_a_file_ends_the_start_and_moves_nothing(cfg, checkpoints, monkeypatch):
    monkeypatch.setattr(reading, "WAITS", (0.0,))
    monkeypatch.setattr(resume, "_read_share", lambda *_: {"problems": ["common.pt: No such file or directory"]})
    first, second = agree(cfg, checkpoints, 2)
    assert first == second and f"{checkpoints / name_of(4)}/common.pt: No such file" in first
    assert "whole as the first rank reads it" in first and (checkpoints / name_of(4)).is_dir()


def test_ranks_take_the_state_of_the_trainer_from_the_first_one(cfg, checkpoints, monkeypatch):
    """The others read no manifest by themselves: it may not be there yet as they see it."""
    read = resume.manifest.read

    def only_the_first(checkpoint):
        assert threading.current_thread().name == "rank 0", "a manifest is the first rank's to read"
        return read(checkpoint)

    monkeypatch.setattr(resume.manifest, "read", only_the_first)
    assert [manifest.state["step"] for _, manifest in agree(cfg, checkpoints, 3)] == [4, 4, 4]


def test_a_second_job_in_the_directory_ends_on_every_rank_and_changes_nothing(cfg, checkpoints):
    flip_middle(checkpoints / name_of(4) / "common.pt")
    before = sorted(checkpoints.rglob("*"))
    with holder(cfg.run_dir) as process:
        first, second = agree(cfg, checkpoints, 2)
    assert first == second and first.startswith(f"run_dir: {cfg.run_dir} is in use by process {process.pid} on ")
    assert sorted(checkpoints.rglob("*")) == before


def test_every_rank_of_a_requeued_job_stops_where_its_earlier_start_still_has_the_lock(cfg, checkpoints, monkeypatch):
    flip_middle(checkpoints / name_of(4) / "common.pt")
    before = sorted(checkpoints.rglob("*"))
    monkeypatch.setattr(run_lock, "PATIENCE", 0.1)
    with holder(cfg.run_dir, **start("4711", 0)):
        pretend(monkeypatch, start("4711", 1))
        assert agree(cfg, checkpoints, 3) == [Stopped] * 3
    assert sorted(checkpoints.rglob("*")) == before


def test_the_first_ranks_view_of_the_record_counts(cfg, checkpoints):
    RunRecord(cfg).remember(0)
    first, second, third = agree(changed(cfg, "seed=4"), checkpoints, 3)
    assert first == second == third and first.startswith("seed: 4, but the run in ")


def test_a_rank_that_does_not_answer_is_named_and_nothing_is_moved(cfg, checkpoints, monkeypatch):
    """It may be reading a checkpoint that is whole."""
    before = sorted(checkpoints.rglob("*"))
    cfg.collective_timeout = 0.3
    monkeypatch.setattr(first_rank, "HEARD", 0.1)
    with pytest.raises(
        ValueError, match=r"^collective_timeout: rank 1 did not answer in 0\.3 s, .* raise collective_t"
    ):
        resume._lead(cfg, RunRecord(cfg), Ranks(dist.HashStore(), 0, 2, cfg.collective_timeout))
    assert sorted(checkpoints.rglob("*")) == before


def test_all_ranks_have_answered_before_one_that_cannot_read_ends_the_run(cfg, checkpoints, monkeypatch):
    answered, when_told, tell = [], [], Ranks._tell_the_end

    def answer(_path, _wanted, rank, _ranks):
        time.sleep(0.2 * rank)
        answered.append(rank)
        return {"unreadable": [5, "Input/output error", f"file of rank {rank}"], "host": "node7"}

    def told(self, message):
        when_told.extend(answered)
        tell(self, message)

    monkeypatch.setattr(resume, "_read_share", answer)
    monkeypatch.setattr(Ranks, "_tell_the_end", told)
    assert all(said.startswith("file of rank 0: Input/output error") for said in agree(cfg, checkpoints, 3))
    assert sorted(when_told) == [0, 1, 2]


def test_every_file_is_read_by_exactly_one_rank(checkpoints):
    wanted = resume.manifest.read(checkpoints / name_of(4))
    shares = [resume._share(wanted, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(wanted.files)


def test_resuming_is_not_switched_off_where_there_are_checkpoints(cfg, checkpoints):
    cfg.exp_manager.explicit_log_dir = str(checkpoints.parent)
    cfg.exp_manager.resume_if_exists = False
    with pytest.raises(ValueError, match=r"^exp_manager\.resume_if_exists: false, but .* give a run_dir"):
        resume.find_checkpoint(cfg, RunRecord(cfg))
