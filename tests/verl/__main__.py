"""Prints the tables of docs/verl.md: `.venv-verl/bin/python -m tests.verl`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from tests.support.distributed import run
from tests.verl import megatron_host
from tests.verl.conftest import prepare
from tests.verl.host import GROUPS, HIERARCHY, SAMPLES, Batch, make_batch, save_model
from tests.verl.ranks import steps
from tests.verl.slow import expected, largest_difference, relative_error

ROWS = GROUPS * SAMPLES
STEP = {
    "micro_batch_size": 4,
    "policy_loss": {"loss_mode": "fiberpo", "hierarchy": HIERARCHY},
    "loss_agg_mode": "seq-mean-token-mean",
}


def fsdp(folder: Path, batch: Batch) -> list[str]:
    """The last column: largest difference of any parameter from that of one rank and one micro-batch."""
    wanted = expected(folder, batch, HIERARCHY)
    first: dict[str, torch.Tensor] = {}
    lines = ["| FSDP2 | micro-batches | objective, relative error | largest gradient error | parameters after a step |"]
    lines.append("|---|---|---|---|---|")
    for world_size in (1, 2):
        cases = [{**STEP, "micro_batch_size": ROWS // world_size // m} for m in (1, 2, 8)]
        for m, found in zip((1, 2, 8), steps(world_size, folder, batch, cases), strict=True):
            first = first or found["parameters"]
            value = abs(found["metrics"]["actor/pg_loss"][0] + wanted.value) / abs(wanted.value)
            error = relative_error(found["gradients"], wanted.gradients)
            moved = largest_difference(found["parameters"], first)
            lines.append(f"| DP {world_size} | {m} | {value:.1e} | {error:.1e} | {moved:.1e} |")
    return lines


def megatron(batch: Batch) -> list[str]:
    """The last column: largest difference of any parameter from that of the reference after its step."""
    lines = [
        "| Megatron | layout | objective, relative error | largest gradient error | parameters after a step |",
        "|---|---|---|---|---|",
    ]
    for model, layouts in megatron_host.LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            megatron_host.save_model(folder, model)
            wanted = run(megatron_host.reference, 1, folder, batch, HIERARCHY, timeout=240)[0]
            for layout in layouts:
                found = megatron_host.compare(folder, wanted, HIERARCHY, model, layout)
                value = abs(found.metrics["actor/pg_loss"][0] + wanted.value) / abs(wanted.value)
                lines.append(f"| {model} | {layout} | {value:.1e} | {found.gradient:.1e} | {found.parameter:.1e} |")
    return lines


def ray_group(folder: Path, batch: Batch) -> list[str]:
    """Two actors of Ray; parameters are compared with those of one process."""
    from tests.verl.ray_group import ray_on_this_machine, step_of_group

    wanted = expected(folder, batch, HIERARCHY)
    alone = steps(1, folder, batch, [STEP])[0]["parameters"]
    with ray_on_this_machine(cpus=2):
        found = step_of_group(2, folder, batch, **STEP)
    value = abs(found["metrics"]["actor/pg_loss"][0] + wanted.value) / abs(wanted.value)
    error = max(relative_error(worker["gradients"], wanted.gradients) for worker in found["workers"])
    moved = max(largest_difference(worker["parameters"], alone) for worker in found["workers"])
    return [f"| DP 2, in a `RayWorkerGroup` | 2 | {value:.1e} | {error:.1e} | {moved:.1e} |"]


def main() -> int:
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        batch = make_batch(Path(folder))
        tables = [*fsdp(Path(folder), batch), *ray_group(Path(folder), batch), "", *megatron(batch)]
    print("\n".join(tables))  # at the end: verl prints much
    return 0


if __name__ == "__main__":
    sys.exit(main())
