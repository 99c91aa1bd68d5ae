"""Folders of synthetic runs, as a run writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nemo_fiberpo.objective.report import HISTOGRAM_EDGES

HIERARCHY = {
    "hierarchy.token_clip": 0.2,
    "hierarchy.strata.order": ["domain", "trajectory"],
    "hierarchy.strata.domain.budget.pos": 0.04,
    "hierarchy.strata.domain.budget.neg": 0.03,
    "hierarchy.strata.trajectory.budget.pos": 0.25,
    "hierarchy.strata.trajectory.budget.neg": 0.125,
    "hierarchy.strata.trajectory.slope.cap": 32,
    "hierarchy.strata.trajectory.enabled": True,
    "hierarchy.branches": None,
    "hierarchy.sweeps": 1,
    "hierarchy.expert_partitions": None,
}
IDENTITY = {**HIERARCHY, "algorithm.objective": "fiberpo", "model.optim.lr": 6e-5, "data.heldout.sha256": "a"}
Drifts = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # stratum -> drifts of its cells, pos and neg


def write(path: Path, *rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row) + "\n") for row in rows))
    return path


def answer(index: int, reward: float | None, domain: str = "math", mode: str = "sampled") -> dict:
    return {"prompt_index": index, "domain": domain, "mode": mode, "reward": reward, "response": "x"}


def write_identity(folder: Path, **changed) -> None:
    """`_` of a key stands for its dots."""
    identity = {"seed": 1, **IDENTITY} | {key.replace("__", "."): value for key, value in changed.items()}
    write(folder / "run.json", {"identity": identity, "changes": [], "checkpoint": None})


def optimizer_step(rl_step: int, step: int, drifts: Drifts, names: Sequence[str] = ()) -> list[dict]:
    """The rows of an optimizer step: its figures, and its histograms. Cells of `domain` are called `names`."""
    head = {"rl_step": rl_step, "step": step}
    row: dict = {**head, "train_optim/grad_norm": 1.0, "train_optim/on_policy": float(not drifts)}
    if drifts:
        row["train_optim/gates/token/clipped"] = 0.01 * (step + 1)
    histograms: dict = dict(head)
    for stratum, channels in drifts.items():
        row[f"train_optim/gates/{stratum}/cells"] = float(len(channels[0]))
        for channel, values in zip(("pos", "neg"), channels, strict=True):
            where = f"train_optim/gates/{stratum}/{channel}/"
            used = np.array(values) / HIERARCHY[f"hierarchy.strata.{stratum}.budget.{channel}"]
            row |= {f"{where}drift_max": max(values), f"{where}budget_used_max": used.max()}
            row[f"{where}pass_through"] = float(np.mean(used <= 1.0))
            bins, counts = np.unique(np.searchsorted(HISTOGRAM_EDGES, used), return_counts=True)
            histograms[f"{where}budget_used_histogram"] = {str(b): int(n) for b, n in zip(bins, counts, strict=True)}
            for name, value, use in zip(names if stratum == "domain" else (), values, used, strict=False):
                row |= {f"train_optim/gates/domain.{name}/{channel}/drift": value}
                row |= {f"train_optim/gates/domain.{name}/{channel}/budget_used": float(use)}
    return [row, *([histograms] if drifts else [])]


def rollout(rl_step: int, reward: float, entropy: float = 0.5, domain: str = "math") -> dict:
    of_domain = {f"train_rollouts/reward/{domain}": reward}
    return {"rl_step": rl_step, "train_rollouts/rewards": reward, "train_rollouts/entropy": entropy, **of_domain}
