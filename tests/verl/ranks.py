"""What the ranks of a test do, in processes of their own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from tests.support.distributed import run
from tests.verl.host import Batch, make_worker, one_step


def steps(world_size: int, folder: Any, batch: Batch, cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A step of each case, from the saved weights: what rank 0 got, and under "others" what the other ranks did.

    A case holds the arguments of `make_worker`; `settings` for the mini-batch; `without` names a column that the last
    rank's rows lack. An error is returned under "error".
    """
    results = run(_steps, world_size, folder, batch, list(cases), timeout=240)
    return [{**first, "others": others} for first, *others in zip(*results, strict=True)]


def _steps(rank: int, world_size: int, folder: Any, batch: Batch, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    import torch

    import nemo_fiberpo.integrations.verl  # noqa: F401  before verl's worker asks for an engine

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    out = []
    for case in cases:
        arguments = dict(case)
        settings, without = arguments.pop("settings", {}), arguments.pop("without", None)
        try:
            worker = make_worker(folder, **arguments)
            out.append(
                one_step(worker, batch, rank, world_size, without if rank == world_size - 1 else None, **settings)
            )
        except (ValueError, RuntimeError) as error:
            out.append({"error": f"{type(error).__name__}: {error}"})
    return out
