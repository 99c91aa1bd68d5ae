"""The ranks of a run on one machine: how many, started, watched and ended together.

torchrun prints a report of its own below an error, and 30 seconds after Ctrl-C it kills ranks that are saving.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_fiberpo import cores
from nemo_fiberpo.aligner.config.checks import batch_sizes, on_cpu
from nemo_fiberpo.aligner.lifecycle.first_rank import SECRET
from nemo_fiberpo.aligner.lifecycle.preemption import CTRL_C, LAUNCHED, NOT_FINISHED
from nemo_fiberpo.plan.layout import Layout

# Seconds that the other ranks have to end by themselves after one has failed; they may report the same error.
GRACE = 20.0
_MAY_END = (0, NOT_FINISHED)
_BY_CTRL_C = 128 + signal.SIGINT


def is_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a rank: started by torchrun, this module, or a script that sets the same variables."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def ranks_for(cfg: DictConfig) -> int:
    """The number of ranks on this machine: `trainer.devices` if it is a number, else all GPUs, else as many as the
    cores, the layout and the batch sizes allow, at least one copy of the model.

    Raises ValueError naming the field if this machine cannot run it.
    """
    if cfg.trainer.get("num_nodes", 1) != 1:
        raise ValueError(
            f"trainer.num_nodes: {cfg.trainer.num_nodes}: `fiberpo train` starts the ranks of one machine; for several "
            "see examples/slurm/train.sbatch and docs/cluster.md"
        )
    gpus = torch.cuda.device_count()
    if not on_cpu(cfg) and gpus == 0:
        raise ValueError("trainer.accelerator: gpu, but this machine has none; set it to cpu, and cpu to true")
    if not OmegaConf.is_interpolation(cfg.trainer, "devices"):
        return int(cfg.trainer.devices)
    if not on_cpu(cfg):
        return gpus
    model: Any = OmegaConf.to_container(cfg.model, resolve=True)
    layout = Layout.from_config(model, {})
    copy = layout.tp * layout.pp * layout.cp
    for replicas in range(max(1, cores.available() // copy), 1, -1):
        layout = Layout.from_config(model, {"devices": replicas * copy})
        if layout.whole and not list(batch_sizes(cfg).problems(layout.dp, layout.cp)):
            return layout.world
    return copy


def adopt_srun(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """torch.distributed's variables from those of an srun task; {} unless it is one of several.

    MASTER_ADDR and MASTER_PORT are kept if set. Raises ValueError if the first node's name is unknown.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or 1)
    if "SLURM_PROCID" not in environment or tasks == 1:
        return {}
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or 1)
    address = environment.get("MASTER_ADDR")
    if address is None:
        names = _scontrol("hostnames", environment["SLURM_STEP_NODELIST"]).split()
        if not names:
            raise ValueError("MASTER_ADDR: scontrol does not name the first node; set it before srun")
        # The name of a node need not be one that resolves.
        known = re.search(r" NodeAddr=(\S+)", _scontrol("node", "--oneliner", names[0]))
        address = known[1] if known else names[0]
    port = 20000 + (int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])) % 20000
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "MASTER_ADDR": address,
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def _scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", "show", *arguments], capture_output=True, text=True).stdout


def run_ranks(command: Sequence[str], number: int) -> int:
    """Run a command as `number` ranks. Returns the exit status of the first that failed, else `NOT_FINISHED` if one is
    unfinished, else 0.

    Ctrl-C asks the ranks to save and stop, a second one ends them at once. SIGTERM and SIGUSR1 are forwarded. Ranks are
    ended GRACE seconds after one has failed, and by the kernel if this process is killed.
    """
    folder = tempfile.TemporaryDirectory(prefix="fiberpo-")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        SECRET: os.environ.get(SECRET) or secrets.token_hex(32),
        LAUNCHED: folder.name,
    }
    ranks: list[subprocess.Popen[bytes]] = []
    watch = _Signals(ranks)
    try:
        for place in map(str, range(number)):
            own = {"RANK": place, "LOCAL_RANK": place}
            # In their own session, so that only this process gets Ctrl-C.
            ranks.append(subprocess.Popen(command, env=os.environ | shared | own, start_new_session=True))
        status = _wait(ranks)
        return _BY_CTRL_C if watch.at_once else status
    finally:
        watch.end()
        for rank in ranks:
            _kill(rank)
            rank.wait()
        folder.cleanup()


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    failed: int | None = None
    until = float("inf")
    while True:
        statuses = [rank.poll() for rank in ranks]  # poll all: a rank may wait for one that has failed
        if failed is None:
            failed = next((status for status in statuses if status not in (None, *_MAY_END)), None)
            if failed is not None:
                until = time.monotonic() + GRACE
        ended = [status for status in statuses if status is not None]
        if len(ended) == len(ranks) or time.monotonic() >= until:
            break
        time.sleep(0.05)
    if failed is None:
        return max(ended)
    return failed if failed >= 0 else 128 - failed


def _kill(rank: subprocess.Popen[bytes]) -> None:
    """With its child processes: a rank leads its process group."""
    with suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)


class _Signals:
    """Signal handling while the ranks run."""

    def __init__(self, ranks: Sequence[subprocess.Popen[bytes]]):
        self._ranks, self._interrupted = ranks, False
        self.at_once = False  # after a second Ctrl-C
        self._before = {
            number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        }

    def _pass_on(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT:
            self.at_once, self._interrupted = self._interrupted, True
            if not self.at_once:
                print(f"\n{CTRL_C}", file=sys.stderr, flush=True)
        for rank in self._ranks:
            if self.at_once:
                _kill(rank)
            elif rank.poll() is None:
                rank.send_signal(number)

    def end(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
