"""One time-out for every collective of a job: after it a rank that others left alone raises instead of waiting.

    backend   what happens to a rank whose collective does not complete in time
    gloo      the collective raises RuntimeError
    nccl      torch's watchdog ends the process, with the name of the collective on stderr; no exception can be caught
              (TORCH_NCCL_ASYNC_ERROR_HANDLING, on by default)

A rank that dies closes its connections: over gloo its peers raise at once.
"""

from __future__ import annotations

import importlib
import warnings
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_MODULE = "torch.distributed.distributed_c10d"


def _symbol(name: str) -> Any:
    module = importlib.import_module(_MODULE)
    if not hasattr(module, name):
        raise ImportError(
            f"{_MODULE}.{name} does not exist in this version of torch; it sets the time-out of existing process groups"
        )
    return getattr(module, name)


def limit_collectives(seconds: float) -> int:
    """Give every process group that this rank belongs to the same time-out; returns how many there are.

    Works for gloo and nccl; of other backends (fake, mpi) nothing is known and nothing is changed. Gloo's sends and
    receives, those between pipeline stages, keep the time-out with which their group was made, so make groups with the
    same one: `init_process_group(timeout=)`, `initialize_model_parallel(distributed_timeout_minutes=)`. Groups made
    later are not covered.

    SPMD: local, every rank calls this. Raises ImportError that names the symbol if torch no longer has what it needs.
    """
    set_timeout, world = _symbol("_set_pg_timeout"), _symbol("_world")
    groups: list[dist.ProcessGroup] = list(world.pg_map)
    for group in groups:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Set timeout is now only supported")
            set_timeout(timedelta(seconds=seconds), group)
    return len(groups)
