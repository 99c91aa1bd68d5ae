"""`fiberpo train` and `fiberpo check`, as a user types them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from nemo_fiberpo.aligner.lifecycle.preemption import CTRL_C
from nemo_fiberpo.cli import launcher
from nemo_fiberpo.cli.compose import compose
from tests.support.launching import ROOT, SMALL, environment, fresh, optimizer_steps, wait_for, wait_for_rl_step
from tests.support.processes import started

STEPS = ["algorithm.rl_steps=4", "algorithm.save_interval=0"]


@contextmanager
def fiberpo(*arguments: str, output: Path) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "nemo_fiberpo.cli", *arguments]
    with (
        output.open("w") as file,
        started(command, environment(), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT) as run,
    ):
        yield run


def train(run_dir: Path, *overrides: str, output: Path) -> AbstractContextManager[subprocess.Popen]:
    return fiberpo("train", "quickstart", f"run_dir={run_dir}", *SMALL, *STEPS, *overrides, output=output)


def test_ctrl_c_stops_with_a_checkpoint_and_the_same_command_resumes(start: Path, tmp_path: Path):
    run_dir, said = fresh(start, tmp_path, "run"), tmp_path / "said"
    with train(run_dir, output=said) as run:
        wait_for_rl_step(run, run_dir, 1, 300, said)
        run.send_signal(signal.SIGINT)
        assert run.wait(120) == 75, said.read_text()
    assert CTRL_C in said.read_text()
    assert said.read_text().splitlines()[-1].endswith("checkpoint saved; the same command resumes from here")
    done = len(optimizer_steps(run_dir))
    assert 0 < done < 8
    with train(run_dir, output=said) as run:
        assert run.wait(300) == 0, said.read_text()
    assert len(optimizer_steps(run_dir)) == 8
    assert "step 4/4" in said.read_text() and (run_dir / "report.png").stat().st_size > 10_000
    assert "GLOBAL_RANK" not in said.read_text() and "Warning" not in said.read_text()


@pytest.mark.parametrize("how", ["a second Ctrl-C", "SIGKILL to the launcher"])
def test_nothing_is_left_of_ranks_that_are_ended_at_once(how: str, start: Path, tmp_path: Path):
    run_dir, said = fresh(start, tmp_path, "run"), tmp_path / "said"
    with train(run_dir, "algorithm.rl_steps=400", output=said) as run:
        wait_for_rl_step(run, run_dir, 0, 300, said)
        children = psutil.Process(run.pid).children(recursive=True)
        assert len(children) >= 2
        if how == "SIGKILL to the launcher":
            run.kill()
            run.wait()
        else:
            run.send_signal(signal.SIGINT)
            wait_for(lambda: CTRL_C in said.read_text(), 30, "the first Ctrl-C is answered")
            run.send_signal(signal.SIGINT)
            assert run.wait(60) == 130, said.read_text()
            assert "Traceback" not in said.read_text()
        wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in children), 120, "end")


def test_an_error_is_printed_once_as_the_last_line(start: Path, tmp_path: Path):
    run_dir, said = fresh(start, tmp_path, "run"), tmp_path / "said"
    data = run_dir / "data" / "train.jsonl"
    data.write_text(data.read_text() + '{"prompt": 3}\n')
    lines = len(data.read_text().splitlines())
    with train(run_dir, output=said) as run:
        assert run.wait(300) == 1, said.read_text()
    errors = [line for line in said.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"train.jsonl:{lines}" in errors[0], said.read_text()
    assert said.read_text().splitlines()[-1] == errors[0]


def test_an_error_in_the_config_is_reported_before_any_rank_starts(tmp_path: Path):
    said = tmp_path / "said"
    with train(tmp_path / "run", "algorithm.optimizer_step=2", output=said) as run:
        assert run.wait(120) == 2
    only = "error: algorithm.optimizer_step: unknown key; did you mean optimizer_steps?"
    assert said.read_text().splitlines()[-1].startswith(only[:45]), said.read_text()
    assert not (tmp_path / "run").exists()


def test_a_rank_that_waits_for_one_that_has_failed_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = (
        "import os, pathlib, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit(3)\n"
        f"time.sleep(60); pathlib.Path({str(tmp_path / 'waited')!r}).touch()"
    )
    monkeypatch.setattr(launcher, "GRACE", 0.5)
    assert launcher.run_ranks([sys.executable, "-c", code], 2) == 3
    assert not (tmp_path / "waited").exists()


@pytest.mark.parametrize(
    ("overrides", "cores", "number"),
    [
        ([], 2, 2),
        ([], 1, 1),
        ([], 64, 4),  # 384 samples per generation batch: no more than 4 of them in a rollout of 1536
        (["model.tensor_model_parallel_size=2"], 1, 2),
        (["trainer.devices=8"], 2, 8),
    ],
)
def test_as_many_ranks_as_the_config_and_the_machine_call_for(overrides, cores, number, monkeypatch):
    monkeypatch.setattr("nemo_fiberpo.cores.available", lambda: cores)
    cfg = compose("quickstart", ["algorithm.prompts_per_rollout=192", *overrides])
    assert launcher.ranks_for(cfg) == number


def test_a_machine_that_cannot_run_it_is_refused():
    cfg = compose("quickstart", ["cpu=false", "trainer.accelerator=gpu"])
    with pytest.raises(ValueError, match=r"trainer\.accelerator: gpu, but this machine has none"):
        launcher.ranks_for(cfg)
    with pytest.raises(ValueError, match=r"trainer\.num_nodes: 2.*train\.sbatch"):
        launcher.ranks_for(compose("quickstart", ["trainer.num_nodes=2"]))


def test_a_task_of_srun_is_a_rank():
    step = {
        "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "MASTER_ADDR": "n1",
    }  # fmt: skip
    found = launcher.adopt_srun(step)
    assert {name: found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n1"
    }  # fmt: skip
    assert launcher.adopt_srun(step | {"SLURM_JOB_ID": "13"})["MASTER_PORT"] != found["MASTER_PORT"]
    assert launcher.adopt_srun(step | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert launcher.adopt_srun({}) == {}


def test_check_names_what_it_checked_and_what_it_did_not(start: Path, tmp_path: Path):
    run_dir, said = fresh(start, tmp_path, "run"), tmp_path / "said"
    with fiberpo("check", "quickstart", f"run_dir={run_dir}", *SMALL, output=said) as run:
        assert run.wait(120) == 0, said.read_text()
    checked = said.read_text()
    assert "ranks: 1 x 2" in checked and "data.train: 3500 prompts in" in checked
    assert "warm_start.nemo; its weights not checked" in checked and "would start at RL step 0" in checked
    assert "not checked before training starts: each line of data against its grader" in checked
    wrong = ["algorithm.optimizer_steps=3", "rewards.workers=0"]
    with fiberpo("check", "quickstart", f"run_dir={run_dir}", *SMALL, *wrong, output=said) as run:
        assert run.wait(120) == 1
    errors = [line for line in said.read_text().splitlines() if line.startswith("error: ")]
    assert [error.split(":")[1].strip() for error in errors] == ["algorithm.optimizer_steps", "rewards.workers"]


def test_weights_and_biases_is_one_word():
    cfg = compose("quickstart", ["wandb=true", "run_dir=/nowhere"])
    assert cfg.exp_manager.create_wandb_logger is True
    assert OmegaConf.to_container(cfg.exp_manager.wandb_logger_kwargs, resolve=True) == {
        "project": "nemo_fiberpo",
        "name": "quickstart",
    }
