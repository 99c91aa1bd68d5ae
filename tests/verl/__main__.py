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
from tests.verl.slow import expected, relative_error

ROWS = GROUPS * SAMPLES


def fsdp(folder: Path, batch: Batch) -> list[str]:
    """The last column: largest difference of any parameter from that of one rank and one micro-batch."""
    wanted = expected(folder, batch, HIERARCHY)
    first: dict[str, torch.Tensor] = {}
    lines = ["| FSDP2 | micro-batches | objective, relative error | largest gradient error | parameters after a step |"]
    lines.append("|---|---|---|---|---|")
    for world_size in (1, 2):
        whole = {
            "policy_loss": {"loss_mode": "fiberpo", "hierarchy": HIERARCHY},
            "loss_agg_mode": "seq-mean-token-mean",
        }
        cases = [{**whole, "micro_batch_size": ROWS // world_size // m} for m in (1, 2, 8)]
        for m, found in zip((1, 2, 8), steps(world_size, folder, batch, cases), strict=True):
            first = first or found["parameters"]
            value = abs(found["metrics"]["actor/pg_loss"][0] + wanted.value) / abs(wanted.value)
            error = relative_error(found["gradients"], wanted.gradients)
            moved = max(float((found["parameters"][name] - first[name]).abs().max()) for name in first)
            lines.append(f"| DP {world_size} | {m} | {value:.1e} | {error:.1e} | {moved:.1e} |")
    return lines


def megatron(batch: Batch) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        megatron_host.save_model(folder)
        wanted = run(megatron_host.reference, 1, folder, batch, HIERARCHY, timeout=240)[0]
        lines = [
            "| Megatron | micro-batches | objective, relative error | largest gradient error |",
            "|---|---|---|---|",
        ]
        for layout in megatron_host.LAYOUTS:
            error, _, metrics = megatron_host.compare(folder, wanted, HIERARCHY, layout)
            value = abs(metrics["actor/pg_loss"][0] + wanted.value) / abs(wanted.value)
            lines.append(f"| {layout} | {megatron_host.MICRO_BATCHES} | {value:.1e} | {error:.1e} |")
    return lines


def main() -> int:
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        batch = make_batch(Path(folder))
        tables = [*fsdp(Path(folder), batch), "", *megatron(batch)]
    print("\n".join(tables))  # at the end: verl prints much
    return 0


if __name__ == "__main__":
    sys.exit(main())
