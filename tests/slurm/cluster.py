"""A SLURM cluster of this machine alone: munged, slurmctld and one slurmd per node, on loopback.

Everything is under one folder: configuration, key, sockets, spool, state, logs. Nothing of a system's own SLURM is read
or written; `SLURM_CONF` says which cluster a command means.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
from pathlib import Path

from tests.support.launching import free_ports, wait_for
from tests.support.processes import kill, processes, variables_of, with_descendants

NODE_DEAD_AFTER = 10  # SlurmdTimeout, seconds; a site's is 300 by default
REQUEUE_DELAY = 5  # cred_expire, seconds that a requeued job waits at least; a site's is 120 by default

CONFIG = """\
ClusterName=fiberpo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_delay}
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=500000,bf_interval=2,defer_batch
SlurmdTimeout={dead_after}
SlurmdParameters=config_overrides
MessageTimeout=10
TCPTimeout=2
KillWait=30
CompleteWait=0
MinJobAge=900
ReturnToService=2
JobRequeue=1
MaxArraySize=100
PlugStackConfig={folder}/plugstack.conf
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN\n"


UNANSWERED = re.compile(
    "Unable to contact slurm controller|Socket timed out|Zero Bytes were transmitted|Connection refused"
)


class SlurmError(RuntimeError):
    """A SLURM command failed; the message is what it said."""


class Cluster:
    """`with Cluster(folder, nodes) as cluster:` is a running cluster; at the end no process of it is left."""

    def __init__(self, folder: Path, nodes: tuple[str, ...]):
        self.folder, self.nodes = folder, nodes
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            # --force: the folder is ours alone, where munged wants everyone to reach the socket
            munge = ["munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key"]
            munge += [f"--{name}-file={self.folder}/munged.{name}" for name in ("pid", "seed", "log")]
            self._start("munged", [*munge, f"--socket={self.folder}/munge.socket"])
            wait_for((self.folder / "munge.socket").exists, 20, "munged's socket")
            self._start("slurmctld", ["slurmctld", "-D", "-c"])
            for node in self.nodes:
                self.start_node(node)
            wait_for(lambda: set(self.states().values()) == {"IDLE"}, 60, "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self.daemons:
            with contextlib.suppress(SlurmError, subprocess.TimeoutExpired):
                self.command("scancel", "--user=root", "--signal=KILL", "--full")
        kill(self.own_processes() | set(self.job_processes()))
        for daemon in self.daemons.values():
            daemon.wait()

    def _configure(self) -> None:
        self.folder.mkdir(parents=True, mode=0o755)
        for name in ("state", *(f"spool.{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.folder / "plugstack.conf").touch()
        controller_port, *ports = free_ports(1 + len(self.nodes))
        host = socket.gethostname()
        text = CONFIG.format(
            folder=self.folder,
            host=host,
            controller_port=controller_port,
            requeue_delay=REQUEUE_DELAY,
            dead_after=NODE_DEAD_AFTER,
        )
        nodes = [NODE.format(name=name, host=host, port=port) for name, port in zip(self.nodes, ports, strict=True)]
        (self.folder / "slurm.conf").write_text(text.replace("PartitionName", "".join(nodes) + "PartitionName"))

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.output").open("a") as output:
            self.daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        with (self.folder / "pids").open("a") as pids:  # for tests/slurm/run.sh, if the tests themselves are killed
            pids.write(f"{self.daemons[name].pid}\n")

    def start_node(self, node: str) -> None:
        """On one core, as if it were a machine of its own: otherwise its ranks would start a thread for every core."""
        ours = sorted(os.sched_getaffinity(0))
        core = ours[self.nodes.index(node) % len(ours)]
        self._start(f"slurmd.{node}", ["taskset", "--cpu-list", str(core), "slurmd", "-D", "-N", node])

    def kill_daemon(self, node: str) -> None:
        """SIGKILL to the node's slurmd alone: what it started goes on, and no task can be started any more."""
        kill({self.daemons[f"slurmd.{node}"].pid})
        self.daemons.pop(f"slurmd.{node}").wait()

    def kill_node(self, node: str) -> int:
        """A node's death: its slurmd, the step daemons it started and all that these run, by SIGKILL. How many."""
        victims = with_descendants({self.daemons[f"slurmd.{node}"].pid, *self._step_daemons(node)})
        kill(victims)
        self.kill_daemon(node)
        return len(victims)

    def _step_daemons(self, node: str) -> set[int]:
        """slurmstepd detaches from slurmd; its socket in the node's spool says whose it is."""
        sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
        ours = {f"socket:[{one[6]}]" for one in sockets if one[-1].startswith(f"{self.folder}/spool.{node}/")}
        found = set()
        for pid, (_, command) in processes().items():
            with contextlib.suppress(OSError):
                if command.startswith("slurmstepd") and any(
                    os.readlink(one) in ours for one in Path(f"/proc/{pid}/fd").iterdir()
                ):
                    found.add(pid)
        return found

    def own_processes(self) -> set[int]:
        """The daemons, the step daemons of all nodes, and all that descends from them."""
        roots = {daemon.pid for daemon in self.daemons.values()}
        for node in self.nodes:
            roots |= self._step_daemons(node)
        return with_descendants(roots)

    def job_processes(self) -> dict[int, str]:
        """Command lines of all processes that were started in a job of this cluster, by what is in their environment,
        which a process whose parents have ended still has."""
        found = {}
        for pid, (_, command) in processes().items():
            variables = variables_of(pid)
            if variables.get("SLURM_CONF") == self.environment["SLURM_CONF"] and "SLURM_JOB_ID" in variables:
                found[pid] = command
        return found

    def command(
        self, *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 60
    ) -> str:
        """A SLURM command on this cluster; what it printed. SlurmError if it failed. One that slurmctld was too busy to
        answer is tried again."""
        for attempt in range(5):
            done = subprocess.run(
                arguments,
                env=self.environment | (env or {}),
                cwd=cwd,
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout,
            )
            if not done.returncode:
                return done.stdout
            if not UNANSWERED.search(done.stdout):
                break
            time.sleep(attempt)
        raise SlurmError(f"{' '.join(arguments)}: {done.stdout.strip()}")

    def clear(self) -> None:
        """End every job and wait until the nodes are idle, so that a failed test does not block the next one."""
        with contextlib.suppress(SlurmError):
            self.command("scancel", "--user=root")
        try:
            wait_for(lambda: set(self.states().values()) == {"IDLE"}, 90, "idle nodes")
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.condition()}") from None

    def condition(self) -> str:
        """Nodes, jobs, their processes and the end of slurmctld's log, for the report of a failure."""
        said = []
        for command in ("sinfo --long --Node", "sinfo --list-reasons", "squeue --all --long", "scontrol show job"):
            try:
                said.append(f"$ {command}\n{self.command(*command.split())}")
            except (SlurmError, subprocess.TimeoutExpired) as error:
                said.append(f"$ {error}")
        said.append("processes of jobs: " + "\n".join(f"{pid} {name}" for pid, name in self.job_processes().items()))
        logs = ((log.name, log.read_text(errors="replace")) for log in sorted(self.folder.glob("slurm*.log")))
        said += [f"{name}:\n" + "\n".join(text.splitlines()[-40:]) for name, text in logs]
        return "\n".join(said)

    def states(self) -> dict[str, str]:
        """State of each node as sinfo prints it, such as IDLE, ALLOCATED, DOWN*."""
        try:
            lines = self.command("sinfo", "--noheader", "--Node", "--format=%N %T").split("\n")
        except SlurmError:
            return {}
        return {line.split()[0]: line.split()[1].upper() for line in lines if line}

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`, by name."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", "--oneliner", job)))

    def wait_for_state(self, job: str, states: set[str], seconds: float) -> dict[str, str]:
        """The job's fields once its state is one of these; TimeoutError names the one it is in."""
        fields = self.job(job)

        def reached() -> bool:
            nonlocal fields
            fields = self.job(job)
            return fields["JobState"] in states

        try:
            wait_for(reached, seconds, "")
        except TimeoutError:
            state = f"{fields['JobState']} ({fields['Reason']})"
            raise TimeoutError(f"job {job} is {state}, not {states}, after {seconds:.0f} s") from None
        return fields
