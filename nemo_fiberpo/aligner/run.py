"""A training run, from its config to its report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from nemo_fiberpo.aligner import build
from nemo_fiberpo.aligner.checkpoint.resume import find_checkpoint
from nemo_fiberpo.aligner.checkpoint.run_record import RunRecord
from nemo_fiberpo.aligner.config.checks import check_batches, check_graders, read_training_config
from nemo_fiberpo.aligner.config.model_checks import first_token
from nemo_fiberpo.aligner.lifecycle import preemption
from nemo_fiberpo.aligner.lifecycle.first_rank import is_first_rank
from nemo_fiberpo.prompts.records import PromptRecord, load_prompts
from nemo_fiberpo.storage.policy_file import read_config as read_policy_config

if TYPE_CHECKING:
    from nemo_fiberpo.aligner.actor import FiberPOActor
    from nemo_fiberpo.aligner.data.prompts import PromptDataset
    from nemo_fiberpo.aligner.trainer import FiberPOTrainer


class Run:
    """One run, as seen by one of its ranks. SPMD: every rank calls the same methods, in the order in which they stand.

    It follows NeMo-Aligner's PPO script, except that there is no critic, prompts have a domain and several samples
    each, the optimizer step is exact over the whole global batch, and held-out prompts are evaluated before and after
    training. The constructor checks the config, before slow imports: ValueError naming the field.
    """

    actor: FiberPOActor
    trainer: FiberPOTrainer
    prompts: PromptDataset
    heldout: PromptDataset | None

    def __init__(self, cfg: DictConfig):
        self.cfg, self.config = cfg, read_training_config(cfg)
        check_graders(self.config.rewards.graders)
        self.record = RunRecord(cfg)
        self.run_dir = Path(cfg.run_dir)
        self._reward_model: Any = None
        self._restored: Mapping[str, int] | None = None  # the trainer's state in the checkpoint

    def check(self) -> Iterator[str]:
        """Check the files that the config names, without loading them; yields a line for each. ValueError naming the
        file or the key."""
        self.record.check()  # training does this under the run's lock
        yield f"the config: {', '.join(str(key) for key in self.cfg if self.cfg[key] is not None)}"
        for key, path in (("data.train", self.config.data.train), ("data.heldout", self.config.data.heldout)):
            if path is not None and Path(path).exists():
                yield f"{key}: {len(self._read_prompts(path))} prompts in {path}"
            elif path is not None:
                yield f"{key}: not checked: {path} does not exist"
        policy = Path(self.cfg.pretrained_checkpoint.restore_from_path)
        if policy.exists():
            read_policy_config(policy)
            yield f"pretrained_checkpoint.restore_from_path: the config in {policy}; its weights not checked"
        else:
            yield f"pretrained_checkpoint.restore_from_path: not checked: {policy} does not exist"
        newest = self.record.checkpoint
        state = f"would resume from RL step {newest['step']}" if newest else "would start at RL step 0"
        yield f"run_dir: {self.run_dir}: {state}"

    def load(self) -> None:
        """Choose the checkpoint to resume from, then load the prompts, the policy and the reward model.

        Raises ValueError on every rank if one of them is invalid, and `preemption.Stopped` if the run is to end.
        """
        found = find_checkpoint(self.cfg, self.record)
        self._restored = dict(found[1].state) if found else None
        # Before the policy is loaded, which may take minutes, so that a mistake in the prompts is reported early.
        data = self.config.data
        train = self._read_prompts(data.train)
        heldout = self._read_prompts(data.heldout) if data.heldout is not None else None
        _print_rank_0(f"loading the policy {self.cfg.pretrained_checkpoint.restore_from_path}")
        build.start(self.cfg)
        self._load_policy(found[0] if found else None)
        self._stop_before_training()
        self._tokenize(train, heldout)
        from nemo_fiberpo.aligner.rewards.reward_model import make_reward_model

        records = self.prompts.records + (self.heldout.records if self.heldout is not None else [])
        self._reward_model = make_reward_model(self.config.rewards, records, self.actor.tokenizer)

    def _load_policy(self, checkpoint: Path | None) -> None:
        from nemo_aligner.utils import parallel_state
        from nemo_aligner.utils.train_script_utils import init_distributed, init_peft
        from nemo_aligner.utils.utils import retrieve_model_state_dict_in_cpu

        cfg = self.cfg
        self._lightning = build.build_lightning_trainer(cfg, checkpoint)
        self.actor = actor = build.load_actor(cfg, self._lightning)
        if self.config.partitions is not None:
            actor.read_experts(self.config.partitions)
        init_peft(actor, cfg.model)
        if self.config.algorithm.kl.coefficient > 0 and cfg.model.peft.peft_scheme == "none":
            actor.init_policy_state_dict = retrieve_model_state_dict_in_cpu(
                actor, cfg.model.get("megatron_amp_O2", False)
            )
        init_distributed(self._lightning, actor, cfg.model.get("transformer_engine", False))
        check_batches(cfg, parallel_state.get_data_parallel_world_size(), cfg.model.get("context_parallel_size") or 1)

    def _read_prompts(self, path: str) -> list[PromptRecord]:
        return load_prompts(path, tuple(self.config.rewards.graders or ()))

    def _tokenize(self, train: Sequence[PromptRecord], heldout: Sequence[PromptRecord] | None) -> None:
        from nemo_fiberpo.aligner.data.prompts import PromptDataset

        data, tokenizer = self.config.data, self.actor.tokenizer
        options: dict[str, Any] = {
            "too_long": data.too_long,
            "bos_id": first_token(self.actor.cfg, tokenizer),
        }
        self.prompts = PromptDataset(train, tokenizer, data.max_prompt_length, **options)
        dropped = f", {self.prompts.dropped} of more than {data.max_prompt_length} tokens dropped"
        _print_rank_0(f"{data.train}: {len(self.prompts)} prompts{dropped if self.prompts.dropped else ''}")
        self.heldout = None
        if heldout is not None:
            options |= {"domains": self.prompts.domains, "first_index": len(self.prompts)}
            self.heldout = PromptDataset(heldout, tokenizer, data.max_prompt_length, **options)

    def build(self) -> None:
        """Build the trainer with its optimizer, graders and loggers, and restore their state from the checkpoint."""
        from nemo_fiberpo.aligner.loggers import MetricsFile, Progress, PromptsFile

        paths = self.run_dir / "metrics.jsonl", self.run_dir / "prompts.jsonl"
        files: list[Any] = [MetricsFile(paths[0]), PromptsFile(paths[1])] if is_first_rank() else []
        loggers = [*self._lightning.loggers, *files]
        self._build_trainer(loggers)
        self._reward_model.start()
        self._checkpoints.trainer_state = self.trainer.state_dict
        self._checkpoints.on_whole = self.record.note_checkpoint
        self._checkpoints.durable = paths
        self._checkpoints.run_id = lambda: self.record.id
        self.trainer.logger.log_hyperparams(OmegaConf.to_container(self.cfg, resolve=True))
        if self._restored is not None:
            self.trainer.load_state_dict(self._restored)
        if is_first_rank():
            step = self.trainer.step
            for key, (before, now) in self.record.remember(step).items():
                print(f"from RL step {step} on: {key} is {now!r}, was {before!r}", flush=True)
            for file in files:
                file.rewind(step)
            loggers.append(Progress(self.trainer.max_steps))
        self._stop_before_training()

    def _build_trainer(self, loggers: list[Any]) -> None:
        from nemo_aligner.utils.train_script_utils import CustomLoggerWrapper

        from nemo_fiberpo.aligner.data.prompts import collate_prompts
        from nemo_fiberpo.aligner.trainer import FiberPOTrainer

        cfg, actor, config = self.cfg, self.actor, self.config
        steps = config.algorithm.total_steps(len(self.prompts))
        optimizer, scheduler, checkpoints = build.initialise(cfg, self._lightning, actor, self.prompts, steps)
        self._checkpoints = checkpoints
        # Finalizes pending saves; None if exp_manager.create_checkpoint_callback is false.
        self._finish_saves: Callable[..., Any] | None = None
        if hasattr(checkpoints, "finish_saves"):
            self._finish_saves = partial(checkpoints.finish_saves, self._lightning)
        after_step = self._finish_saves or (lambda **_: None)
        collate = partial(collate_prompts, eos_id=actor.tokenizer.eos_id, generation_length=actor.max_new_tokens)
        self.trainer = FiberPOTrainer(
            settings=config.algorithm,
            hierarchy=config.hierarchy,
            prompts=self.prompts,
            heldout=self.heldout,
            heldout_modes=("sampled", "greedy") if config.data.heldout_greedy else ("sampled",),
            token_labels=config.token_labels,
            cfg=cfg.trainer.ppo,
            model=actor,
            optimizer=optimizer,
            scheduler=scheduler,
            train_dataloader_builder=build.prompt_loader(cfg, self.prompts, collate),
            val_dataloader_builder=None,
            collate_fn=collate,
            rm_critic=self._reward_model,
            logger=CustomLoggerWrapper(loggers),
            ckpt_callback=checkpoints,
            run_timer=preemption.RunTimer(cfg.exp_manager.get("max_time_per_run"), after_step=after_step),
        )

    def evaluate(self, moment: str) -> None:
        """Evaluate the held-out prompts, if any, into `heldout_<moment>.jsonl`."""
        from nemo_fiberpo.aligner.rollout.evaluation import mean_rewards, write_rows

        if self.heldout is None:
            return
        rows = self.trainer.evaluate_heldout()
        if is_first_rank():
            write_rows(self.run_dir / f"heldout_{moment}.jsonl", rows)
            means = ", ".join(f"{name} {mean:.3f}" for name, mean in mean_rewards(rows, "sampled").items())
            print(f"held-out reward {moment}: {means or 'no response could be graded'}", flush=True)

    def train(self) -> None:
        """All remaining RL steps, with an evaluation before the first. `preemption.Stopped`, after a save, if a signal
        or the time limit ends the run early."""
        if self.trainer.step == 0:
            self.evaluate("before")
            self._stop_before_training()
        self.trainer.fit()
        if self._finish_saves is not None:
            self._finish_saves(blocking=True)
        reason = self.trainer.run_timer.reason or preemption.agreed_reason()
        if reason is not None:
            stop_in_training(reason, self.trainer, self.config.algorithm.save_interval, self._finish_saves)
        if self._finish_saves is not None and self.config.algorithm.save_interval > 0:
            self._checkpoints.complete_policy(self._lightning, self.actor)

    def report(self) -> None:
        """Print the table of held-out rewards and write report.png. First rank."""
        from nemo_fiberpo.analysis.heldout import format_table
        from nemo_fiberpo.analysis.report import make_report

        if not is_first_rank():
            return
        table = make_report(self.run_dir, title=self.cfg.name)
        if self.heldout is not None:
            print(format_table(table) if table else "no held-out prompt was graded both before and after: no table")
        where = self.run_dir
        print(f"wrote {where}/report.png and metrics.jsonl; TensorBoard log and checkpoints are in {where}/nemo")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        """End the graders."""
        if self._reward_model is not None:
            self._reward_model.close()

    def _stop_before_training(self) -> None:
        """End the run here if a rank got a signal; there is nothing to save. Collective."""
        reason = preemption.agreed_reason()
        if reason is not None:
            at = f"RL step {self._restored['step']}" if self._restored else "the start"
            _print_rank_0(f"stopped by {reason} before training: nothing to save; the same command resumes from {at}")
            raise preemption.Stopped


def stop_in_training(
    reason: str, trainer: Any, save_interval: int, finish_saves: Callable[..., Any] | None
) -> NoReturn:
    """End the run after an RL step, with a checkpoint. Collective.

    save_interval  `algorithm.save_interval`; if it is 0, `fit` has not saved
    finish_saves   finalizes pending saves; None without a checkpoint callback: nothing can be saved, the run failed
    """
    at = f"stopped by {reason} at RL step {trainer.step} of {trainer.max_steps}"
    if finish_saves is None:
        _print_rank_0(
            f"error: {at}: nothing is saved, exp_manager.create_checkpoint_callback is false; the same command starts "
            "over"
        )
        raise preemption.Stopped(resumable=False)
    if save_interval == 0:
        trainer.save()
        finish_saves(blocking=True)
    _print_rank_0(f"{at}: checkpoint saved; the same command resumes from here")
    raise preemption.Stopped


def _print_rank_0(line: str) -> None:
    if is_first_rank():
        print(line, flush=True)
