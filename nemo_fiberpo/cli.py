"""`fiberpo`: what can be asked about a run without starting it.

    fiberpo plan CONFIG [overrides]      ranks, groups, memory, cells and collectives of a run, or why it cannot run
    fiberpo import-hf DIR OUT.nemo       a Hugging Face model as a policy
    fiberpo export-hf RUN.nemo DIR       a policy as a Hugging Face model

Its exit status is 0, 1 where the planned run cannot run, and 2 where what it was given cannot be read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_fiberpo.aligner import launch
from nemo_fiberpo.aligner.model_checks import model_problems, partition_table
from nemo_fiberpo.aligner.prompts import load_prompts
from nemo_fiberpo.aligner.settings import (
    AlgorithmSettings,
    DataSettings,
    algorithm_settings,
    cluster_settings,
    data_settings,
    reward_settings,
)
from nemo_fiberpo.objective import ExpertPartitions, Hierarchy, check_gating
from nemo_fiberpo.objective.expert_partitions import COLUMN
from nemo_fiberpo.plan.assumptions import Assumptions
from nemo_fiberpo.plan.cells import OF_ROLLOUT, Partitions, PromptLabels
from nemo_fiberpo.plan.plan import Plan, Request, make_plan
from nemo_fiberpo.plan.table import format_plan


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns its exit status."""
    parser = argparse.ArgumentParser(prog="fiberpo", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="what a run will need, or why it cannot run")
    plan.add_argument(
        "config", help="a file of ./conf by its name, such as cluster/mixtral_8x7b, or a path to a YAML file"
    )
    plan.add_argument("overrides", nargs="*", help="as the training script takes them: model.micro_batch_size=2")
    plan.add_argument("--json", action="store_true", help="print everything as JSON")
    for name, source, target in (("import-hf", "DIR", "OUT.nemo"), ("export-hf", "RUN.nemo", "DIR")):
        convert = commands.add_parser(name, help="see docs/checkpoint_conversion.md")
        convert.add_argument("source", metavar=source, type=Path)
        convert.add_argument("target", metavar=target, type=Path)
    # argparse ends a list of arguments at the first option; what follows it are overrides too.
    given, more = parser.parse_known_args(arguments)
    if given.command != "plan" or any(argument.startswith("-") for argument in more):
        given = parser.parse_args(arguments)
    try:
        if given.command != "plan":
            return _convert(given.command, given.source, given.target)
        found = plan_of(compose(given.config, [*given.overrides, *more]), given.config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        print(format_plan(found))
    for problem in found.problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found.problems else 0


def _convert(command: str, source: Path, target: Path) -> int:
    from nemo_fiberpo.aligner.huggingface_files import export_huggingface, import_huggingface

    (import_huggingface if command == "import-hf" else export_huggingface)(source, target)
    print(f"wrote {target}")
    return 0


def compose(config: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration as the training script composes it. ValueError, of one line, where that fails."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    launch.register_resolvers()
    folder, name = _find(config)
    try:
        with initialize_config_dir(config_dir=str(folder), version_base=None):
            return hydra_compose(config_name=name, overrides=launch.overrides(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(" ".join(lines[:2])) from error


def _find(config: str) -> tuple[Path, str]:
    """The folder that Hydra searches, and the name of the configuration in it."""
    if config.endswith((".yaml", ".yml")):
        path = Path(config).resolve()
        if not path.is_file():
            raise ValueError(f"{config}: there is no such file")
        # A file in a folder of conf/ has its defaults in conf/ itself.
        folder = next((above for above in path.parents if (above / "base.yaml").is_file()), path.parent)
        return folder, str(path.relative_to(folder).with_suffix(""))
    beside = Path.cwd() / "conf"
    folder = beside if beside.is_dir() else Path(__file__).resolve().parents[1] / "conf"
    if not (folder / f"{config}.yaml").is_file():
        known = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.glob("*.yaml"))
        known += sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.glob("cluster/*.yaml"))
        raise ValueError(
            f"{config}: not in {folder}; there are {', '.join(known) or 'none'}, or give a path to a .yaml"
        )
    return folder, config


def plan_of(cfg: DictConfig, name: str) -> Plan:
    """The plan of a composed configuration, with all that is wrong with it."""
    problems: list[str] = []

    def tried(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except ValueError as error:
            problems.append(str(error))
        except OmegaConfBaseException as error:
            problems.append(f"{error.full_key}: {str(error).splitlines()[0]}" if error.full_key else str(error))
        return None

    launch_checked = tried(lambda: launch.check_sections(cfg))
    hierarchy, partitions = launch_checked or (None, None)
    assumptions = tried(lambda: cluster_settings(cfg)) or _fallback(cfg)
    settings = tried(lambda: algorithm_settings(cfg))
    data = tried(lambda: _data(cfg))
    tried(lambda: reward_settings(cfg))
    tried(lambda: _add_checkpoint(cfg))
    if assumptions.host == "nemo_aligner":
        problems += model_problems(cfg.model, bool(cfg.cpu))
    if settings is not None and hierarchy is not None:
        soft = partitions.soft_columns if partitions is not None else ()
        tried(lambda: check_gating(settings.gating, hierarchy, soft))
        tried(lambda: settings.check_passes(hierarchy.active, cfg.model.micro_batch_size))
    plan = make_plan(_request(cfg, name, assumptions, settings, data, hierarchy, partitions, tried), problems)
    if OmegaConf.is_interpolation(cfg.trainer, "devices") and "LOCAL_WORLD_SIZE" not in os.environ:
        plan.warnings.append(
            f"trainer.devices: {cfg.trainer.devices}, since LOCAL_WORLD_SIZE is not set, which the launcher sets to "
            "the ranks of a node; give trainer.devices"
        )
    return plan


def _data(cfg: DictConfig) -> DataSettings:
    """The `data` section; a layout that ships names no prompts."""
    cfg = cfg.copy()
    if OmegaConf.is_missing(cfg.data, "train"):
        cfg.data.train = "train.jsonl"
    return data_settings(cfg)


def _fallback(cfg: DictConfig) -> Assumptions:
    """Where the section has an error: what decides whether other problems are real, if that is right."""
    section = cfg.get("cluster") or {}
    kept = {name: section[name] for name in ("host", "vocab_size") if section.get(name) is not None}
    try:
        return Assumptions(**kept)
    except ValueError:
        return Assumptions()


def _request(
    cfg: DictConfig,
    name: str,
    assumptions: Assumptions,
    settings: AlgorithmSettings | None,
    data: DataSettings | None,
    hierarchy: Hierarchy | None,
    partitions: ExpertPartitions | None,
    tried: Callable[[Callable[[], Any]], Any],
) -> Request:
    model = OmegaConf.to_container(cfg.model, resolve=True)
    trainer = {key: cfg.trainer.get(key) for key in ("num_nodes", "devices", "precision")}
    assert isinstance(model, dict)
    table = tried(lambda: _partitions(partitions, cfg.model)) if partitions is not None else None
    if partitions is not None and table is None:
        hierarchy = None
    prompts = None
    if settings is not None and hierarchy is not None:
        known = hierarchy
        prompts = tried(
            lambda: _labels(cfg, known, assumptions, settings.prompts_per_rollout // settings.optimizer_steps)
        )
    return Request(
        name=name,
        model={str(key): value for key, value in model.items()},
        trainer=trainer,
        assumptions=assumptions,
        batches=launch.batch_sizes(cfg) if settings is not None else None,
        prompt_length=(data or DataSettings("train.jsonl")).max_prompt_length,
        hierarchy=hierarchy,
        prompts=prompts,
        partitions=table,
        gating=settings.gating if settings is not None else None,
        kl=settings is not None and settings.kl.coefficient > 0,
        epochs=settings.epochs if settings is not None else 1,
        passes=settings.passes if settings is not None else 2,
        cpu=bool(cfg.cpu),
    )


def _partitions(partitions: ExpertPartitions, model: DictConfig) -> Partitions:
    return Partitions(partition_table(partitions, model)[1], partitions.membership == "soft")


def _labels(cfg: DictConfig, hierarchy: Hierarchy, assumptions: Assumptions, prompts: int) -> PromptLabels:
    """Labels of data.train, where it is there; else assumed ones."""
    path = None if OmegaConf.is_missing(cfg.data, "train") else Path(cfg.data.train)
    if path is None or not path.is_file():
        return PromptLabels.assumed(hierarchy, prompts, assumptions.labels)
    records = load_prompts(path, tuple(reward_settings(cfg).graders or ()))
    labels, names = {}, {}
    for column in hierarchy.columns:
        if column in (*OF_ROLLOUT, COLUMN):
            continue
        values = [record.domain if column == "domain" else record.strata.get(column) for record in records]
        names[column] = sorted({value for value in values if value is not None})
        if None in values and column not in hierarchy.optional_columns:
            raise ValueError(f"{records[values.index(None)].where}: strata: has no label for the stratum {column!r}")
        number = {value: place for place, value in enumerate(names[column])}
        labels[column] = [-1 if value is None else number[value] for value in values]
    return PromptLabels(labels, names, counted=True)


def _add_checkpoint(cfg: DictConfig) -> None:
    """Lay `cfg.model` over the model config of the checkpoint it starts from, where that is there, as loading does."""
    if OmegaConf.is_missing(cfg.pretrained_checkpoint, "restore_from_path"):
        return
    path = Path(cfg.pretrained_checkpoint.restore_from_path)
    if path.is_dir() and (path / "model_config.yaml").is_file():
        own = OmegaConf.load(path / "model_config.yaml")
    elif path.is_file() and tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            member = next((entry for entry in archive if entry.name.endswith("model_config.yaml")), None)
            file = archive.extractfile(member) if member is not None else None
            if file is None:
                raise ValueError(f"pretrained_checkpoint.restore_from_path: {path} holds no model_config.yaml")
            own = OmegaConf.create(file.read().decode())
    else:
        return
    cfg.model = OmegaConf.merge(own, cfg.model)


if __name__ == "__main__":
    sys.exit(main())
