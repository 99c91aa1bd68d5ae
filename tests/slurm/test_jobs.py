"""The scripts of examples/slurm on a real SLURM of two nodes: submit, watch, lose a node, preempt, cancel, fail.

What must hold: an interrupted run goes on by itself, and its metrics equal those of an uninterrupted one bit for bit;
what cannot go on is not started again; nothing is left running.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmError
from tests.slurm.jobs import ONE_RANK_EACH, PATIENCE, RL_STEPS, Job, same_metrics, seconds_since
from tests.slurm.ranks import ranks_that_end
from tests.support.launching import ROOT, wait_for
from tests.support.processes import kill

ENDLESS = ["algorithm.rl_steps=1000", "algorithm.data_epochs=1000"]
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1200)]


@pytest.fixture
def job(cluster, start, tmp_path) -> Iterator[Job]:
    yield Job(cluster, start, tmp_path)
    cluster.clear()


def test_the_shipped_script_trains_on_two_nodes(uninterrupted):
    fields, said = uninterrupted.fields(), uninterrupted.output()
    assert fields["NumNodes"] == "2" and fields["Restarts"] == "0" and fields["ExitCode"] == "0:0"
    assert json.loads((uninterrupted.run_dir / "run.json").read_text())["identity"]["ranks"] == 2
    assert "nodes n[1-2], 1 ranks each by srun" in said


def test_fiberpo_train_is_a_rank_under_srun(job, uninterrupted):
    printed = job.srun("train")
    assert printed.count(f"step {RL_STEPS}/{RL_STEPS}") == 1, printed
    assert json.loads((job.run_dir / "run.json").read_text())["identity"]["ranks"] == 2
    same_metrics(job, uninterrupted)


def test_a_job_outlives_the_death_of_each_of_its_nodes(cluster, job, uninterrupted, record_property):
    """First the node of one rank, of which the other rank hears before SLURM does; then the node of the batch script,
    whose death only SLURM can notice."""
    job.submit()
    for restart, (node, rows) in enumerate((("n2", 5), ("n1", 9)), start=1):
        job.wait_for_rows(rows)
        before, begun = job.rows(), time.monotonic()
        assert cluster.kill_node(node) >= 3, "slurmd, slurmstepd and a rank at least"
        job.wait_for_restart(restart)
        noticed = seconds_since(begun)
        cluster.start_node(node)
        job.wait_for_new_step(before)
        record_property(f"seconds from the death of {node} to the requeue", noticed)
        record_property(f"seconds from the death of {node} to the next optimizer step", seconds_since(begun))
    job.ends_as("COMPLETED")
    said = job.output()
    by = {"the script": "and a node does not answer: requeued" in said, "SLURM": "DUE TO NODE FAILURE" in said}
    record_property("requeued by", " and ".join(name for name, did in by.items() if did))
    assert any(by.values()) and "MAX_RESTARTS" not in said
    same_metrics(job, uninterrupted)


def test_a_warned_job_saves_and_resumes(cluster, job, uninterrupted, record_property):
    """With ranks that torchrun starts. The signal comes as that of --signal=B:USR1@SECONDS does; SIGTERM is told from a
    cancelled job's by the state of the job."""
    job.submit(env={"LAUNCHER": "torchrun"})
    job.wait_for_rows(3)
    begun = time.monotonic()
    cluster.command("scancel", "--signal=TERM", "--batch", job.id)
    job.wait_for_restart(1)
    record_property("seconds from the warning to the requeue", seconds_since(begun))
    job.wait_for_rows(job.rows() + 1)
    record_property("seconds from the warning to the next optimizer step", seconds_since(begun))
    job.ends_as("COMPLETED")
    said = job.output()
    assert "the ranks are asked to save and to stop" in said and "the run can go on: requeued" in said
    same_metrics(job, uninterrupted)


def test_a_warned_task_of_an_array_leaves_the_rest_to_the_next(cluster, job):
    job.submit(env=ranks_that_end("wait wait/0 0"), options=[*ONE_RANK_EACH, "--array=1-3%1"])
    array, job.id = job.id, f"{job.id}_1"
    job.wait_for_waiting_ranks(2)
    with contextlib.suppress(SlurmError):  # SLURM 22.05 signals the task and yet reports no success
        cluster.command("scancel", "--signal=USR1", "--batch", job.id)
    job.ends_as("COMPLETED")
    job.id = f"{array}_2"
    job.ends_as("COMPLETED")
    said = job.output()
    assert "the ranks are asked to save and to stop" in said and "the next array task goes on" in said
    assert "CANCELLED" in cluster.job(f"{array}_3")["JobState"], "there was nothing left to do"


def test_a_cancelled_job_ends_and_leaves_no_process(cluster, job):
    job.submit(*ENDLESS)
    job.wait_for_rows(3)
    assert len(cluster.job_processes()) >= 4, "the batch script, srun and two ranks at least"
    cluster.command("scancel", job.id)
    fields = job.ends_as("CANCELLED")
    wait_for(lambda: not cluster.job_processes(), PATIENCE, "the end of all processes of the job")
    assert fields["Restarts"] == "0"
    assert cluster.job(job.id)["JobState"] == "CANCELLED", "it is not requeued, though its ranks could go on"


def test_a_cancelled_job_whose_script_hears_of_it_too_late_is_not_requeued(job, tmp_path):
    """The ranks save and end without it: bash cannot trap a signal that was ignored when it started."""
    shipped = ROOT / "examples" / "slurm" / "train.sbatch"
    header = [line for line in shipped.read_text().splitlines() if line.startswith(("#!", "#SBATCH"))]
    deaf = tmp_path / "deaf.sbatch"
    deaf.write_text("\n".join([*header, "trap '' TERM", f'exec bash {shipped} "$@"', ""]))
    job.submit(script=deaf, env=ranks_that_end("wait wait/0 0"))
    job.wait_for_waiting_ranks(2)
    job.cluster.command("scancel", job.id)
    fields = job.ends_as("CANCELLED")
    assert fields["Restarts"] == "0"
    wait_for(lambda: "ended from outside" in job.output(), PATIENCE, "what the script says of it")


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_job_whose_ranks_get_sigterm_resumes(job, launcher: str):
    """As SLURM sends it when the grace time of a preemption begins: to the ranks alone."""
    job.submit(env=ranks_that_end("wait wait/0 0") | {"LAUNCHER": launcher})
    job.wait_for_waiting_ranks(2)
    job.cluster.command("scancel", "--signal=TERM", job.id)
    fields = job.ends_as("COMPLETED")
    assert fields["Restarts"] == "1"
    assert "the run can go on: requeued" in job.output()


def test_a_job_whose_rank_gets_sigkill_is_started_again_but_not_for_ever(job):
    job.submit(env={**ranks_that_end("0 KILL/KILL 0/0 0"), "MAX_KILLED": "1"})
    fields = job.ends_as("FAILED")
    said = job.output()
    assert fields["Restarts"] == "1" and fields["ExitCode"] == "137:0"
    assert said.count("] a rank was killed") == 1
    assert "the ranks ended with status 137: a rank was killed: requeued" in said
    assert "error: the ranks ended with status 137; not started again" in said


def test_a_job_that_fails_while_a_node_does_not_answer_is_started_again(cluster, job):
    """Before SLURM has noticed it: by default it takes five minutes."""
    job.submit(env=ranks_that_end("wait wait/0 0"))
    job.wait_for_waiting_ranks(2)
    ranks = {pid for pid, command in cluster.job_processes().items() if "sigwait" in command}
    assert len(ranks) == 2
    cluster.kill_daemon("n2")
    kill(ranks)
    try:
        job.wait_for_restart(1)
    finally:
        cluster.start_node("n2")
    job.ends_as("COMPLETED")
    assert "the ranks ended with status 137 and a node does not answer: requeued" in job.output()


@pytest.mark.parametrize(
    ("ends", "status", "why"),
    [
        ("1 wait/0 0", "1", "the ranks ended with status 1"),
        ("wait 0/0 0", "137", "a rank was still running 15 s after the first one's end, and was ended"),
    ],
    ids=["one fails", "one is well"],
)
def test_a_rank_that_waits_for_another_is_ended_and_does_not_hide_why(job, ends: str, status: str, why: str):
    job.submit(env=ranks_that_end(ends))
    fields = job.ends_as("FAILED")
    assert fields["Restarts"] == "0" and fields["ExitCode"] == f"{status}:0"
    assert f"error: {why}; not started again" in job.output()


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_an_error_is_in_the_output_and_the_job_is_not_started_again(job, launcher: str):
    """With two ranks a node, of which srun starts every one, or a torchrun both."""
    options = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0"]
    job.submit("algorithm.prompts_per_rolout=8", options=options, env={"LAUNCHER": launcher})
    fields = job.ends_as("FAILED")
    said = job.output()
    assert "error: algorithm.prompts_per_rolout: unknown" in said, said
    assert "error: the ranks ended with status 1; not started again" in said
    assert fields["Restarts"] == "0" and fields["ExitCode"] == "1:0"
    tasks = {int(task) for task in re.findall(r"^(\d+): ", said, re.MULTILINE)}
    assert tasks == set(range(4 if launcher == "srun" else 2))


def test_a_limit_shorter_than_its_warning_is_an_error_at_the_second_start(job):
    """Warned at once, the run could never take a step, however often it is started."""
    job.submit(*ENDLESS, options=[*ONE_RANK_EACH, "--time=10", "--signal=B:USR1@600"])
    fields = job.ends_as("FAILED")
    assert "--time must be longer than the seconds of --signal" in job.output()
    assert fields["Restarts"] == "1"


def test_container_options_reach_srun(job):
    """The test cluster has no pyxis: srun itself must name the option it does not know."""
    job.submit(env={"CONTAINER_IMAGE": "/images/nemo.sqsh"})
    job.ends_as("FAILED")
    assert "unrecognized option '--container-image=/images/nemo.sqsh'" in job.output()


HETEROGENEOUS = [*(option.replace("=2", "=1") for option in ONE_RANK_EACH), ":", *ONE_RANK_EACH[1:], "--nodes=1"]


def test_the_end_of_the_reward_server_is_that_of_the_job(job):
    server = {"REWARD_SERVER": "sleep 3; false"}
    job.submit(script="train_with_reward_server.sbatch", options=HETEROGENEOUS, env=ranks_that_end("wait/0") | server)
    fields = job.ends_as("FAILED")
    assert fields["Restarts"] == "0"
    assert "the reward server has ended: the ranks are ended" in job.output()
    assert "after the reward server's end; not started again" in job.output()


def test_a_reward_server_without_a_model_is_an_error(job):
    job.submit(script="train_with_reward_server.sbatch", options=HETEROGENEOUS)
    job.ends_as("FAILED")
    assert "error: RM_NEMO_FILE: give the reward model's .nemo file" in job.output()


@pytest.fixture(scope="session")
def pytriton() -> Path:
    """The Python of an environment with PyTriton."""
    if not os.environ.get("FIBERPO_PYTRITON"):
        pytest.skip("needs PyTriton, which `bash tests/slurm/run.sh` installs")
    return Path(os.environ["FIBERPO_PYTRITON"])


def test_a_heterogeneous_job_trains_on_rewards_from_its_server(cluster, job, pytriton):
    packages = next((pytriton.parents[1] / "lib").glob("python3*/site-packages"))
    library = f"{os.path.dirname(os.path.realpath(pytriton))}/../lib"  # libpython, which PyTriton's back end loads
    server = Path(__file__).with_name("reward_server.py")
    job.submit(
        "algorithm.rl_steps=2",
        script="train_with_reward_server.sbatch",
        options=HETEROGENEOUS,
        env={
            "REWARD_SERVER": f"env -u PYTHONPATH LD_LIBRARY_PATH={library} {pytriton} {server}",
            "PYTHONPATH": f"{cluster.environment['PYTHONPATH']}:{packages}",
        },
    )
    job.ends_as("COMPLETED")
    wait_for(lambda: not cluster.job_processes(), PATIENCE, "the end of the reward server")
    rewards = [row["train_rollouts/rewards"] for row in job.metrics() if "train_rollouts/rewards" in row]
    assert len(rewards) == 2 and all(0.0 < reward < 1.0 for reward in rewards)
