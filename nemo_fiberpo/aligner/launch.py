"""From a composed config to the objects of a run: what the scripts in examples/ share.

Nothing here decides anything about the algorithm; it starts NeMo the way NeMo-Aligner's own scripts do.
"""

from __future__ import annotations

import gc
import json
import logging as std_logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_fiberpo.aligner.settings import SECTIONS
from nemo_fiberpo.config import load_hierarchy, reject_unknown_keys
from nemo_fiberpo.megatron.timeouts import limit_collectives
from nemo_fiberpo.objective import Hierarchy
from nemo_fiberpo.objective.hierarchy import positive_number

_NEMO = ("model", "trainer", "exp_manager", "hydra")  # sections whose unknown keys Hydra refuses
# What may change when a run goes on: how long it runs and how often it is looked at and saved.
_MAY_CHANGE = ("rl_steps", "data_epochs", "val_check_interval", "save_interval")


def register_resolvers() -> None:
    """The arithmetic that conf/ uses, by the names NeMo-Aligner's scripts give it."""
    OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
    OmegaConf.register_new_resolver("plus", lambda x, y: x + y, replace=True)
    OmegaConf.register_new_resolver("int_div", lambda x, y: x // y, replace=True)


def overrides(arguments: Iterable[str]) -> list[str]:
    """The command line's overrides as Hydra takes them, so that anything can be overridden and a typo is explained.

    `hierarchy.strata.domain.budget.pos=0.03` names a stratum of the list, which Hydra cannot; it becomes an entry of
    `stratum_overrides`, see `apply_stratum_overrides`. Keys of the sections that are checked key by key are passed
    even if they are unknown: the check names the nearest valid one, Hydra would not.
    """
    out = []
    for argument in arguments:
        stratum = re.match(r"\+{0,2}hierarchy\.(?:strata|branches)\.([^.=]+)\.([^=]+)=(.*)$", argument, re.DOTALL)
        if stratum:
            out.append("++stratum_overrides.{}.{}={}".format(*stratum.groups()))
        elif re.match(rf"(?!({'|'.join(_NEMO)})\.)\w+\.[^=]+=", argument):
            out.append("++" + argument)
        else:
            out.append(argument)
    return out


def apply_stratum_overrides(cfg: DictConfig) -> None:
    """Move `stratum_overrides.<name>.<field>` into the stratum of that name. ValueError if there is none."""
    changes = cfg.get("stratum_overrides")
    with open_dict(cfg):
        cfg.pop("stratum_overrides", None)
        for name, fields in (changes or {}).items():
            lists = [cfg.hierarchy.get(kind) or [] for kind in ("strata", "branches")]
            places = {entry.get("name"): (listed, index) for listed in lists for index, entry in enumerate(listed)}
            where = "hierarchy.strata or branches" if lists[1] else "hierarchy.strata"
            reject_unknown_keys({name: fields}, places, where)
            listed, index = places[name]
            listed[index] = OmegaConf.merge(listed[index], fields)


def check_sections(cfg: DictConfig) -> Hierarchy:
    """Apply `stratum_overrides`, refuse unknown sections and return the hierarchy. ValueError names the field."""
    apply_stratum_overrides(cfg)
    reject_unknown_keys(cfg, SECTIONS)
    if "collective_timeout" in cfg:
        positive_number(cfg.collective_timeout, "collective_timeout")
    try:
        return load_hierarchy(cfg.hierarchy)
    except ValueError as error:
        raise ValueError(f"hierarchy.{error}") from error


def _identity(cfg: DictConfig) -> dict[str, Any]:
    """What makes a run the run it is."""
    out = {"seed": cfg.seed, "data.train": cfg.data.train}
    for section in ("hierarchy", "algorithm", "warm_start"):
        values = OmegaConf.to_container(cfg[section], resolve=True) if cfg.get(section) is not None else {}
        assert isinstance(values, dict)
        out |= {f"{section}.{key!s}": value for key, value in values.items() if key not in _MAY_CHANGE}
    return out


def remember_run(cfg: DictConfig) -> None:
    """Write down in `run_dir` what the run is, for `check_same_run`; atomic."""
    path = Path(cfg.run_dir) / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_identity(cfg), indent=1))
    os.replace(temporary, path)


def check_same_run(cfg: DictConfig) -> None:
    """ValueError naming the first key by which `run_dir` holds another run: it would go on as a mixture of both."""
    path = Path(cfg.run_dir) / "run.json"
    if not path.exists():
        return
    before, now = json.loads(path.read_text()), json.loads(json.dumps(_identity(cfg)))
    for key in [*now, *before]:
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{key}: {now.get(key)!r}, but the run in {cfg.run_dir} has {before.get(key)!r}; give a run_dir of its "
                f"own, such as run_dir={cfg.run_dir}-2"
            )


def check_batches(cfg: DictConfig, data_parallel_size: int, context_parallel_size: int = 1) -> None:
    """ValueError naming the field by which the batch sizes do not fit together. Context-parallel ranks generate
    responses of their own, and train on those of the data-parallel rank that they share."""
    model, algorithm = cfg.model, cfg.algorithm
    group, ranks = algorithm.samples_per_prompt, data_parallel_size
    generating = data_parallel_size * context_parallel_size
    per_step = algorithm.prompts_per_rollout * group // algorithm.optimizer_steps
    local = algorithm.prompts_per_rollout * group // ranks
    wanted = (
        (
            "model.ppo.rollout_micro_batch_size",
            model.ppo.rollout_micro_batch_size,
            group,
            "algorithm.samples_per_prompt",
        ),
        (
            "algorithm.prompts_per_rollout x samples_per_prompt",
            algorithm.prompts_per_rollout * group,
            model.ppo.rollout_micro_batch_size * generating,
            f"model.ppo.rollout_micro_batch_size x {generating} data- and context-parallel ranks",
        ),
        (
            "samples per optimizer step (algorithm.prompts_per_rollout x samples_per_prompt / optimizer_steps)",
            per_step,
            model.micro_batch_size * ranks,
            f"model.micro_batch_size x {ranks} data-parallel ranks",
        ),
        (
            "samples per rank and rollout",
            local,
            model.ppo.forward_micro_batch_size,
            "model.ppo.forward_micro_batch_size",
        ),
    )
    for name, value, divisor, meaning in wanted:
        if value % divisor:
            raise ValueError(f"{name}: {value} is not a multiple of {meaning} = {divisor}")


def start(cfg: DictConfig) -> None:
    """Prepare the process: the CPU mode if asked for, quiet logs on CPU, one way to start helper processes."""
    if cfg.cpu:
        from nemo_fiberpo.aligner import cpu

        cpu.install(packed_rows=bool(cfg.algorithm.packing))
    import torch.multiprocessing as mp
    from nemo.utils import logging

    mp.set_start_method("spawn", force=True)
    if cfg.cpu:
        # What these say on a CPU is which GPU features are absent, and NeMo names every default of its config.
        logging.setLevel(logging.ERROR)
        for name in ("lightning.pytorch", "pytorch_lightning", "megatron"):
            std_logging.getLogger(name).setLevel(std_logging.ERROR)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def create_trainer(cfg: DictConfig) -> Any:
    """Lightning's trainer with NeMo's strategy, which makes every process group with `collective_timeout`."""
    from nemo_aligner.utils.train_script_utils import resolve_and_create_trainer

    trainer = resolve_and_create_trainer(cfg, "ppo")
    # The strategy has a `timeout` argument, for the default group and for Megatron's; NeMo's builder does not pass it.
    if not hasattr(trainer.strategy, "_timeout"):
        raise ImportError(
            f"{type(trainer.strategy).__name__}._timeout does not exist in this version of Lightning; "
            "collective_timeout is set by it"
        )
    trainer.strategy._timeout = timedelta(seconds=cfg.collective_timeout)
    return trainer


def build_lightning_trainer(cfg: DictConfig) -> Any:
    """`create_trainer`, with NeMo's experiment manager (logs, checkpoints, resume) attached."""
    from nemo.utils.exp_manager import exp_manager

    trainer = create_trainer(cfg)
    exp_manager(trainer, cfg.exp_manager)
    return trainer


def load_actor(cfg: DictConfig, trainer: Any) -> Any:
    """The policy from `pretrained_checkpoint.restore_from_path`, with what `model` says laid over its own config."""
    from nemo_aligner.utils.utils import load_and_override_model_config, load_from_nemo

    from nemo_fiberpo.aligner.actor import FiberPOActor

    path = cfg.pretrained_checkpoint.restore_from_path
    if not Path(path).exists():
        raise ValueError(f"pretrained_checkpoint.restore_from_path: {path} does not exist; give a .nemo file or folder")
    cfg.model = load_and_override_model_config(path, cfg.model)
    return load_from_nemo(FiberPOActor, cfg.model, trainer, strict=True, restore_path=path)


def initialise(cfg: DictConfig, trainer: Any, actor: Any, dataset: Any, optimizer_steps: int) -> tuple[Any, Any, Any]:
    """Set up distribution, optimizer and scheduler, and restore a checkpoint if exp_manager found one.

    optimizer_steps  of the whole run: the horizon of the learning-rate schedule, unless `trainer.max_steps` sets one

    Returns (optimizer, scheduler, checkpoint callback).
    """
    from megatron.core.utils import divide
    from nemo_aligner.utils import parallel_state
    from nemo_aligner.utils.train_script_utils import (
        add_custom_checkpoint_callback,
        extract_optimizer_scheduler_from_ptl_model,
        init_using_ptl,
    )

    if trainer.max_steps < 0:
        trainer.fit_loop.epoch_loop.max_steps = optimizer_steps
    # NeMo wants a data loader to be there; PPOTrainer builds its own and never reads this one.
    batch = divide(cfg.model.global_batch_size, parallel_state.get_data_parallel_world_size())
    init_using_ptl(trainer, actor, torch.utils.data.DataLoader(dataset, batch_size=batch), dataset)
    del actor._train_dl
    limit_collectives(cfg.collective_timeout)  # groups that were made without the strategy's time-out
    # PPOTrainer collects garbage several times a step; without this each pass walks all that NeMo's imports made.
    gc.collect()
    gc.freeze()
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(actor)
    return optimizer, scheduler, add_custom_checkpoint_callback(trainer, actor)


def prompt_loader(cfg: DictConfig, dataset: Any, collate: Callable) -> Callable:
    """What PPOTrainer calls for a data loader of prompts that starts at `consumed_samples`."""
    prompts_per_batch = cfg.model.ppo.rollout_micro_batch_size // cfg.algorithm.samples_per_prompt
    return partial(
        _build_loader, dataset, collate, prompts_per_batch, cfg.algorithm.prompts_per_rollout, cfg.model.seed
    )


def _build_loader(dataset: Any, collate: Callable, micro: int, total: int, seed: int, consumed_samples: int) -> Any:
    from nemo_fiberpo.aligner.inference_layout import generation_axis
    from nemo_fiberpo.aligner.rollout import PromptSampler

    rank, ranks, _ = generation_axis()
    sampler = PromptSampler(
        total_samples=len(dataset),
        consumed_samples=consumed_samples,
        micro_batch_size=micro,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        drop_last=True,
        global_batch_size=total,
        seed=seed,
    )
    return torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)


def says(path: Path, text: str) -> bool:
    """Whether the file is there and holds `text`."""
    return path.exists() and path.read_text().strip() == text


def wait_until_says(path: Path, text: str, seconds: float = 300.0) -> None:
    """Until the first rank has written `text` to `path`, before process groups exist. TimeoutError if it does not."""
    until = time.monotonic() + seconds
    while not says(path, text):
        if time.monotonic() > until:
            raise TimeoutError(f"{path} does not say {text!r} after {seconds:.0f} s")
        time.sleep(0.1)


def is_first_rank() -> bool:
    """Whether this process is the one that writes files and prints."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def leave() -> None:
    """Destroy the process groups at the end of a run.

    A process that leaves them to the end of the interpreter can abort there: a thread of gloo may still hold the last
    tensor of a collective, and freeing it needs the interpreter.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def explain(main: Callable[[], None]) -> None:
    """Run a script's main, and leave its process groups.

    A ValueError raised by this package, which is about the user's input, is one line on the terminal. One from
    elsewhere keeps its traceback; so do all with FIBERPO_TRACEBACK=1.
    """
    try:
        main()
    except ValueError as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
        if os.environ.get("FIBERPO_TRACEBACK") or not raised_in.startswith("nemo_fiberpo"):
            raise
        sys.exit(f"error: {error}")
    leave()
