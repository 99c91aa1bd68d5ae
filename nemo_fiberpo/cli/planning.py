"""The plan of a composed configuration: all checks of the training script, then the arithmetic of `plan/`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_fiberpo.aligner.checkpoint.run_record import RunRecord
from nemo_fiberpo.aligner.config.checks import RunConfig, batch_sizes, on_cpu, read_config
from nemo_fiberpo.aligner.config.data import DataSettings
from nemo_fiberpo.aligner.config.model_checks import model_problems, partition_table
from nemo_fiberpo.aligner.config.sections import cluster_settings, reward_settings
from nemo_fiberpo.analysis.runs import Run
from nemo_fiberpo.labelling.expert_partitions import COLUMN
from nemo_fiberpo.labelling.token_labels import TokenLabels
from nemo_fiberpo.objective import ExpertPartitions, Hierarchy
from nemo_fiberpo.plan.assumptions import Assumptions
from nemo_fiberpo.plan.cells import OF_ROLLOUT, Partitions, PromptLabels
from nemo_fiberpo.plan.plan import Plan, Request, make_plan
from nemo_fiberpo.prompts.records import load_prompts
from nemo_fiberpo.storage.policy_file import read_config as config_of

SECTIONS = ("model", "trainer", "algorithm", "hierarchy", "data", "rewards", "pretrained_checkpoint")
"""The sections that a plan needs."""


def plan_of(cfg: DictConfig, name: str, run: Path | None = None) -> Plan:
    """The plan of a composed configuration, with all its problems. ValueError if whole sections are missing.

    run   the folder of a run with `algorithm.passes: auto`, whose second passes the cost of a step is estimated from
    """
    lacking = [section for section in SECTIONS if not isinstance(cfg.get(section), DictConfig)]
    if lacking:
        raise ValueError(
            f"{name}: has no section {', '.join(lacking)}; a run begins with defaults: [base, hierarchy: domain, "
            "algorithm: fiberpo, model: policy, _self_], or with a layout, defaults: [cluster/mixtral_8x7b, _self_]"
        )
    cfg = cfg.copy()  # the checkpoint's own model config is merged into it below
    problems: list[str] = []
    filled = _filled(cfg)

    def tried(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except (OmegaConfBaseException, ValueError) as error:
            reference = error if isinstance(error, OmegaConfBaseException) else error.__cause__
            if isinstance(reference, OmegaConfBaseException):
                if not _follows(cfg, reference.full_key, problems):
                    problems.append(_key_and_line(reference))
            elif str(error) not in problems:
                problems.append(str(error))
        return None

    assumptions = tried(lambda: cluster_settings(cfg)) or _fallback(cfg)
    config = read_config(filled, tried)
    if cfg.get("resume") and cfg.resume.get("allow"):
        tried(lambda: RunRecord(filled).check_allowed())
    tried(lambda: add_checkpoint(cfg))
    if assumptions.host == "nemo_aligner":
        problems += model_problems(cfg.model, bool(cfg.get("cpu", False)))
    recorded = None if run is None else (str(run), Run(run).second_shares())
    request = tried(lambda: _request(cfg, name, assumptions, config, tried, recorded))
    if request is None:
        return Plan(name, assumptions, on_cpu(cfg), problems=problems)
    plan = make_plan(request, problems)
    plan.unchecked += _not_there(cfg)
    if OmegaConf.is_interpolation(cfg.trainer, "devices") and "LOCAL_WORLD_SIZE" not in os.environ:
        plan.warnings.append(
            f"trainer.devices: {cfg.trainer.devices}, since LOCAL_WORLD_SIZE is not set, which the launcher sets to "
            "the ranks of a node; give trainer.devices"
        )
    return plan


def _not_there(cfg: DictConfig) -> Iterator[str]:
    """A line for each file that the configuration names and that does not exist."""
    for section, key in (("data", "train"), ("data", "heldout"), ("pretrained_checkpoint", "restore_from_path")):
        if OmegaConf.is_missing(cfg[section], key):
            continue
        path = cfg[section].get(key)
        if isinstance(path, str) and not Path(path).exists():
            yield f"{section}.{key}: there is no {path}"


def _key_and_line(error: OmegaConfBaseException) -> str:
    line = str(error).splitlines()[0]
    return f"{error.full_key}: {line}" if error.full_key else line


def _follows(cfg: DictConfig, key: str | None, problems: list[str]) -> bool:
    """Whether `key`, or a key that it refers to directly or indirectly, already has a problem."""
    plain = OmegaConf.to_container(cfg, resolve=False)
    seen: set[str] = set()
    left = [key] if key else []
    while left:
        name = left.pop()
        if any(problem.startswith((f"{name}:", f"{name} ")) for problem in problems):
            return True
        seen.add(name)
        value: Any = plain
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        left += set(re.findall(r"\$\{([\w.]+)\}", str(value))) - seen
    return False


def _filled(cfg: DictConfig) -> DictConfig:
    """With placeholders for the prompts and the policy, which the shipped layouts do not name."""
    cfg = cfg.copy()
    for section, key in (("data", "train"), ("pretrained_checkpoint", "restore_from_path")):
        if OmegaConf.is_missing(cfg[section], key):
            cfg[section][key] = f"<{section}.{key}>"
    return cfg


def _fallback(cfg: DictConfig) -> Assumptions:
    """For a faulty section: the valid values among those that decide whether other problems are real."""
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
    config: RunConfig,
    tried: Callable[[Callable[[], Any]], Any],
    recorded: tuple[str, list[float]] | None,
) -> Request:
    settings, data, partitions = config.algorithm, config.data, config.partitions
    hierarchy: Hierarchy | None = config.hierarchy
    _try_references(cfg.model, tried)  # the code below stops at the first unresolved one
    model = OmegaConf.to_container(cfg.model, resolve=True)
    trainer = {key: cfg.trainer.get(key) for key in ("num_nodes", "devices", "precision")}
    assert isinstance(model, dict)
    table = tried(lambda: _partitions(partitions, cfg.model)) if partitions is not None else None
    if partitions is not None and table is None:
        hierarchy = None
    prompts, of_tokens = None, {}
    if settings is not None and hierarchy is not None:
        known, of_tokens = hierarchy, _of_tokens(config.token_labels, assumptions)
        per_step = settings.prompts_per_rollout // settings.optimizer_steps
        prompts = tried(lambda: _labels(cfg, known, assumptions, per_step, of_tokens))
    request = partial(
        Request,
        name=name,
        model={str(key): value for key, value in model.items()},
        trainer=trainer,
        assumptions=assumptions,
        prompt_length=(data or DataSettings("train.jsonl")).max_prompt_length,
        hierarchy=hierarchy,
        prompts=prompts,
        partitions=table,
        of_tokens=of_tokens,
        recorded=recorded,
        cpu=on_cpu(cfg),
    )
    if settings is None:
        return request()
    return request(
        batches=batch_sizes(cfg),
        gating=settings.gating_map,
        kl=settings.kl.coefficient > 0,
        epochs=settings.epochs,
        passes=1 if settings.passes == 1 else 2,
        all_forward=settings.all_forward,
        on_host=settings.kept_on == "host",
        auto=settings.passes == "auto",
        whole_groups=settings.whole_groups,
    )


def _try_references(section: DictConfig, tried: Callable[[Callable[[], Any]], Any]) -> None:
    for key in section:
        if OmegaConf.is_interpolation(section, str(key)):
            tried(partial(section.__getitem__, key))
        elif isinstance(below := section.get(key), DictConfig):
            _try_references(below, tried)


def _partitions(partitions: ExpertPartitions, model: DictConfig) -> Partitions:
    return Partitions(partition_table(partitions, model)[1], partitions.membership == "soft")


def _of_tokens(labels: TokenLabels | None, assumptions: Assumptions) -> dict[str, list[str]]:
    """Names of the labels of `token_labels` by column; assumed ones if only a rollout determines them."""
    cells = labels.cells if labels is not None else {}
    return {
        name: list(known or (f"{name} {number}" for number in range(assumptions.labels.get(name, 8))))
        for name, known in cells.items()
    }


def _labels(
    cfg: DictConfig, hierarchy: Hierarchy, assumptions: Assumptions, prompts: int, of_tokens: Collection[str]
) -> PromptLabels:
    """Labels of data.train if it exists, else assumed ones."""
    path = None if OmegaConf.is_missing(cfg.data, "train") else Path(cfg.data.train)
    if path is None or not path.exists():
        return PromptLabels.assumed(hierarchy, prompts, assumptions.labels, of_tokens)
    records = load_prompts(path, tuple(reward_settings(cfg).graders or ()))
    labels, names = {}, {}
    for column in hierarchy.columns:
        if column in (*OF_ROLLOUT, COLUMN, *of_tokens):
            continue
        values = [record.domain if column == "domain" else record.strata.get(column) for record in records]
        names[column] = sorted({value for value in values if value is not None})
        if None in values and column not in hierarchy.optional_columns:
            raise ValueError(f"{records[values.index(None)].where}: strata: has no label for the stratum {column!r}")
        number = {value: place for place, value in enumerate(names[column])}
        labels[column] = [-1 if value is None else number[value] for value in values]
    return PromptLabels(labels, names, counted=True)


def add_checkpoint(cfg: DictConfig) -> None:
    """Merge `cfg.model` over the model config of its checkpoint, if that exists, as loading does."""
    if OmegaConf.is_missing(cfg.pretrained_checkpoint, "restore_from_path"):
        return
    path = Path(cfg.pretrained_checkpoint.restore_from_path)
    if path.exists():
        cfg.model = OmegaConf.merge(config_of(path), cfg.model)
