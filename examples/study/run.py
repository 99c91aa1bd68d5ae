"""Make the study's missing runs.

    python examples/study/run.py                        every stage of study.yaml, one run on each core
    python examples/study/run.py first_look --cores 1   one stage, on one core
    python examples/study/run.py --objective fiberpo    only the runs of an objective; can be repeated
    python examples/study/run.py --list                 the runs, and which are done

Runs are kept in runs/study/, results in docs/study/results/, one file each. An interrupted run starts over. Several of
these commands can run at once, also from copies of the repository that share both folders.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from study_result import read_result
from study_runs import Run, read_study

from nemo_fiberpo import cores

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "study" / "results"
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Whether this process holds the lock; it ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def launch(script: str, arguments: Sequence[str], log: Path) -> int:
    """The exit status of a script of examples/ on one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    with log.open("w") as output:
        return subprocess.run(
            [*command, str(ROOT / "examples" / script), "--config-name", "quickstart", *arguments],
            cwd=ROOT,
            env=os.environ | QUIET,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        ).returncode


def warm_start(seed: int, folder: Path) -> Path:
    """The folder with the data and the starting policy of a seed, which all its runs share; made once."""
    start = folder / f"start-{seed}"
    with locked(folder / f"start-{seed}.lock", wait=True):
        if not (start / "warm_start.nemo").exists():
            start.mkdir(parents=True, exist_ok=True)
            log = start / "output.txt"
            if launch("warm_start.py", [f"seed={seed}", f"run_dir={start}"], log):
                raise RuntimeError(f"the warm start of seed {seed} failed; see {log}")
        for name, change in VARIANTS.items():
            if not (start / "data" / name).exists():
                write_variant(start / "data", name, change)
    return start


def off_by_one(record: dict[str, Any], index: int) -> None:
    """Make the answers of arithmetic too high by one."""
    if record["domain"] == "arithmetic":
        record["response"] = record["entry"]["answer"] = str(int(record["response"]) + 1)


def eighths(record: dict[str, Any], index: int) -> None:
    """Assign the prompt to one of eight parts at random."""
    record["strata"] = {"eighth": str(random.Random(index).randrange(8))}


VARIANTS = {"off_by_one.jsonl": off_by_one, "eighths.jsonl": eighths}


def write_variant(data: Path, name: str, change: Callable[[dict[str, Any], int], None]) -> None:
    """Write the training data with every record changed."""
    records = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    for index, record in enumerate(records):
        change(record, index)
    temporary = data / f"{name}.tmp"
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    temporary.replace(data / name)


def make(run: Run, folder: Path, results: Path) -> None:
    """The run and its result, unless there is one or another process is at it."""
    target = results / f"{run.name}.json"
    with locked(folder / f"{run.name}.lock", wait=False) as mine:
        if not mine or target.exists():
            return
        start = warm_start(run.seed, folder)
        run_dir = folder / run.name
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir()
        begun = time.monotonic()
        places = [f"seed={run.seed}", f"run_dir={run_dir}", f"data_dir={start}/data"]
        places += [f"pretrained_checkpoint.restore_from_path={start}/warm_start.nemo"]
        status = launch("train_gpt_fiberpo.py", [*places, *run.overrides], run_dir / "output.txt")
        result = read_result(run, run_dir, status, round(time.monotonic() - begun))
        results.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(result) + "\n")
        temporary.replace(target)
        shutil.rmtree(run_dir / "nemo", ignore_errors=True)
        print(f"{run.name}: {result['summary']} ({result['seconds']} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the study's missing runs.")
    parser.add_argument("stages", nargs="*", help="stages of study.yaml; all without any")
    parser.add_argument("--cores", type=int, default=cores.available(), help="runs at a time")
    parser.add_argument("--objective", action="append", help="only runs of this objective; can be repeated")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "study", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--list", action="store_true", help="only list the runs, and which are done")
    args = parser.parse_args()
    stages = read_study()
    unknown = set(args.stages) - set(stages)
    if unknown:
        parser.error(f"no stage is called {min(unknown)!r}; there are: {', '.join(stages)}")
    runs = {run.name: run for stage in args.stages or stages for run in stages[stage]}
    if args.objective:
        unknown = set(args.objective) - {run.objective for run in runs.values()}
        if unknown:
            parser.error(f"no run of these stages has the objective {min(unknown)!r}")
        runs = {name: run for name, run in runs.items() if run.objective in args.objective}
    if args.list:
        for name in runs:
            print(("done    " if (args.results / f"{name}.json").exists() else "missing ") + name)
        return
    with ThreadPoolExecutor(args.cores) as pool:
        for done in [pool.submit(make, run, args.runs.resolve(), args.results.resolve()) for run in runs.values()]:
            done.result()


if __name__ == "__main__":
    main()
