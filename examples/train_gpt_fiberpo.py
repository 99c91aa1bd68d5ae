"""Train a policy with FiberPO.

    torchrun --nproc_per_node 2 examples/train_gpt_fiberpo.py --config-name quickstart
    torchrun ... examples/train_gpt_fiberpo.py --config-name my_run hierarchy=trajectory algorithm.rl_steps=200
    torchrun ... examples/train_gpt_fiberpo.py --config-name my_run hierarchy.strata.domain.budget.pos=0.03

    python examples/train_gpt_fiberpo.py --check --config-name my_run     only check the config

It is NeMo-Aligner's PPO script with four differences: there is no critic; prompts carry a domain and come several
times each; the actor's optimizer step is exact over the whole global batch; held-out prompts are evaluated before and
after. A run that was stopped goes on from its newest checkpoint when the same command is given again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from nemo_fiberpo.aligner import launch
from nemo_fiberpo.aligner.settings import algorithm_settings, data_settings, reward_settings
from nemo_fiberpo.objective import check_gating

launch.register_resolvers()
CHECK_ONLY = "--check" in sys.argv


def run(cfg: DictConfig) -> None:
    # The config is checked before anything is imported that takes time.
    hierarchy = launch.check_sections(cfg)
    settings, data, reward = algorithm_settings(cfg), data_settings(cfg), reward_settings(cfg)
    check_gating(settings.gating, hierarchy)
    settings.check_passes([stratum.name for stratum in hierarchy.active], cfg.model.micro_batch_size)
    launch.check_same_run(cfg)
    if CHECK_ONLY:
        return
    launch.start(cfg)

    from nemo_aligner.utils import parallel_state
    from nemo_aligner.utils.train_script_utils import init_distributed, init_peft, retrieve_custom_trainer_state_dict
    from nemo_aligner.utils.utils import retrieve_model_state_dict_in_cpu

    from nemo_fiberpo.aligner.prompts import PromptDataset
    from nemo_fiberpo.aligner.rewards import make_reward_model

    # The policy, as NeMo-Aligner's scripts build it.
    trainer = launch.build_lightning_trainer(cfg)
    actor = launch.load_actor(cfg, trainer)
    init_peft(actor, cfg.model)
    if settings.kl.coefficient > 0 and cfg.model.peft.peft_scheme == "none":
        actor.init_policy_state_dict = retrieve_model_state_dict_in_cpu(actor, cfg.model.get("megatron_amp_O2", False))
    restored = retrieve_custom_trainer_state_dict(trainer) if trainer.ckpt_path is not None else None
    init_distributed(trainer, actor, cfg.model.get("transformer_engine", False))
    context_parallel_size = cfg.model.get("context_parallel_size") or 1
    launch.check_batches(cfg, parallel_state.get_data_parallel_world_size(), context_parallel_size)

    # Prompts and what grades the responses.
    own_graders = tuple(reward.graders or ())
    train = PromptDataset(
        data.train, actor.tokenizer, data.max_prompt_length, too_long=data.too_long, own_graders=own_graders
    )
    heldout = None
    if data.heldout is not None:
        heldout = PromptDataset(
            data.heldout,
            actor.tokenizer,
            data.max_prompt_length,
            domains=train.domains,
            first_index=len(train),
            too_long=data.too_long,
            own_graders=own_graders,
        )
    if train.dropped and launch.is_first_rank():
        print(f"{data.train}: dropped {train.dropped} prompts of more than {data.max_prompt_length} tokens")
    records = train.records + (heldout.records if heldout is not None else [])
    reward_model = make_reward_model(reward, records, actor.tokenizer)

    try:
        train_and_evaluate(cfg, trainer, actor, restored, hierarchy, settings, data, train, heldout, reward_model)
    finally:
        reward_model.close()


def train_and_evaluate(cfg, trainer, actor, restored, hierarchy, settings, data, train, heldout, reward_model) -> None:
    """Optimizer, checkpoint and logs; then held-out reward before, training, held-out reward after."""
    from nemo_aligner.utils.distributed import Timer
    from nemo_aligner.utils.train_script_utils import CustomLoggerWrapper

    from nemo_fiberpo.aligner.evaluation import mean_rewards, write_rows
    from nemo_fiberpo.aligner.loggers import MetricsFile, Progress
    from nemo_fiberpo.aligner.prompts import make_collate
    from nemo_fiberpo.aligner.report import format_table, make_report
    from nemo_fiberpo.aligner.trainer import FiberPOTrainer

    optimizer, scheduler, checkpoints = launch.initialise(cfg, trainer, actor, train, settings.total_steps(len(train)))
    reward_model.start()
    run_dir = Path(cfg.run_dir)
    metrics_file = MetricsFile(run_dir / "metrics.jsonl") if launch.is_first_rank() else None
    loggers = [*trainer.loggers, metrics_file] if metrics_file is not None else list(trainer.loggers)
    collate = make_collate(actor.tokenizer.eos_id, actor.max_new_tokens)
    fiberpo = FiberPOTrainer(
        settings=settings,
        hierarchy=hierarchy,
        prompts=train,
        heldout=heldout,
        heldout_modes=("sampled", "greedy") if data.heldout_greedy else ("sampled",),
        cfg=cfg.trainer.ppo,
        model=actor,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader_builder=launch.prompt_loader(cfg, train, collate),
        val_dataloader_builder=None,
        collate_fn=collate,
        rm_critic=reward_model,
        logger=CustomLoggerWrapper(loggers),
        ckpt_callback=checkpoints,
        run_timer=Timer(cfg.exp_manager.get("max_time_per_run")),
    )
    if launch.is_first_rank():
        loggers.append(Progress(fiberpo.max_steps))
        launch.remember_run(cfg)
    fiberpo.logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    if restored is not None:
        fiberpo.load_state_dict(restored)
    if metrics_file is not None:
        metrics_file.rewind(fiberpo.step)

    def evaluate(moment: str) -> None:
        if heldout is None:
            return
        rows = fiberpo.evaluate_heldout()
        if launch.is_first_rank():
            write_rows(run_dir / f"heldout_{moment}.jsonl", rows)
            means = ", ".join(f"{name} {mean:.3f}" for name, mean in mean_rewards(rows, "sampled").items())
            print(f"held-out reward {moment}: {means}", flush=True)

    if fiberpo.step == 0:
        evaluate("before")
    fiberpo.fit()
    if fiberpo.step < fiberpo.max_steps:
        if launch.is_first_rank():
            print(f"stopped at RL step {fiberpo.step} of {fiberpo.max_steps}; the same command goes on from here")
        return
    evaluate("after")
    if launch.is_first_rank():
        table = make_report(run_dir, title=cfg.name)
        print(format_table(table) if table else "")
        print(f"wrote {run_dir}/report.png and metrics.jsonl; TensorBoard log and checkpoints are in {run_dir}/nemo")


@hydra.main(version_base=None, config_path="../conf", config_name="quickstart")
def main(cfg: DictConfig) -> None:
    launch.explain(lambda: run(cfg))


if __name__ == "__main__":
    sys.argv[1:] = launch.overrides(argument for argument in sys.argv[1:] if argument != "--check")
    main()
