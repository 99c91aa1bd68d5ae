"""Train a policy with FiberPO.

    torchrun --nproc_per_node 2 examples/train_gpt_fiberpo.py --config-name quickstart
    torchrun ... examples/train_gpt_fiberpo.py --config-name my_run hierarchy=trajectory algorithm.rl_steps=200
    torchrun ... examples/train_gpt_fiberpo.py --config-name my_run hierarchy.strata.domain.budget.pos=0.03

    python examples/train_gpt_fiberpo.py --check --config-name my_run     only check the config

It is NeMo-Aligner's PPO script with four differences: there is no critic; prompts carry a domain and come several
times each; the actor's optimizer step is exact over the whole global batch; held-out prompts are evaluated before and
after. A run that was stopped goes on from its newest whole checkpoint when the same command is given again; it exits
with status 75 when SIGUSR1, SIGTERM or its time limit stops it before its end.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from nemo_fiberpo.aligner import launch, preemption
from nemo_fiberpo.aligner.ending import explain
from nemo_fiberpo.aligner.model_checks import first_token
from nemo_fiberpo.aligner.resume import RunRecord
from nemo_fiberpo.aligner.resumption import find_checkpoint
from nemo_fiberpo.aligner.run_checks import check_files, check_graders, check_run
from nemo_fiberpo.aligner.settings import token_labels_section
from nemo_fiberpo.aligner.stopping import stop_before_training, stop_in_training

launch.prepare_hydra()
preemption.install(__name__)
CHECK_ONLY = "--check" in sys.argv


def run(cfg: DictConfig) -> None:
    # The config is checked before anything is imported that takes time.
    checked = check_run(cfg)
    check_graders(checked.reward.graders)
    hierarchy, partitions, settings = checked.hierarchy, checked.partitions, checked.settings
    data, reward = checked.data, checked.reward
    record = RunRecord(cfg)
    if CHECK_ONLY:
        record.check()  # else the first rank does, under the run's lock
        print(f"checked: {', '.join(str(key) for key in cfg if cfg[key] is not None)}")
        print("\n".join(check_files(cfg, checked)), flush=True)
        return
    found = find_checkpoint(cfg, record)
    launch.start(cfg)

    from nemo_aligner.utils import parallel_state
    from nemo_aligner.utils.train_script_utils import init_distributed, init_peft
    from nemo_aligner.utils.utils import retrieve_model_state_dict_in_cpu

    from nemo_fiberpo.aligner.rewards import make_reward_model

    # The policy, as NeMo-Aligner's scripts build it.
    trainer = launch.build_lightning_trainer(cfg, found[0] if found else None)
    actor = launch.load_actor(cfg, trainer)
    if partitions is not None:
        actor.read_experts(partitions)
    init_peft(actor, cfg.model)
    if settings.kl.coefficient > 0 and cfg.model.peft.peft_scheme == "none":
        actor.init_policy_state_dict = retrieve_model_state_dict_in_cpu(actor, cfg.model.get("megatron_amp_O2", False))
    restored = dict(found[1].state) if found else None
    init_distributed(trainer, actor, cfg.model.get("transformer_engine", False))
    stop_before_training(restored)
    context_parallel_size = cfg.model.get("context_parallel_size") or 1
    launch.check_batches(cfg, parallel_state.get_data_parallel_world_size(), context_parallel_size)

    bos_id = first_token(actor.cfg, actor.tokenizer)
    train, heldout = read_prompts(data, actor.tokenizer, tuple(reward.graders or ()), bos_id)
    records = train.records + (heldout.records if heldout is not None else [])
    reward_model = make_reward_model(reward, records, actor.tokenizer)

    try:
        train_and_evaluate(
            cfg, trainer, actor, restored, hierarchy, settings, data, train, heldout, reward_model, record
        )
    finally:
        reward_model.close()


def read_prompts(data, tokenizer, own_graders, bos_id):
    """The prompts to train on, and the held-out ones or None; all begin with `bos_id`, if any."""
    from nemo_fiberpo.aligner.prompts import PromptDataset

    options: dict[str, Any] = {"too_long": data.too_long, "own_graders": own_graders, "bos_id": bos_id}
    train = PromptDataset(data.train, tokenizer, data.max_prompt_length, **options)
    if train.dropped and launch.is_first_rank():
        print(f"{data.train}: dropped {train.dropped} prompts of more than {data.max_prompt_length} tokens")
    if data.heldout is None:
        return train, None
    own: dict[str, Any] = {"domains": train.domains, "first_index": len(train)}
    return train, PromptDataset(data.heldout, tokenizer, data.max_prompt_length, **own, **options)


def go_on(fiberpo, restored, record, files) -> None:
    """Put the trainer and the files of the run to where the checkpoint was saved."""
    if restored is not None:
        fiberpo.load_state_dict(restored)
    if launch.is_first_rank():
        for key, (before, now) in record.remember(fiberpo.step).items():
            print(f"from RL step {fiberpo.step} on {key} is {now!r}, before {before!r}", flush=True)
        for file in files:
            file.rewind(fiberpo.step)


def make_trainer(cfg, trainer, actor, hierarchy, settings, data, train, heldout, reward_model, loggers):
    """The trainer of the algorithm, with its optimizer; the checkpoint callback; and what completes saves under way,
    None where there is no such callback."""
    from nemo_aligner.utils.train_script_utils import CustomLoggerWrapper

    from nemo_fiberpo.aligner.prompts import make_collate
    from nemo_fiberpo.aligner.trainer import FiberPOTrainer

    optimizer, scheduler, checkpoints = launch.initialise(cfg, trainer, actor, train, settings.total_steps(len(train)))
    finish_saves = partial(checkpoints.finish_saves, trainer) if hasattr(checkpoints, "finish_saves") else None
    after_step = finish_saves or (lambda **_: None)
    collate = make_collate(actor.tokenizer.eos_id, actor.max_new_tokens)
    fiberpo = FiberPOTrainer(
        settings=settings,
        hierarchy=hierarchy,
        prompts=train,
        heldout=heldout,
        heldout_modes=("sampled", "greedy") if data.heldout_greedy else ("sampled",),
        token_labels=token_labels_section(cfg),
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
        run_timer=preemption.RunTimer(cfg.exp_manager.get("max_time_per_run"), after_step=after_step),
    )
    return fiberpo, checkpoints, finish_saves


def train_and_evaluate(
    cfg, trainer, actor, restored, hierarchy, settings, data, train, heldout, reward_model, record
) -> None:
    """Logs and checkpoint; then held-out reward before, training, held-out reward after."""
    from nemo_fiberpo.aligner.evaluation import mean_rewards, write_rows
    from nemo_fiberpo.aligner.loggers import MetricsFile, Progress, PromptsFile
    from nemo_fiberpo.analysis.heldout import format_table
    from nemo_fiberpo.analysis.report import make_report

    run_dir = Path(cfg.run_dir)
    paths = run_dir / "metrics.jsonl", run_dir / "prompts.jsonl"
    files = [MetricsFile(paths[0]), PromptsFile(paths[1])] if launch.is_first_rank() else []
    loggers = [*trainer.loggers, *files]
    fiberpo, checkpoints, finish_saves = make_trainer(
        cfg, trainer, actor, hierarchy, settings, data, train, heldout, reward_model, loggers
    )
    reward_model.start()
    checkpoints.trainer_state, checkpoints.on_whole, checkpoints.durable = (
        fiberpo.state_dict,
        record.note_checkpoint,
        paths,
    )
    checkpoints.run_id = lambda: record.id
    fiberpo.logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    go_on(fiberpo, restored, record, files)
    if launch.is_first_rank():
        loggers.append(Progress(fiberpo.max_steps))

    def evaluate(moment: str) -> None:
        if heldout is None:
            return
        rows = fiberpo.evaluate_heldout()
        if launch.is_first_rank():
            write_rows(run_dir / f"heldout_{moment}.jsonl", rows)
            means = ", ".join(f"{name} {mean:.3f}" for name, mean in mean_rewards(rows, "sampled").items())
            print(f"held-out reward {moment}: {means or 'no answer could be graded'}", flush=True)

    stop_before_training(restored)
    if fiberpo.step == 0:
        evaluate("before")
        stop_before_training(restored)
    fiberpo.fit()
    if finish_saves is not None:
        finish_saves(blocking=True)
    reason = fiberpo.run_timer.reason or preemption.agreed_reason()
    if reason is not None:
        stop_in_training(reason, fiberpo, settings.save_interval, finish_saves)
    if finish_saves is not None and settings.save_interval > 0:
        checkpoints.complete_policy(trainer, actor)
    evaluate("after")
    if launch.is_first_rank():
        table = make_report(run_dir, title=cfg.name)
        if heldout is not None:
            print(format_table(table) if table else "no held-out prompt was graded both before and after: no table")
        print(f"wrote {run_dir}/report.png and metrics.jsonl; TensorBoard log and checkpoints are in {run_dir}/nemo")


@hydra.main(version_base=None, config_path="../conf", config_name="quickstart")
def main(cfg: DictConfig) -> None:
    launch.find_modules_beside_the_config()
    explain(lambda: run(cfg))


if __name__ == "__main__":
    sys.argv[1:] = launch.command_line(argument for argument in sys.argv[1:] if argument != "--check")
    main()
