"""What the study consists of: study.yaml as a list of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

FILE = Path(__file__).with_name("study.yaml")


@dataclass(frozen=True)
class Run:
    """One training run. `name` is that of its folder and of its result."""

    setting: str
    objective: str
    lr: float
    seed: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.setting}-{self.objective}-{self.lr:g}-{self.seed}"


def read_study(path: Path = FILE) -> dict[str, list[Run]]:
    """The runs of every stage, in the order in which they are run: all with one seed before those with the next."""
    study: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(path), resolve=False)  # type: ignore[assignment]
    stages = {}
    for stage, chosen in study["stages"].items():
        runs = []
        for seed in study["seeds"][chosen["seeds"]]:
            for setting in chosen["settings"]:
                for objective, lr in _arms(chosen):
                    overrides = [*study["common"], *study["settings"][setting], f"model.optim.lr={lr:g}"]
                    overrides += _flat(study["objectives"][objective])
                    runs.append(Run(setting, objective, lr, seed, tuple(overrides)))
        stages[stage] = runs
    return stages


def read_by_setting(name: str, path: Path = FILE) -> dict[str, Any]:
    """A section of study.yaml with an entry for some settings: `titles`, or `outcome`, the domains that count."""
    study: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[assignment]
    section: dict[str, Any] = study[name]
    return section


def read_references(path: Path = FILE) -> dict[str, list[str]]:
    """By stage, the objective with which the others are compared, where that is not the best baseline."""
    stages = OmegaConf.load(path).stages.items()
    return {stage: [chosen.reference] for stage, chosen in stages if "reference" in chosen}


def _arms(stage: dict[str, Any]) -> list[tuple[str, float]]:
    """Objective and learning rate. A stage has a list of rates for all its objectives, or names the rate of each."""
    objectives = stage["objectives"]
    if isinstance(objectives, dict):
        return [(objective, float(lr)) for objective, lr in objectives.items()]
    return [(objective, float(lr)) for lr in stage["lr"] for objective in objectives]


def _flat(overrides: list[Any]) -> list[str]:
    """The overrides of an objective, with those of the lists that it includes."""
    return [one for entry in overrides for one in (entry if isinstance(entry, list) else [entry])]
