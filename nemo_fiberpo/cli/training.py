"""`fiberpo train` and `fiberpo check`: their arguments, and what they do."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

TRAIN = """Trains the policy on this machine: starts as many ranks as the config and the machine call for.
Under torchrun or srun it is one of the ranks. Ctrl-C stops the run with a checkpoint; the same command
resumes it.

examples:
  fiberpo train my_run                                 conf/my_run.yaml
  fiberpo train my_run hierarchy=trajectory algorithm.rl_steps=200
  fiberpo train my_run wandb=true                      logs to Weights & Biases too
"""
CHECK = """Checks a run as far as that is possible without loading the policy, and tells what was checked and
what was not.

examples:
  fiberpo check my_run
  fiberpo check my_run run_dir=/shared/runs/my_run     also against the run that is there
"""
QUIET = {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "GLOG_minloglevel": "2"}
"""Third-party libraries warn at every import; what is set already stays."""


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """`train` and `check`; `add` makes the parser of a command that takes a config and overrides."""
    train = add("train", help="train a policy", description=TRAIN)
    train.add_argument("--ranks", type=int, metavar="N", help="processes to start; default: by config and machine")
    train.add_argument("--verbose", action="store_true", help="also show the warnings of third-party libraries")
    add("check", help="what is wrong with a run, before it starts", description=CHECK)


def train(config: str, overrides: Sequence[str], ranks: int | None = None, verbose: bool = False) -> int:
    """Train, as the launcher of all ranks or as one of them; the exit status. ValueError for a config that cannot."""
    from nemo_fiberpo.cli.launcher import adopt_srun, is_rank, ranks_for, run_ranks

    command = [sys.executable, "-m", "nemo_fiberpo.cli.rank", config, *overrides]
    if not verbose:
        os.environ |= {name: value for name, value in QUIET.items() if name not in os.environ}
    os.environ |= {} if is_rank() else adopt_srun()
    if is_rank():
        os.execv(sys.executable, command)
    from nemo_fiberpo.aligner.checkpoint.run_record import RunRecord
    from nemo_fiberpo.aligner.config.checks import read_training_config
    from nemo_fiberpo.cli.compose import compose

    cfg = compose(config, overrides)
    number = ranks_for(cfg) if ranks is None else ranks
    if number < 1:
        raise ValueError(f"--ranks: must be at least 1, got {number}")
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"] = str(number)  # trainer.devices is read from it
    try:
        read_training_config(cfg)
        RunRecord(cfg).check()
    finally:
        del os.environ["LOCAL_WORLD_SIZE"], os.environ["WORLD_SIZE"]
    return run_ranks(command, number)


def check(config: str, overrides: Sequence[str], say: Callable[[str], None], warn: Callable[[str], None]) -> int:
    """Say what was checked and what was not; the exit status, 1 where something is wrong."""
    from nemo_fiberpo.cli.compose import compose

    cfg = compose(config, overrides)
    problems: list[str] = []
    checked = list(_checked(cfg, config, problems))
    for line in checked:
        say(f"checked      {line}\n")
    for line in _NOT_CHECKED:
        say(f"not checked  {line}\n")
    for problem in problems:
        warn(f"error: {problem}\n")
    return 1 if problems else 0


_NOT_CHECKED = (
    "each line of data against its grader, and the length of prompts in tokens: at the start of training",
    "the weights of the policy, and other jobs in run_dir: at the start of training",
    "memory: `fiberpo plan`",
)


def _checked(cfg: DictConfig, config: str, problems: list[str]) -> Any:
    """A line for each thing that was checked; what is wrong goes to `problems`."""
    from nemo_fiberpo.aligner.checkpoint.run_record import RunRecord
    from nemo_fiberpo.aligner.config.sections import data_settings, reward_settings
    from nemo_fiberpo.aligner.data.prompts import load_prompts
    from nemo_fiberpo.cli.launcher import ranks_for
    from nemo_fiberpo.cli.planning import plan_of

    def attempt(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except ValueError as error:
            if str(error) not in problems:
                problems.append(str(error))
        return None

    nodes = cfg.get("trainer", {}).get("num_nodes", 1)
    if nodes == 1 and "LOCAL_WORLD_SIZE" not in os.environ and (number := attempt(partial(ranks_for, cfg))):
        os.environ["LOCAL_WORLD_SIZE"] = str(number)
    problems += plan_of(cfg, config).problems
    yield f"every section, alone and together, for {nodes} x {cfg.trainer.devices} ranks"
    if problems:
        return
    data, graders = data_settings(cfg), tuple(reward_settings(cfg).graders or ())
    for name, path in (("data.train", data.train), ("data.heldout", data.heldout)):
        if path is None:
            continue
        if not Path(path).is_file():
            yield f"{name}: {path} is not there yet"
        elif (records := attempt(partial(load_prompts, Path(path), graders))) is not None:
            domains = len({record.domain for record in records})
            yield f"{name}: every line of {path}: {len(records)} prompts of {domains} domain{'s' * (domains > 1)}"
    policy = Path(cfg.pretrained_checkpoint.restore_from_path)
    yield f"the policy {policy}: " + ("its config" if policy.exists() else "it is not there yet")
    record = RunRecord(cfg)
    attempt(record.check)
    newest = record.checkpoint if not problems else None
    state = "no run is there" if not record.path.exists() else "the same run is there"
    yield f"{cfg.run_dir}: {state}" + (f", saved at RL step {newest['step']}" if newest else "")
