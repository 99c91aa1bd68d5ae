"""Train a policy with FiberPO: the script for torchrun and srun. On one machine, `fiberpo train` also starts the ranks.

    torchrun --nproc_per_node 2 examples/train_gpt_fiberpo.py --config-name quickstart
    torchrun ... examples/train_gpt_fiberpo.py --config-name my_run hierarchy=trajectory algorithm.rl_steps=200
    torchrun ... examples/train_gpt_fiberpo.py --config-name my_run hierarchy.strata.domain.budget.pos=0.03

    python examples/train_gpt_fiberpo.py --check --config-name my_run     only check the config, as `fiberpo check`

A run that was stopped resumes from its newest whole checkpoint when the same command is given again; it exits with
status 75 when SIGUSR1, SIGTERM, Ctrl-C or its time limit stops it before its end.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from nemo_fiberpo.aligner.lifecycle import preemption
from nemo_fiberpo.aligner.lifecycle.ending import run_main
from nemo_fiberpo.hydra_support.command_line import command_line, find_modules_in, folders_of_config, prepare_hydra

prepare_hydra()
preemption.install(__name__)
CHECK_ONLY = "--check" in sys.argv


def train(cfg: DictConfig) -> None:
    from nemo_fiberpo.aligner.run import Run  # not at the top: child processes of a rank import this file again

    with Run(cfg) as run:  # the config is checked
        if CHECK_ONLY:
            print("\n".join(run.check()))
            return
        run.load()
        run.build()
        run.train()
        run.evaluate("after")
        run.report()


@hydra.main(version_base=None, config_path="../conf", config_name="quickstart")
def main(cfg: DictConfig) -> None:
    find_modules_in(folders_of_config())
    run_main(lambda: train(cfg))


if __name__ == "__main__":
    sys.argv[1:] = command_line(argument for argument in sys.argv[1:] if argument != "--check")
    main()
