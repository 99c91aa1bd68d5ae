"""What the study keeps of a run: all that its tables and pictures are made from, and what the run was made on."""

from __future__ import annotations

import platform
import re
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from study_runs import Run

from nemo_fiberpo.analysis.runs import json_lines

ROOT = Path(__file__).resolve().parents[2]
# Metrics of an optimizer step, and how an RL step's value follows from those of its optimizer steps.
CURVES = {
    r"train_rollouts/(rewards|entropy|reward/.+)": "mean",
    r"train_optim/(grad_norm|gates/token/clipped|gates/log_ratio/(kl|tv))": "mean",
    r"train_optim/gates/[^/.]+/(pos|neg)/pass_through": "mean",
    r"train_optim/gates/[^/.]+/(pos|neg)/(drift_max|budget_used_max)": "max",
}


def read_result(run: Run, run_dir: Path, status: int, seconds: int) -> dict[str, Any]:
    """The result of a run that has ended with `status` after `seconds`, as JSON.

    heldout   before and after: domain -> one digit a prompt, in their order: 1 right, 0 wrong, - not graded
    curves    metric -> a value per RL step, null where there is none
    """
    heldout = {moment: answers(run_dir / f"heldout_{moment}.jsonl") for moment in ("before", "after")}
    why = None if status == 0 else last_error((run_dir / "output.txt").read_text(errors="replace"))
    means = {moment: mean(digits) for moment, digits in heldout.items()}
    told = " to ".join("-" if value is None else f"{value:.3f}" for value in means.values())
    return {
        "name": run.name,
        "setting": run.setting,
        "objective": run.objective,
        "lr": run.lr,
        "seed": run.seed,
        "overrides": run.overrides,
        "summary": f"held-out reward {told}" + (f"; {why}" if why else ""),
        "error": why,
        "seconds": seconds,
        **machine(),
        "heldout": heldout,
        "curves": curves(run_dir / "metrics.jsonl"),
    }


def answers(path: Path) -> dict[str, str]:
    digits: dict[str, str] = defaultdict(str)
    for row in json_lines(path) if path.exists() else ():
        if row["mode"] == "sampled":
            digits[row["domain"]] += "-" if row["reward"] is None else str(int(row["reward"]))
    return dict(digits)


def mean(digits: dict[str, str]) -> float | None:
    """Mean reward over all graded answers."""
    graded = "".join(digits.values()).replace("-", "")
    return graded.count("1") / len(graded) if graded else None


def curves(path: Path) -> dict[str, list[float | None]]:
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in json_lines(path) if path.exists() else ():
        for name, value in row.items():
            if isinstance(value, float) and any(re.fullmatch(pattern, name) for pattern in CURVES):
                found[name][row["rl_step"]].append(value)
    out = {}
    for name, steps in sorted(found.items()):
        kind = next(kind for pattern, kind in CURVES.items() if re.fullmatch(pattern, name))
        of = max if kind == "max" else lambda values: sum(values) / len(values)
        length = max(steps) + 1
        out[name] = [float(f"{of(steps[step]):.5g}") if step in steps else None for step in range(length)]
    return out


def last_error(output: str) -> str:
    lines = re.findall(r"^.*[Ee]rror: .*$", output, re.MULTILINE)
    return lines[-1][-300:] if lines else "ended without an error message"


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, capture_output=True).stdout.strip()
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "commit": commit,
        "torch": torch.__version__,
        "cpu": model.group(1) if model else platform.processor(),
        "threads": 1,
    }
