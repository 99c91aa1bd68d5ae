"""Runs of the training script on one process that begin in milliseconds, forked from this one, see `aligner.forked`.

Fork begins each run; SIGKILL ends it like any other process.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from nemo_fiberpo.aligner.lifecycle import preemption
from tests.support import forked
from tests.support.launching import ROOT, arguments, free_ports

# The smallest runs that still learn: two prompts of two samples, graded by a sum over the response's characters.
TINY = [
    "model.num_moe_experts=null",
    "algorithm.prompts_per_rollout=2",
    "algorithm.samples_per_prompt=2",
    "algorithm.optimizer_steps=1",
    "algorithm.epochs=2",
    "algorithm.data_epochs=100",
    "model.micro_batch_size=2",
    "model.ppo.rollout_micro_batch_size=4",
    "model.ppo.length_params.max_length=4",
    "model.optim.lr=1.0e-3",
    "rewards.score=raw",
    "rewards.graders={checksum: 'tests.support.checksum_grader:grade'}",
]


def checksum_prompts(data: Path, prompts: int) -> None:
    """Keep the first prompts of the training data, graded by `checksum_grader`."""
    lines = data.read_text().splitlines(keepends=True)[:prompts]
    data.write_text("".join(lines).replace('"grader": "reasoning_gym"', '"grader": "checksum"'))


def begin(run_dir: Path, overrides: list[str], output: Path) -> int:
    """Fork a run; its process id. Its exit status is the script's."""
    with preemption.signals_blocked():  # a signal may come before the child can say what becomes of it
        pid = os.fork()
        if pid == 0:
            preemption.install()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()  # what a killed run leaves behind can be ended with its group
        with output.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        script = str(ROOT / "examples" / "train_gpt_fiberpo.py")
        forked.run_as_rank(script, arguments(run_dir, *TINY, *overrides), 0, 1, free_ports(1)[0])
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
        if not isinstance(leaving.code, int):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
