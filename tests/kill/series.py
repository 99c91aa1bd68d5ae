"""One run after another: begun, killed, begun again, and in the end compared with one that ran through."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_fiberpo.aligner.lifecycle.preemption import NOT_FINISHED
from tests.kill.warm import begin, checksum_prompts
from tests.support import forked
from tests.support.launching import DENSE, WARM_START, launch, metrics

PROMPTS = 64
LONGEST = 600.0  # seconds that one run may take


@dataclass
class Setup:
    directory: Path
    overrides: list[str]
    start: Path
    expected: tuple[list[dict], list[dict]]
    seconds: float  # of the uninterrupted run


@dataclass
class Counts:
    kills: int = 0
    kills_while_saving: int = 0
    kills_before_the_first_whole_checkpoint: int = 0
    stops_by_sigusr1: int = 0
    runs_that_could_not_resume: int = 0
    resumptions_checked: int = 0
    resumed_from_another_than_the_newest_whole_checkpoint: int = 0
    rl_steps_lost: int = 0
    rl_steps_lost_at_most: int = 0
    rl_steps_lost_by_sigusr1: int = 0
    prompts_repeated: int = 0
    prompts_skipped: int = 0
    runs_to_the_end: int = 0
    runs_with_other_metrics: int = 0
    seconds: float = 0.0
    begun: float = field(default_factory=time.monotonic, repr=False)

    def summary(self) -> dict[str, Any]:
        self.seconds = round(time.monotonic() - self.begun, 1)
        return {name: value for name, value in asdict(self).items() if name != "begun"}

    @property
    def failed(self) -> bool:
        wrong = (
            self.runs_that_could_not_resume,
            self.resumed_from_another_than_the_newest_whole_checkpoint,
            self.rl_steps_lost_by_sigusr1,
            self.prompts_repeated,
            self.prompts_skipped,
            self.runs_with_other_metrics,
        )
        return any(wrong)


def prepare(directory: Path, steps: int, overrides: list[str]) -> Setup:
    """A starting policy, everything imported, and a run that nobody kills."""
    start = directory / "start"
    if not (start / "warm_start.nemo").exists():
        shutil.rmtree(start, ignore_errors=True)
        start.mkdir()
        launch("warm_start.py", start, *WARM_START, *DENSE, processes=1)
        checksum_prompts(start / "data" / "train.jsonl", PROMPTS)
    overrides = [*overrides, f"algorithm.rl_steps={steps}", "algorithm.save_interval=1"]
    forked.import_everything()
    setup = Setup(directory, overrides, start, ([], []), 0.0)
    run_dir, begun = fresh_run(setup, "uninterrupted"), time.monotonic()
    pid = begin(run_dir, overrides, run_dir / "output")
    status = os.waitpid(pid, 0)[1]
    end_group(pid)
    if status != 0:
        raise RuntimeError((run_dir / "output").read_text()[-8000:])
    setup.expected, setup.seconds = (metrics(run_dir), prompts(run_dir)), time.monotonic() - begun
    return setup


def fresh_run(setup: Setup, name: str) -> Path:
    run_dir = setup.directory / name
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir()
    shutil.copytree(setup.start / "data", run_dir / "data")
    shutil.copy(setup.start / "warm_start.nemo", run_dir / "warm_start.nemo")
    return run_dir


def prompts(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "prompts.jsonl").read_text().splitlines()]


def newest_whole(run_dir: Path) -> tuple[str, int] | None:
    """Name and RL step of the newest checkpoint of which every file has the digest of its manifest. Says it without the
    code under test."""
    found = []
    for path in (run_dir / "nemo" / "checkpoints").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        digests = {
            name: hashlib.sha256((path.parent / name).read_bytes()).hexdigest() if (path.parent / name).exists() else ""
            for name in manifest["files"]
        }
        if all(digests[name] == entry["sha256"] for name, entry in manifest["files"].items()):
            found.append((manifest["state"]["step"], not path.parent.name.endswith("-last"), path.parent.name))
    return (max(found)[2], max(found)[0]) if found else None


def markers(run_dir: Path) -> list[Path]:
    return list((run_dir / "nemo" / "checkpoints").glob("*-unfinished"))


def steps_done(run_dir: Path) -> int:
    """RL steps whose metrics are complete; the times of a step are written last."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum("timers/train_time" in line for line in lines)


def end_group(pid: int) -> None:
    """What a run leaves behind when it does not end like a process: the one that Megatron saves with."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def running(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def wait_for_the_moment(setup: Setup, run_dir: Path, pid: int, rng: random.Random, in_save: float) -> None:
    """Return at the moment of the kill, or when the run has ended: somewhere between the beginning and the end of a
    save; or anywhere after its start or after it began to train."""

    def until(happened, seconds: float) -> None:
        limit = time.monotonic() + seconds
        while running(pid) and not happened() and time.monotonic() < limit:
            time.sleep(0.001)

    if rng.random() < in_save:
        for _ in range(rng.choice((1, 1, 2, 3))):
            until(lambda: not markers(run_dir), LONGEST)
            until(lambda: bool(markers(run_dir)), LONGEST)
        until(lambda: False, rng.uniform(0.0, 0.3))
        return
    if rng.random() < 0.6:
        before = steps_done(run_dir)
        until(lambda: steps_done(run_dir) > before, LONGEST)
    until(lambda: False, rng.uniform(0.0, min(8.0, setup.seconds)))


@dataclass(frozen=True)
class Plan:
    """kills in all; the share of them that wait for a save; and the share of SIGUSR1 among them and further signals"""

    kills: int
    in_save: float
    sigusr1: float


def kill_until_done(setup: Setup, counts: Counts, rng: random.Random, plan: Plan) -> None:
    """A run, killed and begun again until it ends by itself; not killed any more once there were enough in all."""
    run_dir = fresh_run(setup, f"run{counts.runs_to_the_end}")
    output = run_dir / "output"
    while True:
        expected, behind = newest_whole(run_dir), lost(run_dir)
        output.write_text("")
        pid = begin(run_dir, setup.overrides, output)
        if counts.kills < plan.kills:
            sent = signal.SIGUSR1 if rng.random() < plan.sigusr1 else signal.SIGKILL
            wait_for_the_moment(setup, run_dir, pid, rng, plan.in_save)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        end_group(pid)
        check_resumption(output.read_text(), expected, status, counts)
        if status == 0:
            break
        if status == -signal.SIGKILL:
            count_kill(run_dir, counts)
        elif status == NOT_FINISHED and f"stopped by {signal.SIGUSR1.name}" in output.read_text():
            counts.stops_by_sigusr1 += 1
            # What a kill before this start lost is in metrics.jsonl until training begins.
            before_training = "before training: nothing to save" in output.read_text()
            counts.rl_steps_lost_by_sigusr1 += lost(run_dir) - (behind if before_training else 0)
        else:
            counts.runs_that_could_not_resume += 1
            print(f"{run_dir}: status {status}\n{output.read_text()[-6000:]}", flush=True)
            return
    counts.runs_to_the_end += 1
    compare(setup, run_dir, counts)
    shutil.rmtree(run_dir)


def check_resumption(said: str, expected: tuple[str, int] | None, status: int, counts: Counts) -> None:
    """A run says once where it begins, and that is the newest whole checkpoint; its first RL step is the next one. Only
    a run that a signal ended before it trained, by SIGKILL even before it chose, may say less."""
    lines = [line for line in said.splitlines() if line.startswith(("resuming from ", "starting at "))]
    steps = [int(number) for number in re.findall(r"^step +(\d+)/", said, re.MULTILINE)]
    step = 0 if expected is None else expected[1]
    wanted = "starting at RL step 0" if expected is None else f"resuming from {expected[0]}: RL step {step}"
    killed_before = not lines and not steps and status == -signal.SIGKILL
    wrong = [] if lines == [wanted] or killed_before else [f"said {lines}, should be {wanted!r}"]
    if steps and steps != list(range(step + 1, step + 1 + len(steps))):
        wrong.append(f"made the RL steps {steps}, should begin with {step + 1}")
    counts.resumptions_checked += bool(lines) and expected is not None
    counts.resumed_from_another_than_the_newest_whole_checkpoint += bool(wrong)
    for line in wrong:
        print(line, flush=True)


def count_kill(run_dir: Path, counts: Counts) -> None:
    counts.kills += 1
    counts.kills_while_saving += bool(markers(run_dir))
    whole = newest_whole(run_dir)
    counts.kills_before_the_first_whole_checkpoint += whole is None
    counts.rl_steps_lost += lost(run_dir)
    counts.rl_steps_lost_at_most = max(counts.rl_steps_lost_at_most, lost(run_dir))


def lost(run_dir: Path) -> int:
    """RL steps that were done and will be done again."""
    whole = newest_whole(run_dir)
    return max(0, steps_done(run_dir) - (whole[1] if whole else 0))


def compare(setup: Setup, run_dir: Path, counts: Counts) -> None:
    expected_metrics, expected_prompts = setup.expected
    used = [line for row in prompts(run_dir) for line in row["lines"]]
    wanted = [line for row in expected_prompts for line in row["lines"]]
    counts.prompts_repeated += sum(max(0, used.count(line) - wanted.count(line)) for line in set(used))
    counts.prompts_skipped += sum(max(0, wanted.count(line) - used.count(line)) for line in set(wanted))
    same = metrics(run_dir) == expected_metrics and prompts(run_dir) == expected_prompts
    counts.runs_with_other_metrics += not same
