"""NeMo's objects of a run, built as NeMo-Aligner's own scripts build them. Nothing here concerns the algorithm."""

from __future__ import annotations

import gc
import logging as std_logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_fiberpo import cores
from nemo_fiberpo.aligner.config.checks import check_lengths
from nemo_fiberpo.aligner.config.sections import data_settings
from nemo_fiberpo.aligner.lifecycle.preemption import shield_resource_tracker
from nemo_fiberpo.logits import chosen
from nemo_fiberpo.megatron.timeouts import limit_collectives
from nemo_fiberpo.plan.lengths import response_length
from nemo_fiberpo.storage import pickles
from nemo_fiberpo.storage.policy_file import read_config


def start(cfg: DictConfig) -> None:
    """Prepare the process: restricted unpickling, the CPU mode if set, quiet logs on CPU, spawned child processes."""
    pickles.restrict()
    if cfg.cpu:
        from nemo_fiberpo import nemo_cpu

        nemo_cpu.install(packed_rows=bool(cfg.algorithm.packing))
    import torch.multiprocessing as mp
    from nemo.utils import logging

    mp.set_start_method("spawn", force=True)
    shield_resource_tracker()
    if cfg.cpu:
        # On a CPU they only report missing GPU features and every default of NeMo's config.
        logging.setLevel(logging.ERROR)
        for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "megatron"):
            std_logging.getLogger(name).setLevel(std_logging.ERROR)
        torch.set_num_threads(cores.of_this_rank())


def create_trainer(cfg: DictConfig) -> Any:
    """Lightning's trainer with NeMo's strategy, whose process groups have `collective_timeout`."""
    from nemo_aligner.utils.train_script_utils import resolve_and_create_trainer

    trainer = resolve_and_create_trainer(cfg, "ppo")
    # NeMo's builder does not pass the strategy's `timeout`, which applies to the default group and to Megatron's.
    if not hasattr(trainer.strategy, "_timeout"):
        raise ImportError(
            f"{type(trainer.strategy).__name__}._timeout does not exist in this version of Lightning; "
            "collective_timeout needs it"
        )
    trainer.strategy._timeout = timedelta(seconds=cfg.collective_timeout)
    return trainer


def build_lightning_trainer(cfg: DictConfig, checkpoint: Path | None) -> Any:
    """`create_trainer` with NeMo's experiment manager attached, resuming from `checkpoint` if there is one.

    exp_manager's own search finds only `-last` copies, and gives up if a killed run left two. By default it also makes
    the other ranks sleep for five seconds while the first one fills the log folder, from which they read nothing.
    """
    from nemo.utils.exp_manager import exp_manager

    from nemo_fiberpo.aligner.checkpoint.callback import make_callback

    trainer = create_trainer(cfg)
    given = OmegaConf.to_container(cfg.exp_manager, resolve=True)
    assert isinstance(given, dict)
    resume = {"resume_if_exists": False, "resume_from_checkpoint": None if checkpoint is None else str(checkpoint)}
    settings = {"seconds_to_sleep": 0} | given | resume | {"create_checkpoint_callback": False}
    exp_manager(trainer, OmegaConf.create(settings))
    if cfg.exp_manager.get("create_checkpoint_callback", True):
        trainer.callbacks.append(make_callback(cfg))
    return trainer


def load_actor(cfg: DictConfig, trainer: Any) -> Any:
    """The policy of `pretrained_checkpoint.restore_from_path`; the `model` section overrides its own config. ValueError
    as `policy_file.read_config`, before anything is merged."""
    from nemo_aligner.utils.utils import load_from_nemo, remove_overwritten_fields

    from nemo_fiberpo.aligner.actor import FiberPOActor

    path = cfg.pretrained_checkpoint.restore_from_path
    if not Path(path).exists():
        raise ValueError(f"pretrained_checkpoint.restore_from_path: {path} does not exist; give a .nemo file or folder")
    own = read_config(Path(path))
    remove_overwritten_fields(own, cfg.model.get("overwrite_base_config") or {})
    merged: Any = OmegaConf.merge(own, cfg.model)
    merged.pop("overwrite_base_config", None)
    cfg.model = merged
    check_lengths(cfg)
    with pickles.named(path):
        actor = load_from_nemo(FiberPOActor, cfg.model, trainer, strict=True, restore_path=path)
    model = cfg.model
    actor.logprobs = chosen(
        model.get("logprobs") or "auto",
        samples=max(model.micro_batch_size, model.ppo.forward_micro_batch_size),
        length=data_settings(cfg).max_prompt_length + response_length(model),
        vocabulary=model.get("override_vocab_size") or actor.padded_vocab_size,
        tensor_parallel=model.get("tensor_model_parallel_size") or 1,
        context_parallel=model.get("context_parallel_size") or 1,
    )
    return actor


def initialise(cfg: DictConfig, trainer: Any, actor: Any, dataset: Any, optimizer_steps: int) -> tuple[Any, Any, Any]:
    """Set up distribution, optimizer and scheduler, and restore the checkpoint if there is one.

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
    # NeMo requires a data loader; PPOTrainer builds its own and never reads this one.
    batch = divide(cfg.model.global_batch_size, parallel_state.get_data_parallel_world_size())
    with pickles.named(trainer.ckpt_path):
        init_using_ptl(trainer, actor, torch.utils.data.DataLoader(dataset, batch_size=batch), dataset)
    del actor._train_dl
    limit_collectives(cfg.collective_timeout)  # groups created without the strategy's timeout
    # PPOTrainer collects garbage several times a step; without this each pass walks all objects of NeMo's imports.
    gc.collect()
    gc.freeze()
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(actor)
    checkpoints = add_custom_checkpoint_callback(trainer, actor)
    if trainer.ckpt_path is not None and hasattr(checkpoints, "adopt"):
        checkpoints.adopt(trainer)
    return optimizer, scheduler, checkpoints


def prompt_loader(cfg: DictConfig, dataset: Any, collate: Callable) -> Callable:
    """The function by which PPOTrainer builds a data loader of prompts that starts at `consumed_samples`."""
    from nemo_fiberpo.aligner.generation.inference_layout import generation_axis
    from nemo_fiberpo.aligner.rollout.dealing import PromptSampler

    def build(consumed_samples: int) -> Any:
        rank, ranks, _ = generation_axis()
        sampler = PromptSampler(
            total_samples=len(dataset),
            consumed_samples=consumed_samples,
            micro_batch_size=cfg.model.ppo.rollout_micro_batch_size // cfg.algorithm.samples_per_prompt,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            drop_last=True,
            global_batch_size=cfg.algorithm.prompts_per_rollout,
            seed=cfg.model.seed,
        )
        return torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)

    return build
