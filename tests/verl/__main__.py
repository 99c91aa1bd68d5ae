"""Prints the table of docs/verl.md: `.venv-verl/bin/python -m tests.verl`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from tests.verl.conftest import prepare
from tests.verl.host import GROUPS, HIERARCHY, SAMPLES, make_batch, save_model
from tests.verl.ranks import steps
from tests.verl.slow import expected, relative_error

ROWS = GROUPS * SAMPLES


def main() -> int:
    prepare()
    fiberpo = {"loss_mode": "fiberpo", "hierarchy": HIERARCHY}
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        batch = make_batch(Path(folder))
        wanted = expected(folder, batch, HIERARCHY)
        parameters: dict[str, torch.Tensor] = {}
        print(
            "| ranks | micro-batches | objective, relative error | largest gradient error | parameters after a step |"
        )
        print("|---|---|---|---|---|")
        for world_size in (1, 2):
            whole = {"policy_loss": fiberpo, "loss_agg_mode": "seq-mean-token-mean"}
            cases = [{**whole, "micro_batch_size": ROWS // world_size // m} for m in (1, 2, 8)]
            for m, found in zip((1, 2, 8), steps(world_size, folder, batch, cases), strict=True):
                parameters = parameters or found["parameters"]
                value = abs(found["metrics"]["actor/pg_loss"][0] + wanted.value) / abs(wanted.value)
                error = relative_error(found["gradients"], wanted.gradients)
                moved = max(float((found["parameters"][name] - parameters[name]).abs().max()) for name in parameters)
                print(f"| {world_size} | {m} | {value:.1e} | {error:.1e} | {moved:.1e} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
