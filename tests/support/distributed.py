"""Functions on several ranks over gloo, with a hard time-out: `run(function, world_size, *args)`.

Workers are forked from a server process that has imported megatron once (an import costs 5 s, a fork nothing). A rank
that fails or hangs fails the test with the traceback of every rank, and no process is left behind.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "megatron.core",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.distributed",
    "megatron.core.pipeline_parallel",
    "megatron.core.optimizer",
]
_context = None


class RanksFailed(AssertionError):
    """Says per rank how it ended."""


def context() -> Any:
    """The fork-server context, its imports done, with one thread per worker."""
    global _context
    if _context is None:
        os.environ["OMP_NUM_THREADS"] = "1"
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(PRELOAD)
        first = _context.Process(target=_nothing)
        first.start()
        first.join()
    return _context


def run(function: Callable, world_size: int, *args: Any, timeout: float = 60.0, init: bool = True) -> list[Any]:
    """`[function(rank, world_size, *args) for each rank]`, each in its own process.

    function  a module-level function; what it takes and returns is pickled
    timeout   seconds for all ranks together; then they are killed
    init      whether to initialise torch.distributed over gloo before

    Raises RanksFailed with every rank's traceback if any rank raised, died or ran out of time.
    """
    ctx = context()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = {}, []
        for rank in range(world_size):
            receiver, sender = ctx.Pipe(duplex=False)
            process = ctx.Process(
                target=_worker, args=(sender, folder, rank, world_size, timeout, init, function, args)
            )
            process.daemon = True
            process.start()
            sender.close()
            pipes[receiver] = rank
            processes.append(process)
        outcomes = _collect(pipes, time.monotonic() + timeout + 5.0)
        for process in processes:
            process.join(0 if len(outcomes) < world_size else 5)
            if process.is_alive():
                process.kill()
                process.join()
        if len(outcomes) < world_size or any(not ok for ok, _ in outcomes.values()):
            raise RanksFailed(_describe(outcomes, world_size, Path(folder), timeout))
    return [outcomes[rank][1] for rank in range(world_size)]


def _nothing() -> None:
    pass


def _collect(pipes: dict[Any, int], deadline: float) -> dict[int, tuple[bool, Any]]:
    """Outcomes by rank; stops early once a rank failed and the others had a moment to say so too."""
    outcomes: dict[int, tuple[bool, Any]] = {}
    waiting = dict(pipes)
    while waiting and time.monotonic() < deadline:
        for pipe in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
            rank = waiting.pop(pipe)
            try:
                outcomes[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                outcomes[rank] = (False, "the process died without a word\n")
            if not outcomes[rank][0]:
                deadline = min(deadline, time.monotonic() + 5.0)
    return outcomes


def _describe(outcomes: dict[int, tuple[bool, Any]], world_size: int, folder: Path, timeout: float) -> str:
    parts = []
    for rank in range(world_size):
        if rank not in outcomes:
            stack = folder / f"stack{rank}"
            where = stack.read_text() if stack.exists() else ""
            parts.append(f"--- rank {rank}: no answer (time-out {timeout:g} s, or another rank failed first)\n{where}")
        elif not outcomes[rank][0]:
            parts.append(f"--- rank {rank}: failed\n{outcomes[rank][1]}")
        else:
            parts.append(f"--- rank {rank}: finished")
    return "\n".join(["", *parts])


def join(folder: str, rank: int, world_size: int, timeout: float) -> None:
    """Initialise torch.distributed over gloo on this machine; the ranks meet in `folder`."""
    import torch.distributed as dist

    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )


def _worker(
    sender: Any, folder: str, rank: int, world_size: int, timeout: float, init: bool, function: Callable, args: tuple
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    with open(os.path.join(folder, f"stack{rank}"), "w") as stack:
        faulthandler.dump_traceback_later(timeout, file=stack, exit=False)
        try:
            if init:
                join(folder, rank, world_size, timeout)
            outcome = (True, function(rank, world_size, *args))
            if init:
                dist.barrier()
                dist.destroy_process_group()
        except BaseException:
            outcome = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        sender.send_bytes(pickle.dumps(outcome))
        sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
