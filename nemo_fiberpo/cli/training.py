"""The commands `fiberpo train` and `fiberpo check`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

TRAIN = """Trains the policy on this machine: starts as many ranks as the config and the machine call for.
Under torchrun or srun it is one of the ranks. Ctrl-C stops the run with a checkpoint; the same command
resumes it.

examples:
  fiberpo train my_run                                 conf/my_run.yaml
  fiberpo train my_run hierarchy=trajectory algorithm.rl_steps=200
  fiberpo train my_run wandb=true                      logs to Weights & Biases too
"""
CHECK = """Checks a run as far as possible without loading the policy, and lists what was checked and what was not.

examples:
  fiberpo check my_run
  fiberpo check my_run run_dir=/shared/runs/my_run     also against the run in it
"""
QUIET = {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "GLOG_minloglevel": "2"}
"""Silence the import warnings of third-party libraries; variables that are set already stay."""


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """`train` and `check`; `add` makes the parser of a command that takes a config and overrides."""
    train = add("train", help="train a policy", description=TRAIN)
    train.add_argument("--ranks", type=int, metavar="N", help="processes to start; default: from config and machine")
    train.add_argument("--verbose", action="store_true", help="also show the warnings of third-party libraries")
    add("check", help="check a run before it starts", description=CHECK)


def train(config: str, overrides: Sequence[str], ranks: int | None = None, verbose: bool = False) -> int:
    """Train, as the launcher of all ranks or as one of them; returns the exit status. ValueError for a bad config."""
    from nemo_fiberpo.cli.launcher import adopt_srun, is_rank, ranks_for, run_ranks

    command = [sys.executable, "-m", "nemo_fiberpo.cli.rank", config, *overrides]
    if not verbose:
        os.environ |= {name: value for name, value in QUIET.items() if name not in os.environ}
    os.environ |= {} if is_rank() else adopt_srun()
    if is_rank():
        os.execv(sys.executable, command)
    from nemo_fiberpo.aligner.run import Run
    from nemo_fiberpo.cli.compose import compose

    cfg = compose(config, overrides)
    number = ranks_for(cfg) if ranks is None else ranks
    if number < 1:
        raise ValueError(f"--ranks: must be at least 1, got {number}")
    with _environment(LOCAL_WORLD_SIZE=str(number), WORLD_SIZE=str(number)):  # trainer.devices is read from it
        Run(cfg).record.check()
    return run_ranks(command, number)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables within the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def check(config: str, overrides: Sequence[str], say: Callable[[str], None], warn: Callable[[str], None]) -> int:
    """Print what was checked and what was not; returns the exit status, 1 if something is wrong."""
    from nemo_fiberpo.aligner.run import Run
    from nemo_fiberpo.cli.compose import compose
    from nemo_fiberpo.cli.launcher import ranks_for
    from nemo_fiberpo.cli.planning import plan_of

    cfg, problems = compose(config, overrides), []
    variables = {}
    if cfg.get("trainer", {}).get("num_nodes", 1) == 1 and "LOCAL_WORLD_SIZE" not in os.environ:
        try:
            variables["LOCAL_WORLD_SIZE"] = str(ranks_for(cfg))
        except ValueError as error:
            problems.append(str(error))
    with _environment(**variables):
        problems += [problem for problem in plan_of(cfg, config).problems if problem not in problems]
        if not problems:
            say(f"ranks: {cfg.trainer.num_nodes} x {cfg.trainer.devices}\n")
            try:
                for line in Run(cfg).check():
                    say(f"{line}\n")
            except ValueError as error:
                problems.append(str(error))
    if not problems:
        say(_NOT_CHECKED)
    for problem in problems:
        warn(f"error: {problem}\n")
    return 1 if problems else 0


_NOT_CHECKED = """not checked before training starts: each line of data against its grader, the length of prompts in
tokens, other jobs in run_dir. `fiberpo plan` estimates the memory.
"""
