"""Kill training runs at random moments, a good part of them while they save, and count what that costs.

    python -m tests.kill --kills 100

Every run is examples/train_gpt_fiberpo.py on one process with a tiny policy. A killed run is started again with the
same configuration until it ends by itself; then its metrics and prompts must be those of a run that nobody killed.
Exit status 0 if no run failed to resume, each resumed from the newest whole checkpoint, and all digits are the same.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

from tests.kill.series import Counts, Plan, kill_until_done, prepare


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=10, help="RL steps of a run")
    parser.add_argument("--in-save", type=float, default=0.5, help="share of the kills that wait for a save to begin")
    parser.add_argument("--sigusr1", type=float, default=0.0, help="share of SIGUSR1 instead of SIGKILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-last", action="store_true", help="with NeMo's -last copy of the newest checkpoint")
    parser.add_argument("--directory", type=Path, help="where the runs go; default: a temporary directory, removed")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="kill-") as temporary:
        directory = options.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        saving = ["exp_manager.checkpoint_callback_params.save_last=true"] if options.save_last else []
        setup = prepare(directory, options.steps, saving)
        counts, rng = Counts(), random.Random(options.seed)
        while counts.kills < options.kills and not counts.failed:
            kill_until_done(setup, counts, rng, Plan(options.kills, options.in_save, options.sigusr1))
            print(json.dumps(counts.summary()), flush=True)
    print("\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in counts.summary().items()))
    return int(counts.failed)


if __name__ == "__main__":
    raise SystemExit(main())
