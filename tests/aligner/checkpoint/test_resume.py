"""The checkpoint that all ranks resume from: chosen by the first, read by all."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from nemo_fiberpo.aligner.checkpoint import resume
from nemo_fiberpo.aligner.checkpoint.run_record import RunRecord
from nemo_fiberpo.aligner.lifecycle import first_rank
from nemo_fiberpo.aligner.lifecycle.ending import FirstRankError
from nemo_fiberpo.aligner.lifecycle.first_rank import Ranks
from nemo_fiberpo.aligner.lifecycle.preemption import Stopped
from nemo_fiberpo.storage import reading, run_lock
from tests.aligner.checkpoint.test_changes import changed
from tests.storage.test_run_lock import holder, pretend, start
from tests.support.damage import flip_middle, make_unreadable, name_of


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
            assert isinstance(outcome, FirstRankError) == (rank > 0), "an error is said once"
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
    assert (f"(rank {reader} on " in error) == (reader > 0)
    assert newest.is_dir() and "resuming from" not in capsys.readouterr().out


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
    assert "whole on the first rank" in first and (checkpoints / name_of(4)).is_dir()


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


def test_every_rank_of_a_requeued_job_stops_where_its_earlier_start_still_has_the_lock(
    cfg, checkpoints, monkeypatch, capsys
):
    flip_middle(checkpoints / name_of(4) / "common.pt")
    before = sorted(checkpoints.rglob("*"))
    monkeypatch.setattr(run_lock, "PATIENCE", 0.1)
    with holder(cfg.run_dir, **start("4711", 0)):
        pretend(monkeypatch, start("4711", 1))
        assert agree(cfg, checkpoints, 3) == [Stopped] * 3
    assert capsys.readouterr().out.count("may be alive. Ending with status 75, to be started again later") == 1
    assert sorted(checkpoints.rglob("*")) == before


def test_the_first_ranks_view_of_the_record_counts(cfg, checkpoints):
    RunRecord(cfg).remember(0)
    first, second, third = agree(changed(cfg, "seed=4"), checkpoints, 3)
    assert first == second == third and first.startswith("seed: 4, but the run in ")


def test_a_rank_that_does_not_answer_is_named_and_nothing_is_moved(cfg, checkpoints, monkeypatch):
    """It may be reading a checkpoint that is whole."""
    before = sorted(checkpoints.rglob("*"))
    cfg.collective_timeout = 0.3
    monkeypatch.setattr(first_rank, "ACK_TIMEOUT", 0.1)
    with pytest.raises(
        ValueError, match=r"^collective_timeout: rank 1 did not answer in 0\.3 s, .* raise collective_t"
    ):
        resume._lead(cfg, RunRecord(cfg), Ranks(dist.HashStore(), 0, 2, cfg.collective_timeout))
    assert sorted(checkpoints.rglob("*")) == before


def test_all_ranks_have_answered_before_one_that_cannot_read_ends_the_run(cfg, checkpoints, monkeypatch):
    answered, when_told, tell = [], [], Ranks._send_last

    def answer(_path, _wanted, rank, _ranks):
        time.sleep(0.2 * rank)
        answered.append(rank)
        return {"unreadable": [5, "Input/output error", f"file of rank {rank}"], "host": "node7"}

    def told(self, message):
        when_told.extend(answered)
        tell(self, message)

    monkeypatch.setattr(resume, "_read_share", answer)
    monkeypatch.setattr(Ranks, "_send_last", told)
    assert all(said.startswith("file of rank 0: Input/output error") for said in agree(cfg, checkpoints, 3))
    assert sorted(when_told) == [0, 1, 2]


def test_every_file_is_read_by_exactly_one_rank(checkpoints):
    wanted = resume.manifest.read(checkpoints / name_of(4))
    shares = [resume._share(wanted, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(wanted.files)


def test_resuming_is_not_switched_off_where_there_are_checkpoints(cfg, checkpoints):
    cfg.exp_manager.explicit_log_dir = str(checkpoints.parent)
    cfg.exp_manager.resume_if_exists = False
    with pytest.raises(ValueError, match=r"^exp_manager\.resume_if_exists: false, but .* use another run_dir"):
        resume.find_checkpoint(cfg, RunRecord(cfg))
