"""Runs of the training script that begin in milliseconds: forked from one process that has everything imported.

NeMo's imports take most of a short run's time. The parent imports them and composes the config; it makes no process
group, no thread and no random number, so that a child is what a fresh process would be at that point. Fork begins each
run; SIGKILL ends it like any other process.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from types import ModuleType

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from nemo_fiberpo.aligner import launch, preemption
from tests.aligner.launching import ROOT, SMALL

# The smallest runs that still learn: two prompts of two samples, graded by a sum over the response's characters.
TINY = [
    *SMALL,
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
    "rewards.graders={checksum: 'tests.aligner.checksum_grader:grade'}",
]


def checksum_prompts(data: Path, prompts: int) -> None:
    """Keep the first prompts of the training data, graded by `checksum_grader`."""
    lines = data.read_text().splitlines(keepends=True)[:prompts]
    data.write_text("".join(lines).replace('"grader": "reasoning_gym"', '"grader": "checksum"'))


def configuration(run_dir: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        arguments = launch.overrides([f"run_dir={run_dir}", *TINY, *overrides])
        return compose("quickstart", overrides=arguments)


def import_everything(cfg: DictConfig) -> ModuleType:
    """The training script as a module, and what its `run` will import."""
    spec = importlib.util.spec_from_file_location("train_gpt_fiberpo", ROOT / "examples" / "train_gpt_fiberpo.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for number in preemption.SIGNALS:  # the script catches them, its runs here do again
        signal.signal(number, signal.SIG_DFL)
    launch.start(cfg)
    import nemo.utils.exp_manager  # noqa: F401
    import nemo_aligner.algorithms.ppo
    import nemo_aligner.utils.train_script_utils  # noqa: F401

    import nemo_fiberpo.aligner.actor
    import nemo_fiberpo.aligner.checkpoints
    import nemo_fiberpo.aligner.remote_rewards
    import nemo_fiberpo.aligner.report
    import nemo_fiberpo.aligner.trainer  # noqa: F401

    return script


def begin(script: ModuleType, cfg: DictConfig, output: Path) -> int:
    """Fork a run; its process id. Its exit status is the script's."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        preemption.install()
        os.setsid()  # what a killed run leaves behind can be ended with its group
        with output.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        launch.explain(lambda: script.run(cfg))
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
