"""Runs of the scripts in examples/ whose ranks are forked from one process that has NeMo imported.

`launch` and `begin` take what those of `launching` take, which type the command line; importing is most of what a short
run costs. The process that has everything imported makes no process group, no thread and no random number, and undoes
the CPU mode in every rank before its script installs it as its configuration says: a rank is what a fresh process would
be, but for Python's hash seed, which it shares with the others, for the picture of the report, which would take longer
than the run, and for the process in which Megatron collects what was written, which is forked too. It is started by the
first run of a test session and ends with it, and its runs with it, even if the session is killed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import IO, Any

from nemo_fiberpo.graders.signals import die_with_parent
from tests.support.launching import ROOT, arguments, environment, free_ports

IMPORTED = (
    "hydra",
    "nemo.utils.exp_manager",
    "nemo_aligner.algorithms.ppo",
    "nemo_aligner.utils.train_script_utils",
    "nemo_fiberpo.aligner.actor",
    "nemo_fiberpo.aligner.checkpoint.callback",
    "nemo_fiberpo.aligner.build",
    "nemo_fiberpo.aligner.loggers",
    "nemo_fiberpo.aligner.config.model_checks",
    "nemo_fiberpo.aligner.rewards.server",
    "nemo_fiberpo.aligner.checkpoint.run_record",
    "nemo_fiberpo.aligner.trainer",
    "nemo_fiberpo.analysis.report",
    "torch.utils.tensorboard",
)
WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
PATIENCE = 30  # seconds between SIGTERM and SIGKILL to the ranks that are left, as torchrun


class Run:
    """A run that was begun: `pid` of the process that waits for its ranks and leads their process group."""

    def __init__(self, answers: Connection):
        self._answers = answers
        self.pid: int = answers.recv()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit status, None while the run goes on: 1 if a rank failed, -9 if the run was killed."""
        if self.returncode is None and self._answers.poll():
            self._read()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Exit status. TimeoutError if there is none after `timeout` seconds."""
        if self.returncode is None:
            if not self._answers.poll(timeout):
                raise TimeoutError(f"the run {self.pid} goes on after {timeout} s")
            self._read()
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """SIGKILL to every process of the run."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    def _read(self) -> None:
        try:
            self.returncode = self._answers.recv()
        except EOFError:
            self.returncode = -signal.SIGKILL


def launch(script: str, run_dir: Path, *overrides: str, processes: int = 2, timeout: float = 300.0) -> str:
    """What the run wrote. AssertionError with its end if it failed, TimeoutError with it after `timeout` seconds."""
    with tempfile.TemporaryFile() as output:
        run = begin(script, run_dir, *overrides, processes=processes, output=output)
        late = None
        try:
            run.wait(timeout)
        except TimeoutError as error:
            late = error
        finally:
            run.kill()
        said = _written(output)
    if late is not None:
        raise TimeoutError(f"{late}; it wrote:\n{said[-8000:]}")
    assert run.returncode == 0, said[-8000:]
    return said


def begin(script: str, run_dir: Path, *overrides: str, output: IO[Any], processes: int = 2) -> Run:
    """The script on that many ranks, in a process group of its own; what they write goes to `output`. RuntimeError if
    the process that would fork them has ended, as where an import fails."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    request = {"script": str(ROOT / "examples" / script), "arguments": arguments(run_dir, *overrides)}
    message = json.dumps(request | {"processes": processes}).encode()
    server = _server()
    try:
        with sender:
            socket.send_fds(server.control, [message], [sender.fileno(), output.fileno()])
        return Run(receiver)
    except (EOFError, OSError) as error:
        raise RuntimeError(server.end()) from error


def _written(output: IO[bytes]) -> str:
    """Of processes that have ended: they share the file's position."""
    output.seek(0)
    return output.read().decode(errors="replace")


@dataclass
class _Server:
    """The process that has everything imported. It ends when this end of `control` is closed, with this process at the
    latest."""

    control: socket.socket
    process: subprocess.Popen
    output: IO[bytes]

    def end(self) -> str:
        """How it ended, in words."""
        try:
            status = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "the process that leads the run ended before it could say its process id"
        said = _written(self.output)[-8000:]
        return f"the process that forks the ranks ended with exit status {status}; it wrote:\n{said}"


COMMAND = [sys.executable, "-u", "-m", "tests.support.forked"]
_running: _Server | None = None


def _server() -> _Server:
    """The one of this process, started at first and wherever the one before has ended."""
    global _running
    if _running is None or _running.process.poll() is not None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        output = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        with theirs:
            process = subprocess.Popen(
                COMMAND, cwd=ROOT, env=environment(), stdin=theirs, stdout=output, stderr=subprocess.STDOUT
            )
        _running = _Server(ours, process, output)
    return _running


def import_everything() -> None:
    """What a run imports, in the CPU mode, without which NeMo-Aligner cannot be imported here."""
    from nemo_fiberpo import nemo_cpu

    nemo_cpu.install()
    for name in IMPORTED:
        importlib.import_module(name)
    sys.modules["nemo_fiberpo.analysis.report"].plot_report = lambda *_, **__: None  # type: ignore[attr-defined]
    gc.collect()
    gc.freeze()


def run_as_rank(script: str, arguments: list[str], rank: int, processes: int, port: int) -> None:
    """The script in this forked process, as torchrun would start it on one machine."""
    from nemo_fiberpo import nemo_cpu

    sizes = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "ROLE_WORLD_SIZE": processes, "GROUP_RANK": 0}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in (sizes | ranks | {"TORCHELASTIC_RUN_ID": "forked"}).items()}
    nemo_cpu.uninstall()
    if writer := sys.modules.get(WRITER):
        manager = SyncManager(ctx=multiprocessing.get_context("fork"))
        manager.start(die_with_parent, (os.getpid(),))  # early, since it keeps open whatever the rank has open now
        writer._results_queue = manager.Queue()  # type: ignore[attr-defined]
    sys.path[0] = str(Path(script).parent)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def serve(control: socket.socket) -> None:
    """A process per request, which forks the ranks and waits for them; returns in those, to end as any other process,
    and at the end of the requests."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes of requests
    server = os.getpid()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 2)
        if not message:
            return
        if os.fork() == 0:
            die_with_parent(server)
            control.close()
            lead(Connection(descriptors[0], readable=False), descriptors[1], **json.loads(message))
            return
        for descriptor in descriptors:
            os.close(descriptor)


def lead(answers: Connection, output: int, script: str, arguments: list[str], processes: int) -> None:
    """Fork the ranks, say this process id and in the end the exit status."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.open(os.devnull, os.O_RDONLY)  # in place of the socket of requests, which was standard input
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    answers.send(os.getpid())
    ranks, port, leader = {}, free_ports(1)[0], os.getpid()
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            die_with_parent(leader)
            answers.close()
            run_as_rank(script, arguments, rank, processes, port)
            return
        ranks[pid] = rank
    answers.send(wait_for(ranks))
    os._exit(0)  # without the time that taking down the interpreter takes


def wait_for(ranks: dict[int, int]) -> int:
    """Exit status of a run with these ranks by process id: the first that fails ends the others, as under torchrun."""

    def end(number: int) -> None:
        for pid in ranks:
            os.kill(pid, number)

    status = 0
    signal.signal(signal.SIGALRM, lambda *_: end(signal.SIGKILL))
    while ranks:
        pid, code = os.wait()
        rank, code = ranks.pop(pid), os.waitstatus_to_exitcode(code)
        if code and not status:
            status = 1
            print(f"rank {rank} (pid {pid}) failed first, with exit status {code}", flush=True)
            end(signal.SIGTERM)
            signal.alarm(PATIENCE)
    return status


if __name__ == "__main__":
    import_everything()
    serve(socket.socket(fileno=0))
