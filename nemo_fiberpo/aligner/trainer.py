"""The training loop: PPOTrainer of NeMo-Aligner with prompt groups, whole-group minibatches and the exact step."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from nemo_aligner.algorithms.ppo import PPOTrainer
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.parallel_state import trt_llm_reshard_region
from nemo_aligner.utils.server_utils import FutureResult
from nemo_aligner.utils.utils import cpu_dict
from torch import Tensor

from nemo_fiberpo.aligner import finite
from nemo_fiberpo.aligner.config.algorithm import AlgorithmSettings
from nemo_fiberpo.aligner.config.model_checks import recompute_warnings
from nemo_fiberpo.aligner.data.prompts import PromptDataset
from nemo_fiberpo.aligner.generation.engine_log_probs import ENGINE
from nemo_fiberpo.aligner.generation.inference_layout import generation_axis
from nemo_fiberpo.aligner.generation.lockstep import deterministic
from nemo_fiberpo.aligner.rewards.reward_model import check_failures, zero_failures
from nemo_fiberpo.aligner.rollout.advantages import ESTIMATORS
from nemo_fiberpo.aligner.rollout.agreement import agreed_minibatches
from nemo_fiberpo.aligner.rollout.dealing import grouped_rollout, repeated_prompts, response_mask
from nemo_fiberpo.aligner.rollout.evaluation import evaluate, mean_rewards
from nemo_fiberpo.aligner.rollout.metrics import first_sample, rollout_metrics, step_metrics
from nemo_fiberpo.aligner.rollout.minibatch import Minibatch
from nemo_fiberpo.aligner.rollout.response_labels import ResponseLabels
from nemo_fiberpo.aligner.rollout.strata import StrataLabels
from nemo_fiberpo.budget_warnings import log_budget_warnings, overrun_warnings
from nemo_fiberpo.diagnostics.entropy import entropy_metrics
from nemo_fiberpo.labelling.token_labels import IGNORED, TokenLabels
from nemo_fiberpo.megatron import cpu
from nemo_fiberpo.megatron.exchange import exchange_notes, non_finite
from nemo_fiberpo.megatron.step import StepResult
from nemo_fiberpo.objective import Hierarchy, check_gating, correction_metrics
from nemo_fiberpo.objective.kernels import compile_passes
from nemo_fiberpo.rewards import OK


class FiberPOTrainer(PPOTrainer):
    """PPOTrainer with prompt groups as rollouts and exact FiberPO optimizer steps.

    Differences from its parent: several samples per prompt; minibatches of whole prompt groups; group-relative
    advantages instead of a critic's; old log-probs, cells and weights fixed once per rollout; the gradient of the whole
    minibatch with global denominators, not a mean of micro-batch means; truncated responses are trained on unless
    `truncated: mask`. `fit`, checkpoints, timers and loggers are the parent's.

    SPMD: one instance per rank. Samples are sharded over data-parallel ranks, replicated over tensor and pipeline ones.
    """

    def __init__(
        self,
        *,
        settings: AlgorithmSettings,
        hierarchy: Hierarchy,
        prompts: PromptDataset,
        heldout: PromptDataset | None = None,
        heldout_modes: Sequence[str] = ("sampled",),
        token_labels: TokenLabels | None = None,
        **parent: Any,
    ):
        self.settings, self.hierarchy, self.prompts = settings, hierarchy, prompts
        compile_passes("auto" if settings.compile == "auto" else str(int(settings.compile)))
        self.heldout, self.heldout_modes = heldout, heldout_modes
        if "greedy" in heldout_modes and parent["model"].use_trtllm_generation:
            raise ValueError("data.heldout_greedy: true, but TensorRT-LLM only samples; set it to false")
        if settings.rollout_correction.active:
            parent["model"].record_log_probs()
        if len(prompts) < settings.prompts_per_rollout:
            raise ValueError(
                f"algorithm.prompts_per_rollout: {settings.prompts_per_rollout}, but data.train has "
                f"{len(prompts)} prompts"
            )
        for data in (prompts, heldout):
            if data is not None:
                data.check_tokens(parent["model"].tokenizer.vocab_size)
        experts = parent["model"].experts
        check_gating(settings.gating_map, hierarchy, () if experts is None else experts.partitions.soft_columns)
        of_tokens = None if token_labels is None else token_labels.cells
        self.strata = StrataLabels(hierarchy, prompts, () if experts is None else experts.names, of_tokens)
        self.strata.check()
        self._response_labels: ResponseLabels | None = None
        if token_labels is not None:
            self._response_labels = ResponseLabels(token_labels, parent["model"].tokenizer, prompts)
        super().__init__(**parent, batch_iterator_cls=repeated_prompts(settings.samples_per_prompt))
        if settings.packing and not self.model.cfg.get("transformer_engine", True) and not cpu.installed():
            raise ValueError("algorithm.packing: true needs model.transformer_engine: true on a GPU")
        if settings.all_forward and settings.kept_on == "device" and not cpu.installed():
            log_budget_warnings(recompute_warnings(self.model.cfg))
        self._rollout_cls = grouped_rollout(settings.optimizer_steps, whole_groups=settings.whole_groups)
        self._minibatches: list[Minibatch] = []
        self._overrun: set[str] = set()

    def _run_inference(self, dataloader_builder: Any, consumed_samples: int, is_validation: bool):
        """One rollout: generate, grade, gather, deal whole prompt groups to minibatches and ranks, compute old
        log-probs.

        Returns this rank's samples and the metrics of the whole rollout.
        """
        context = trt_llm_reshard_region if self.trtllm_reshard else nullcontext
        with context(), deterministic(self.model.cfg.seed, self.step, generation_axis()[0]):
            rollout = self._generate(dataloader_builder, consumed_samples)
        failed = int((rollout["grader_failed"] != OK).sum())
        check_failures(failed, len(rollout["grader_failed"]), self.rm_critic.max_failed, self.rm_critic.reasons)
        estimate = ESTIMATORS[self.settings.advantage]
        rollout["advantage"] = estimate(rollout["rewards"], rollout["prompt_index"], rollout["valid"].bool())
        local = rollout.chunk(
            rank=parallel_state.get_data_parallel_rank(),
            split_size=parallel_state.get_data_parallel_world_size(),
            seed=self.model.cfg.seed + self.step,
        )
        sequences = local["response_tokens"], local["response_lengths"], self.settings.packing
        with self.timer("logprobs"):
            for name, column in self.model.old_policy(*sequences).items():
                local[name] = column
        if self.compute_init_policy_kl and not is_validation:
            with self.timer("init_logprobs"):
                local["init_logprobs"] = self.model.init_log_probs(*sequences)
        return local, cpu_dict(self.compute_rollout_metrics(rollout))

    def _generate(self, dataloader_builder: Any, consumed_samples: int) -> Any:
        """All samples of the rollout on every rank, with rewards and whether they count."""
        dataloader = dataloader_builder(consumed_samples=consumed_samples)
        sampler = dataloader.batch_sampler
        batches = self.batch_iterator_cls(
            iter(sampler),
            sampler.global_batch_size // (sampler.micro_batch_size * generation_axis()[1]),
            dataloader.dataset,
            self.collate_fn,
        )
        samples: list[Any] = []
        futures: list[Any] = []
        problem, names = None, None
        try:
            with self.timer("generate"):
                for batch in batches:
                    samples.append(self.model.infer(batch))
                    futures.append(self.rm_critic.infer_rm_critic(samples[-1]))
                    if self._response_labels is not None:
                        self._response_labels.add_to(samples[-1])
            with self.timer("reward_wait"):
                for sample, future in zip(samples, futures, strict=True):
                    self._add_rewards(sample, future)
            names = self._response_labels.names if self._response_labels is not None else None
        except Exception as error:  # sent to the others, which are about to gather the rollout
            traceback.print_exc()
            problem = f"{type(error).__name__}: {error}"
        facts = {"prompts in data.train": len(self.prompts), "batches of prompts": len(samples)}
        of_ranks = exchange_notes(names, self.model.reducer.axes, facts, problem)
        if self._response_labels is not None:
            self.strata.of_rollout = self._response_labels.agree(samples, of_ranks)
        return self._rollout_cls.from_rollout_batches(
            samples, eos_id=self.model.tokenizer.eos_id, rollout_batch_seq_length=self.cfg.rollout_batch_seq_length
        ).gather_and_balance_globally()

    def _add_rewards(self, sample: dict[str, Tensor], future: Any) -> None:
        rewards, _ = future.result() if isinstance(future, FutureResult) else future
        sample["rewards"], sample["valid"] = zero_failures(
            rewards, sample["grader_failed"], self.rm_critic.drops_failures
        )

    def generate_ppo_data(self, rollout_batch: Mapping[str, Tensor]):
        """Build the minibatches of the optimizer steps; collective, agrees on cells and denominators.

        The columns stay with the trainer, in rows; NeMo-Aligner gets a batch that determines the number of minibatches.
        """
        tokens, log_probs = rollout_batch["response_tokens"], rollout_batch["logprobs"]
        mask = response_mask(rollout_batch["prompt_lengths"], rollout_batch["response_lengths"], tokens.shape[1] - 1)
        keep = rollout_batch["valid"].bool()
        if self.settings.truncated == "mask":
            keep = keep & rollout_batch["is_end"].bool()
        mask = mask & keep[:, None]
        if IGNORED in rollout_batch:
            mask = mask & (rollout_batch[IGNORED] == 0)
        advantage = rollout_batch["advantage"][:, None].expand(mask.shape)
        problem = non_finite("old log-probs", log_probs, mask) or non_finite("advantage", advantage, mask)
        if "init_logprobs" in rollout_batch:
            problem = problem or non_finite("initial policy's log-probs", rollout_batch["init_logprobs"], mask)
        if self.settings.rollout_correction.active:
            problem = problem or non_finite("log-probs of generation", rollout_batch[ENGINE], mask)
        columns = dict(rollout_batch) | {"mask": mask}
        self._minibatches = agreed_minibatches(columns, problem, self.model, self.strata, self.hierarchy, self.settings)
        metrics = entropy_metrics(columns, self.strata.names, self.model.reducer)
        sums = [entry.correction for entry in self._minibatches if entry.correction is not None]
        if sums:
            corrected = correction_metrics(self.model.reducer(torch.stack(sums).sum(0)))
            metrics |= {f"rollout_correction/{name}": value for name, value in corrected.items()}
        return {"response_tokens": tokens}, metrics

    def run_training(self, dataloader_iter: Iterator[Mapping[str, Tensor]]):
        """The optimizer steps of one rollout: `epochs` passes over its minibatches."""
        self.model.prepare_for_training()
        assert len(list(dataloader_iter)) == len(self._minibatches) == self.settings.optimizer_steps
        metrics: dict[str, float] = {}
        for epoch in range(self.settings.epochs):
            for place, minibatch in enumerate(self._minibatches):
                metrics, result = self._optimizer_step(minibatch)
                if epoch == 0 and place == 1:
                    self._warn_of_overrun(result)
                self.logger.log_metrics(
                    metrics | {"rl_step": self.step}, step=self.ppo_optimization_step, prefix="train_optim/"
                )
                if result.report is not None:
                    counts = result.report.histograms().items()
                    histograms = {f"train_optim/gates/{name}_histogram": bins for name, bins in counts}
                    self.logger.apply_fn("log_histograms", self.step, self.ppo_optimization_step, histograms)
                self.ppo_optimization_step += 1
        self._minibatches = []
        self.model.finish_training()
        self.optimizer.zero_grad()
        return metrics.get("loss"), metrics

    def _warn_of_overrun(self, result: StepResult) -> None:
        """Warn once about each stratum whose gates are closed by the second optimizer step of a rollout."""
        if result.report is None or self.settings.gating_map is not None:
            return
        found = overrun_warnings(result.report)
        log_budget_warnings(line for name, line in found.items() if name not in self._overrun)
        self._overrun |= set(found)

    def _optimizer_step(self, minibatch: Minibatch) -> tuple[dict[str, float], StepResult]:
        calls = self.model.reducer.calls
        self.optimizer.zero_grad()
        self.model.prepare_for_training_step()
        result = self.model.step(
            minibatch,
            self.hierarchy,
            gating=self.settings.gating_map,
            use_min=self.settings.use_min,
            kl_coefficient=self.settings.kl.coefficient,
            on_policy=self.settings.on_policy,
            kept_on=self.settings.kept_on if self.settings.all_forward else None,
        )
        self.model.finish_training_step()
        lr = self.optimizer.param_groups[0]["lr"]
        # Numbered as in metrics.jsonl.
        grad_norm = finite.step(self.optimizer, f"optimizer step {self.ppo_optimization_step} of RL step {self.step}")
        self.scheduler.step()
        metrics = {"grad_norm": grad_norm, "lr": lr, "on_policy": float(result.report is None)}
        metrics |= {"gate_all_reduces": float(self.model.reducer.calls - calls)}
        metrics |= step_metrics(result, minibatch, self.model, penalised=self.settings.kl.coefficient > 0)
        if result.second_share is not None:
            metrics["second_pass"] = result.second_share
        all_forward = self.settings.all_forward and result.report is not None
        if minibatch.microbatch_cells is not None or result.second_share == 0.0 or all_forward:
            # One pass has nothing to compare.
            del metrics["recompute_error"]
        if result.loss is not None:
            metrics["loss"] = result.loss
        if result.report is not None:
            metrics |= {f"gates/{name}": value for name, value in result.report.metrics().items()}
        return metrics, result

    def compute_rollout_metrics(self, rollout_batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Metrics of the whole rollout: rewards, lengths, truncation and grader failures, overall and per domain.

        `rollout_size` counts prompts: NeMo-Aligner adds it to `consumed_samples`, by which the sampler reads prompts.
        """
        batch = {name: column.cpu() for name, column in rollout_batch.items()}
        used = [self.prompts.records[index] for index in batch["prompt_index"].unique().tolist()]
        self.logger.apply_fn("log_prompts", self.step, [record.line for record in used])
        size = batch["prompt_index"].numel() // self.settings.samples_per_prompt
        metrics = rollout_metrics(batch, self.prompts, self.rm_critic.drops_failures)
        return metrics | {"rollout_size": size, "table": first_sample(batch, self.model.tokenizer)}

    def evaluate_heldout(self) -> list[dict[str, Any]]:
        """One graded response per held-out prompt and mode, from the same random numbers at every call."""
        assert self.heldout is not None
        size = self.model.cfg.ppo.rollout_micro_batch_size
        seed = self.model.cfg.seed
        return evaluate(self.model, self.rm_critic, self.heldout, batch=size, seed=seed, modes=self.heldout_modes)

    @torch.no_grad()
    def run_validation(self) -> dict[str, Any]:
        """Held-out rewards, logged by `fit` every `val_check_interval` RL steps. `fit` also validates when it stops
        early; such an evaluation is skipped, since only interrupted runs would log it."""
        if self.step % self.settings.val_check_interval and self.step != self.max_steps:
            return {"table": {"reward": float("nan"), "prompt": "", "response": ""}}
        assert self.heldout is not None
        rows = self.evaluate_heldout()
        metrics: dict[str, Any] = {}
        for mode in self.heldout_modes:
            for domain, reward in mean_rewards(rows, mode).items():
                metrics["rewards" if (domain, mode) == ("all", "sampled") else f"reward/{mode}/{domain}"] = reward
        first = rows[0]
        prompt = self.heldout.records[first["prompt_index"]].prompt
        return metrics | {"table": {"reward": first["reward"], "prompt": prompt, "response": first["response"]}}
