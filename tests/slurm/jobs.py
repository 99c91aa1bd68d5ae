"""Submitting the scripts of examples/slurm with a tiny policy, and watching what becomes of a job."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.ranks import count_waiting
from tests.support.launching import ROOT, SMALL, metrics, optimizer_steps, wait_for

RL_STEPS, SAVE_INTERVAL, PER_STEP = 6, 2, 2  # PER_STEP: optimizer steps of an RL step, each a row of metrics.jsonl
RUN = [f"algorithm.rl_steps={RL_STEPS}", f"algorithm.save_interval={SAVE_INTERVAL}", "algorithm.data_epochs=2"]
# The header asks for GPUs, of which the test cluster has none.
ONE_RANK_EACH = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0"]
PATIENCE = 300  # seconds; nothing here takes a third of it on two idle cores


class Job:
    """A submitted run: `folder` has its run directory and what it printed."""

    def __init__(self, cluster: Cluster, start: Path, folder: Path):
        self.cluster, self.folder = cluster, folder
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        shutil.copytree(start / "data", self.run_dir / "data")
        shutil.copy(start / "warm_start.nemo", self.run_dir / "warm_start.nemo")
        self.id = ""

    def submit(
        self,
        *overrides: str,
        options: list[str] = ONE_RANK_EACH,
        script: str | Path = "train.sbatch",
        env: dict[str, str] | None = None,
    ) -> None:
        arguments = ["--config-name", "quickstart", f"run_dir={self.run_dir}", *SMALL, *RUN, *overrides]
        environment = {"REPO": str(ROOT), **(env or {})}
        batch = ["sbatch", "--parsable", *options, str(ROOT / "examples" / "slurm" / script), *arguments]
        self.id = self.cluster.command(*batch, cwd=self.folder, env=environment).strip()

    def srun(self, command: str) -> str:
        """`fiberpo COMMAND` of the run on both nodes, by srun without a script; what it printed."""
        run = ["fiberpo", command, "quickstart", f"run_dir={self.run_dir}", *SMALL, *RUN, "trainer.num_nodes=2"]
        return self.cluster.command("srun", *ONE_RANK_EACH, *run, "trainer.devices=1", cwd=ROOT, timeout=PATIENCE)

    def output(self) -> str:
        """What the job and its ranks printed, in all its starts; of an array, all tasks."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("fiberpo-*.out")))

    def metrics(self) -> list[dict]:
        return metrics(self.run_dir)

    def fields(self) -> dict[str, str]:
        return self.cluster.job(self.id)

    def rows(self) -> int:
        """Optimizer steps in metrics.jsonl, of which a line may be half written."""
        path = self.run_dir / "metrics.jsonl"
        return len(re.findall(r'"train_optim/grad_norm".*\n', path.read_text())) if path.exists() else 0

    def wait_for_rows(self, count: int) -> None:
        """Until so many optimizer steps are in metrics.jsonl."""

        def grown() -> bool:
            state = self.fields()["JobState"]
            assert state in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), f"{state}\n{self.output()[-6000:]}"
            return self.rows() >= count

        self._patiently(grown, f"{count} optimizer steps")

    def wait_for_waiting_ranks(self, count: int) -> None:
        """Until so many ranks of `ranks_that_end` wait for a signal."""
        self._patiently(lambda: count_waiting(self.output()) == count, f"{count} waiting ranks")

    def wait_for_restart(self, count: int) -> None:
        """Until SLURM has put the job back into its queue so many times."""
        self._patiently(lambda: int(self.fields()["Restarts"]) >= count, f"restart {count}")

    def wait_for_new_step(self, rows_before: int) -> None:
        """Until a resumed run, which first takes back the rows after its checkpoint, has written a new one."""
        fewest = rows_before

        def grown() -> bool:
            nonlocal fewest
            now = self.rows()
            fewest = min(fewest, now)
            return now > fewest

        self._patiently(grown, "the first new optimizer step", every=0.05)

    def ends_as(self, state: str) -> dict[str, str]:
        """Wait for the end; the job's fields. AssertionError with its output if that is another one."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}
        fields = self.cluster.wait_for_state(self.id, ends, PATIENCE)
        assert fields["JobState"] == state, f"{fields['JobState']}\n{self.output()[-6000:]}"
        return fields

    def _patiently(self, condition, what: str, every: float = 0.2) -> None:
        try:
            wait_for(condition, PATIENCE, what, every)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.output()[-6000:]}") from None


def prompts(run_dir: Path) -> list[int]:
    """The prompts that the run trained on, in order, by their lines in the data."""
    return [line for row in (run_dir / "prompts.jsonl").read_text().splitlines() for line in json.loads(row)["lines"]]


def same_metrics(job: Job, reference: Job) -> None:
    """Bit for bit, except what is about time; and no prompt is repeated or skipped."""
    assert len(optimizer_steps(reference.run_dir)) == RL_STEPS * PER_STEP
    assert metrics(job.run_dir) == metrics(reference.run_dir)
    assert prompts(job.run_dir) == prompts(reference.run_dir)
    assert len(prompts(job.run_dir)) == len(set(prompts(job.run_dir))) == 8 * RL_STEPS


def seconds_since(begun: float) -> float:
    return time.monotonic() - begun
