"""The keys of a run's config by section, with defaults, bounds and meanings.

Defaults are those of a run that inherits conf/base.yaml and an algorithm of conf/algorithm/.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_fiberpo.aligner.config.algorithm import AlgorithmSettings, HierarchyGating
from nemo_fiberpo.aligner.config.data import DataSettings
from nemo_fiberpo.aligner.config.rewards import RewardSettings
from nemo_fiberpo.aligner.config.run import PretrainedCheckpoint, ResumeSettings, RunSettings
from nemo_fiberpo.aligner.config.warm_start import WarmStartSettings
from nemo_fiberpo.fields import Key, keys, summary
from nemo_fiberpo.labelling.token_labels import KINDS
from nemo_fiberpo.nemo_config import meanings as nemo
from nemo_fiberpo.objective import OBJECTIVES, ExpertPartitions, Hierarchy, Stratum
from nemo_fiberpo.plan.assumptions import Assumptions

TOP_LEVEL = ""
"""Name of the section of the top-level keys."""
UNSET = ""
"""Default of a key that is left to NeMo or the checkpoint."""

_SHIPPED = {"": "base.yaml", "algorithm.": "algorithm/base.yaml", "model.": "model/policy.yaml"}
_HIERARCHY = "Strata and their budgets. conf/hierarchy/ has ready ones; docs/hierarchy.md explains the choice."
_BESIDE_STRATA = (
    Key(
        "expert_partitions",
        "mapping",
        None,
        "How the experts of a mixture are partitioned, see `hierarchy.expert_partitions`. Required where a stratum is "
        "called or joins `expert_partition`.",
    ),
    Key(
        "token_labels",
        "{column: source}",
        None,
        "Labels of tokens within a response, such as thinking and answer, see `hierarchy.token_labels`. Strata, joins "
        "and branches use a column by its name.",
    ),
    Key(
        "ignore",
        "[opening, closing], or list of such pairs",
        None,
        "Markers of spans that the policy did not write, such as results of tools. Their tokens are in no loss, no "
        "cell and no count.",
    ),
)


@dataclass(frozen=True)
class Block:
    """Keys of one class."""

    title: str  # when it applies, "" for always
    text: str
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class Section:
    """A part of the config; `blocks` are alternatives where there are several."""

    name: str  # as a user types it
    summary: str
    blocks: tuple[Block, ...]
    named: bool = False  # its keys are below a name chosen by the user

    @property
    def prefix(self) -> str:
        """The prefix of the keys."""
        return f"{self.name}." if self.name else ""


def sections(conf: Path) -> dict[str, Section]:
    """All sections by name; `conf` is the folder with the base files."""
    shipped = _shipped(conf)

    def of(name: str, kind: type, text: str = "", more: Iterable[Key] = ()) -> Section:
        found = tuple(_with_default(key, name, shipped) for key in (*keys(kind), *more))
        return Section(name, text or summary(kind), (Block("", "", found),))

    strata = "A level of the chain, or a branch. Its keys stand below its name: hierarchy.strata.NAME.KEY."
    listed = [
        of(TOP_LEVEL, RunSettings),
        of("hierarchy", Hierarchy, _HIERARCHY, _BESIDE_STRATA),
        dataclasses.replace(of("hierarchy.strata", Stratum, strata), named=True),
        of("hierarchy.expert_partitions", ExpertPartitions),
        _token_labels(),
        of("algorithm", AlgorithmSettings),
        _gating(conf),
        *(of(name, kind) for name, kind in _CLASSES.items()),
        *(_of_nemo(name, text, shipped) for name, text in nemo.SECTIONS.items()),
    ]
    return {section.name: section for section in listed}


_CLASSES: dict[str, type] = {
    "data": DataSettings,
    "rewards": RewardSettings,
    "pretrained_checkpoint": PretrainedCheckpoint,
    "resume": ResumeSettings,
    "cluster": Assumptions,
    "warm_start": WarmStartSettings,
}


def find(path: str, every: Mapping[str, Section]) -> Section:
    """The section at a dotted path, or its part with the key or keys at that path. ValueError with the nearest name."""
    if path in every and path != TOP_LEVEL:
        return every[path]
    around = [section for section in every.values() if path.startswith(section.prefix)]
    section = max(around, key=lambda section: len(section.name))
    rest = path.removeprefix(section.prefix)
    if section.named:
        rest = rest.partition(".")[2]
        if not rest:
            return section
    blocks = [dataclasses.replace(block, keys=_at(rest, block.keys)) for block in section.blocks]
    if kept := tuple(block for block in blocks if block.keys):
        return dataclasses.replace(section, blocks=kept)
    if path.partition(".")[0] in nemo.SECTIONS:
        raise ValueError(f"{path}: this package neither sets nor reads such a key, NeMo may{_nearest(path, every)}")
    raise ValueError(f"{path}: no section or key of the config has this name{_nearest(path, every)}")


def _at(path: str, found: tuple[Key, ...]) -> tuple[Key, ...]:
    """The keys at or below `path`, else the one that contains it."""
    below = tuple(key for key in found if key.name == path or key.name.startswith(f"{path}."))
    return below or tuple(key for key in found if path.startswith(f"{key.name}."))


def _nearest(path: str, every: Mapping[str, Section]) -> str:
    names = [section.prefix + key.name for section in every.values() for block in section.blocks for key in block.keys]
    names = [*filter(None, every), *dict.fromkeys(names)]
    same = [name for name in names if name.rpartition(".")[2] == path]
    close = same or difflib.get_close_matches(path, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close[:3])}?"
    return f"; sections: {', '.join(filter(None, every))}"


def _shipped(conf: Path) -> dict[str, Any]:
    """Dotted key -> value in the base files, references unresolved."""
    found: dict[str, Any] = {}
    for prefix, file in _SHIPPED.items():
        if (conf / file).is_file():
            found |= _leaves(prefix, OmegaConf.to_container(OmegaConf.load(conf / file), resolve=False))
    return found


def _leaves(prefix: str, value: Any) -> dict[str, Any]:
    """Values by dotted key, including mappings."""
    found: dict[str, Any] = {}
    for key, entry in value.items():
        found[f"{prefix}{key}"] = entry
        if isinstance(entry, dict):
            found |= _leaves(f"{prefix}{key}.", entry)
    return found


def _with_default(key: Key, section: str, shipped: Mapping[str, Any]) -> Key:
    given = shipped.get(f"{section}.{key.name}" if section else key.name, key.default)
    return dataclasses.replace(key, default=MISSING if given == "???" else given)


def _token_labels() -> Section:
    blocks = tuple(Block(f"source with {name}", summary(kind), tuple(keys(kind))) for name, kind in KINDS.items())
    text = (
        "Labels of tokens within a response. Each column has one of these sources, hierarchy.token_labels.COLUMN.KEY."
    )
    return Section("hierarchy.token_labels", text, blocks, named=True)


def _gating(conf: Path) -> Section:
    """The parameters of each objective, with their values in conf/algorithm/."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted((conf / "algorithm").glob("*.yaml")):
        files[path.stem] = OmegaConf.to_container(OmegaConf.load(path), resolve=False)  # type: ignore[assignment]
    kinds: dict[type, list[str]] = {}
    for objective, kind in OBJECTIVES.items():
        kinds.setdefault(kind or HierarchyGating, []).append(objective)
    blocks = []
    for kind, objectives in kinds.items():
        found = []
        for key in keys(kind):
            values = {
                name: file["gating"][key.name]
                for name, file in files.items()
                if _objective(name, files) in objectives and key.name in (file.get("gating") or {})
            }
            note = key.meaning
            if any(value != key.default for value in values.values()):
                note += f" In conf/algorithm/: {', '.join(f'{name} {json.dumps(values[name])}' for name in values)}."
            found.append(dataclasses.replace(key, meaning=note))
        blocks.append(Block(f"objective {', '.join(objectives)}", summary(kind), tuple(found)))
    return Section(
        "algorithm.gating", "Parameters of the objective. `algorithm.objective` decides which there are.", tuple(blocks)
    )


def _objective(name: str, files: Mapping[str, Mapping[str, Any]]) -> str:
    """The objective of a file of conf/algorithm/, possibly inherited."""
    while "objective" not in files[name]:
        before = [entry for entry in files[name].get("defaults", ()) if entry in files]
        if not before:
            return "fiberpo"
        name = before[0]
    return str(files[name]["objective"])


def _of_nemo(name: str, text: str, shipped: Mapping[str, Any]) -> Section:
    found = []
    for path, meaning in nemo.KEYS.items():
        if path.startswith(f"{name}."):
            value = shipped.get(path, UNSET)
            found.append(Key(path.removeprefix(f"{name}."), "", "{...}" if isinstance(value, dict) else value, meaning))
    return Section(name, text, (Block("", "", tuple(found)),))
