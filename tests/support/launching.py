"""Starting the scripts in examples/ as a user does, small, and reading what a run leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.support.processes import started

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "seed=3",
    "data.heldout=null",
    "algorithm.prompts_per_rollout=8",
    "algorithm.samples_per_prompt=4",
    "algorithm.optimizer_steps=2",
    "model.micro_batch_size=4",
    "model.ppo.rollout_micro_batch_size=8",
    "model.hidden_size=32",
    "model.ffn_hidden_size=32",
    "model.moe_ffn_hidden_size=32",
]


def environment() -> dict[str, str]:
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    return os.environ | quiet | {"PYTHONPATH": str(ROOT)}


def command(script: str, run_dir: Path, *overrides: str, processes: int = 2) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / "examples" / script), *arguments(run_dir, *overrides)]


def free_ports(count: int) -> list[int]:
    """TCP ports of loopback that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(condition: Callable[[], object], seconds: float, what: str, every: float = 0.2) -> float:
    """Until the condition holds; seconds it took. TimeoutError says what did not happen."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > seconds:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(every)
    return time.monotonic() - begun


CHECK = """
import contextlib, io, runpy, sys
script, *commands = sys.argv[1:]
for command in commands:
    sys.argv = [script, "--check", *command.split("\\n")]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what was checked
            runpy.run_path(script, run_name="__main__")
        print("fine")
    except SystemExit as leaving:
        print(leaving.code)
"""


def check_each(commands: Sequence[Sequence[str]]) -> tuple[list[str], str]:
    """`--check` of the training script with each of these arguments, in one process: "fine" or the error for each, and
    standard error."""
    script = str(ROOT / "examples" / "train_gpt_fiberpo.py")
    given = [sys.executable, "-c", CHECK, script, *("\n".join(command) for command in commands)]
    done = subprocess.run(given, env=environment(), text=True, capture_output=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line == "fine" or line.startswith("error: ")]
    assert len(lines) == len(commands), done.stdout + done.stderr
    return lines, done.stderr


def arguments(run_dir: Path, *overrides: str) -> list[str]:
    return ["--config-name", "quickstart", f"run_dir={run_dir}", *SMALL, *overrides]


def launch(script: str, run_dir: Path, *overrides: str, processes: int = 2) -> str:
    with started(
        command(script, run_dir, *overrides, processes=processes),
        environment(),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as launcher:
        said, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, said[-8000:]
    return said


def begin(run_dir: Path, *overrides: str, output: Any) -> AbstractContextManager[subprocess.Popen]:
    """The training script on two ranks, of which nothing is left at the end of the context."""
    training = command("train_gpt_fiberpo.py", run_dir, *overrides)
    return started(training, environment(), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)


def wait_for_rl_step(process: Any, run_dir: Path, rl_step: int, seconds: float, said: Path | None = None) -> None:
    """Until the run has begun to write the metrics of that step, counted from 0. A run that ends before is an error
    with the end of what it wrote to `said`."""
    until = time.monotonic() + seconds
    while all(row["rl_step"] != rl_step for row in steps_so_far(run_dir)):
        assert process.poll() is None, "the run ended before" if said is None else said.read_text()[-8000:]
        assert time.monotonic() < until, f"no RL step {rl_step}"
        time.sleep(0.02)


WARM_START = ["warm_start.steps=2", "warm_start.batch_size=8", "warm_start.check_every=100"]
DENSE = ["model.num_moe_experts=null"]
TWO_EPOCHS = [
    "algorithm.rl_steps=4",
    "algorithm.save_interval=2",
    "algorithm.epochs=2",
    "algorithm.kl.coefficient=0.01",
    "algorithm.gating.use_min=false",  # as in the run that records/run.json is of
]


def fresh(start: Path, tmp_path: Path, name: str) -> Path:
    run_dir = tmp_path / name
    run_dir.mkdir()
    shutil.copytree(start / "data", run_dir / "data")
    shutil.copy(start / "warm_start.nemo", run_dir / "warm_start.nemo")
    return run_dir


def metrics(run_dir: Path) -> list[dict]:
    """Rows of the metrics file without those about time."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if not any(name.startswith("timers/") for name in row)]


def optimizer_steps(run_dir: Path) -> list[dict]:
    return [row for row in metrics(run_dir) if "train_optim/grad_norm" in row]


def steps_so_far(run_dir: Path) -> list[dict]:
    """Of a run that goes on, whose metrics file may not exist yet or may end with half a line."""
    path = run_dir / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [row for row in map(json.loads, whole.splitlines()) if "train_optim/grad_norm" in row]
