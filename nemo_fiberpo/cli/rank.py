"""A rank of `fiberpo train`: python -m nemo_fiberpo.cli.rank CONFIG [KEY=VALUE ...]

A separate module, since multiprocessing imports the main module again in every child process of a rank.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nemo_fiberpo.aligner.lifecycle import preemption

preemption.install(__name__)


def train(config: str, overrides: Sequence[str]) -> None:
    """Run this rank of the config's run."""
    from nemo_fiberpo.aligner.run import Run
    from nemo_fiberpo.cli.compose import compose

    with Run(compose(config, overrides)) as run:
        run.load()
        run.build()
        run.train()
        run.evaluate("after")
        run.report()


if __name__ == "__main__":
    from nemo_fiberpo.aligner.lifecycle.ending import run_main

    run_main(lambda: train(sys.argv[1], sys.argv[2:]))
