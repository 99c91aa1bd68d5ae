"""The policy: NeMo-Aligner's PPO actor with the exact FiberPO step in place of its per-micro-batch loss."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from nemo_aligner.models.nlp.gpt.megatron_gpt_ppo_actor import MegatronGPTActorModel
from nemo_aligner.utils.distributed import broadcast_2d_tensor_within_pp
from nemo_aligner.utils.text_generation_utils import (
    TrackLengthGPTModelTextGenerationStrategy,
    verify_is_valid_and_clamp_range_,
)
from nemo_aligner.utils.train_utils import set_sync_funcs
from nemo_aligner.utils.utils import adapter_control, cpu_weight_swap
from omegaconf import DictConfig
from torch import Tensor

from nemo_fiberpo.aligner.config.model_checks import check_model, check_vocabulary
from nemo_fiberpo.aligner.generation.engine_log_probs import (
    ENGINE,
    RecordingLockstep,
    RecordingStrategy,
    RecordsLogProbs,
)
from nemo_fiberpo.aligner.generation.inference_layout import config_without_sequence_parallel, whole_sequences
from nemo_fiberpo.aligner.generation.lockstep import GUARD_ROWS, Lockstep, add_guard_rows, expert_group, generate_tokens
from nemo_fiberpo.aligner.rollout.experts import ExpertLabels, watched
from nemo_fiberpo.aligner.rollout.minibatch import Minibatch
from nemo_fiberpo.megatron.all_forward import all_forward_step
from nemo_fiberpo.megatron.choice import StepChoice
from nemo_fiberpo.megatron.gpt import gpt_policy
from nemo_fiberpo.megatron.groups import Reducer, TokenAxes
from nemo_fiberpo.megatron.one_pass import one_pass_step
from nemo_fiberpo.megatron.penalty import kl_penalty
from nemo_fiberpo.megatron.sequences import Rows, balanced, length_multiple, packed_rows, packed_spans, padded_rows
from nemo_fiberpo.megatron.step import Policy, StepResult, StepTokens, current_log_probs, exact_step
from nemo_fiberpo.objective import ExpertPartitions, Hierarchy, RatioGating

PROMPT_COLUMNS = ("prompt_index",)


class FiberPOActor(MegatronGPTActorModel):
    """MegatronGPTActorModel whose training step is `megatron.step.exact_step`, and which generates in lockstep over
    expert-parallel ranks.

    Reads the sections of the model config that its parent reads (`model.ppo`: generation and micro-batch sizes).
    Log-probs of the old and the initial policy are computed by the function that training uses, in the training layout.
    During generation every rank runs whole sequences, see `inference_layout`.

    SPMD: as its parent. Samples are sharded over data-parallel ranks (expert-parallel ones included) and replicated
    over tensor and pipeline ones; sequences are split over context-parallel ranks.
    """

    def __init__(self, cfg: DictConfig, trainer: Any):
        check_model(cfg)
        super().__init__(cfg, trainer)
        # Of the training layout; the config's own value is false during generation.
        self._sequence_parallel = bool(self.cfg.get("sequence_parallel", False))
        self._reducer: Reducer | None = None
        self._sampling_params: dict[str, Any]
        self._generating: contextlib.ExitStack | None = None
        self.experts: ExpertLabels | None = None
        self.logprobs = "auto"  # as in `gpt_policy`; `build.load_actor` decides it for all micro-batches of a run
        self.records_log_probs = False  # whether `infer` returns the log-probs of generation, in the column ENGINE
        # Optimizer steps begun so far, and at the time of the old log-probs.
        self._steps_begun, self._old_since = 0, -1
        self._choice = StepChoice()

    def _build_vocab(self) -> None:
        """The parent's, followed by a check, before anything is allocated."""
        super()._build_vocab()
        check_vocabulary(self.cfg, self.tokenizer, self.padded_vocab_size)

    @property
    def reducer(self) -> Reducer:
        """The job's reducer, which counts its calls and bytes."""
        if self._reducer is None:
            with self._training_layout():
                self._reducer = Reducer(TokenAxes.from_parallel_state())
        return self._reducer

    @property
    def max_new_tokens(self) -> int:
        """Longest response, in tokens, including the end-of-sequence token."""
        return int(self._length_params["max_length"])

    @contextlib.contextmanager
    def decoding(self, *, greedy: bool) -> Iterator[None]:
        """Within the block, decode greedily or with the configured sampling parameters."""
        before = self._sampling_params
        self._sampling_params = before | {"use_greedy": greedy or before["use_greedy"]}
        try:
            yield
        finally:
            self._sampling_params = before

    def _reset_sequence_parallelism_args(self) -> None:
        """Enter the generation layout; the parent's method leaves embeddings and context parallelism as they are."""
        if self._generating is None:
            self._generating = contextlib.ExitStack()
            self._generating.enter_context(whole_sequences(self.get_model_module_list()))
            self._generating.enter_context(config_without_sequence_parallel(self))

    def _restore_sequence_parallelism_args(self) -> None:
        """Leave the generation layout."""
        if self._generating is not None:
            self._generating.close()
            self._generating = None

    @contextlib.contextmanager
    def _training_layout(self) -> Iterator[None]:
        generating = self._generating is not None
        self._restore_sequence_parallelism_args()
        try:
            yield
        finally:
            if generating:
                self._reset_sequence_parallelism_args()

    def rows(
        self,
        tokens: Tensor,
        lengths: Tensor,
        size: int,
        packed: bool,
        counted: Tensor | None = None,
        together: int = 1,
    ) -> list[Rows]:
        """The micro-batches of this rank's samples, all of one width.

        tokens int64 [b, s], lengths [b] of the sequences, `size` samples per micro-batch, runs of `together` of them
        never apart; `counted`, bool [b], as in `padded_rows`. Padded rows keep the order of the samples. Packed rows
        are filled to about equal lengths and padded to the longest of any rank. SPMD: every rank calls this; one
        all-reduce if `packed`.
        """
        axes, real = self.reducer.axes, lengths.tolist()
        cp = axes.axis("cp")
        multiple = length_multiple(axes.axis("tp").size, cp.size, self._sequence_parallel)
        place: dict[str, Any] = {"cp_size": cp.size, "cp_rank": cp.rank, "multiple": multiple, "counted": counted}
        if not packed:
            order = torch.arange(len(tokens), device=tokens.device)
            return [padded_rows(tokens, samples, lengths=real, **place) for samples in order.split(size)]
        dealt = balanced(real, len(tokens) // size, together)
        widest = max(sum(packed_spans([real[i] for i in samples], multiple)) for samples in dealt)
        width = torch.tensor([widest], device=torch.cuda.current_device())
        torch.distributed.all_reduce(width, op=torch.distributed.ReduceOp.MAX, group=axes.group)
        return [packed_rows(tokens, real, torch.tensor(samples), seq_length=int(width), **place) for samples in dealt]

    def read_experts(self, partitions: ExpertPartitions) -> None:
        """Have `old_policy` label tokens by the experts they are routed to. ValueError as `partition_table` and
        `RoutingCapture`."""
        self.experts = ExpertLabels(partitions, self.cfg, self.get_model_module_list())

    def record_log_probs(self) -> None:
        """Have `infer` return the sampling passes' log-probs, in the column ENGINE. ValueError if it cannot."""
        if self.use_trtllm_generation:
            raise ValueError(
                "algorithm.rollout_correction.kind: needs the log-probs of the engine that samples, and NeMo-Aligner's "
                "TensorRT-LLM generation returns tokens without them; set it to none, or model.ppo.trt_llm.enable to "
                "false"
            )
        self.records_log_probs = True

    def log_probs_of(self, tokens: Tensor, lengths: Tensor, packed: bool = False) -> Tensor:
        """Log-probs of tokens[:, 1:] under the current weights, float32 [b, s - 1], on every rank of the model.

        Computed by the function that training differentiates, pass A of the exact step, in the training layout.
        """
        return self._forward_columns(tokens, lengths, packed, None)["logprobs"]

    @torch.no_grad()
    def _forward_columns(
        self, tokens: Tensor, lengths: Tensor, packed: bool, experts: ExpertLabels | None
    ) -> dict[str, Tensor]:
        with self._training_layout():
            set_sync_funcs(self, forward_only=True)
            rows = self.rows(tokens, lengths, self.forward_micro_batch_size, packed)
            rows = [entry.to(torch.cuda.current_device()) for entry in rows]
            microbatches = [{"rows": entry} for entry in rows]
            with watched(experts, self._policy(rows), microbatches) as policy:
                values = current_log_probs(policy, microbatches)
            out = torch.zeros(len(tokens), tokens.shape[1] - 1, device=torch.cuda.current_device())
            for entry, value in zip(rows, values, strict=False):
                entry.put(value, out)
            # Only the last stage has log-probs, and each context-parallel rank only those of its own tokens.
            torch.distributed.all_reduce(out, group=mpu.get_context_parallel_group())
            torch.distributed.all_reduce(out, group=mpu.get_pipeline_model_parallel_group())
            columns = {"logprobs": out} | ({} if experts is None else experts.columns(rows, *out.shape))
        return {name: column.to(tokens.device) for name, column in columns.items()}

    def old_policy(self, tokens: Tensor, lengths: Tensor, packed: bool = False) -> dict[str, Tensor]:
        """Columns of the rollout's policy: `logprobs` (`log_probs_of`) and, after `read_experts`, the labels of
        `ExpertLabels.columns` from the same pass.

        Until the next optimizer step log-ratios are known to be 0, and `step` skips the pass that would measure them.
        """
        self._old_since = self._steps_begun
        return self._forward_columns(tokens, lengths, packed, self.experts)

    def init_log_probs(self, tokens: Tensor, lengths: Tensor, packed: bool = False) -> Tensor:
        """`log_probs_of` under the initial policy."""
        adapters = self.use_peft and self.init_policy_state_dict is None
        initial = (
            adapter_control(self)
            if adapters
            else cpu_weight_swap(self, self.init_policy_state_dict, megatron_amp_O2=self.megatron_amp_O2)
        )
        with initial:
            return self.log_probs_of(tokens, lengths, packed)

    def get_inference_log_probs(self, response_tokens: Tensor, forward_micro_batch_size: int | None = None) -> Tensor:
        """The parent's name for `log_probs_of`, for sequences without lengths."""
        return self.log_probs_of(response_tokens, torch.full((len(response_tokens),), response_tokens.shape[1]))

    def get_loss_and_metrics(self, batch: dict, forward_only: bool):
        """Not supported: a loss per micro-batch would gate each by its own part of a cell's aggregate."""
        raise NotImplementedError("FiberPOActor trains by step(): the gates need the whole batch of the optimizer step")

    def step(
        self,
        minibatch: Minibatch,
        hierarchy: Hierarchy,
        *,
        gating: RatioGating | None = None,
        use_min: bool = False,
        kl_coefficient: float = 0.0,
        on_policy: bool | None = None,
        kept_on: str | None = None,
    ) -> StepResult:
        """Accumulate the gradient of one optimizer step: -J of the global minibatch, plus the KL penalty.

        gating, use_min, on_policy   as in `exact_step`; on_policy None: whether no step has begun since `old_policy`
        kept_on                      "device" or "host": `all_forward_step` where the step is not on-policy

        Call between `prepare_for_training_step` and `finish_training_step`. SPMD: every rank calls it.
        """
        set_sync_funcs(self, forward_only=False)
        place, self._steps_begun = self._steps_begun - self._old_since, self._steps_begun + 1
        on_policy = place == 0 if on_policy is None else on_policy
        rows = [entry.to(torch.cuda.current_device()) for entry in minibatch.rows]
        microbatches: list[dict[str, Any]] = [{"rows": entry} for entry in rows]
        penalty = functools.partial(kl_penalty, coefficient=kl_coefficient) if kl_coefficient > 0 else None
        if penalty is not None:
            microbatches = [batch | more for batch, more in zip(microbatches, minibatch.penalty_columns(), strict=True)]
        tokens = StepTokens(minibatch.old_log_probs, minibatch.weighted_advantage, minibatch.mask, minibatch.cells)
        options: dict[str, Any] = {"gating": gating, "use_min": use_min, "extra_loss": penalty}
        with watched(self.experts if minibatch.expert_labels else None, self._policy(rows), microbatches) as policy:
            given, after = (policy, microbatches, tokens), (hierarchy, self.reducer)
            if minibatch.microbatch_cells is not None:
                return one_pass_step(*given, minibatch.microbatch_cells, *after, **options)
            if minibatch.guessed is not None and not on_policy:
                return self._choice.step(place, minibatch.guessed, *given, *after, **options)
            if kept_on is not None and not on_policy:
                return all_forward_step(*given, *after, **options, on_host=kept_on == "host")
            return exact_step(*given, *after, **options, on_policy=on_policy)

    def _policy(self, rows: Sequence[Rows]) -> Policy:
        group = mpu.get_tensor_model_parallel_group()
        return gpt_policy(self.model, rows, group, self.tokenizer.vocab_size, self.logprobs)

    @torch.no_grad()
    def infer(self, inference_batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Generate one response per row of `text`; as the parent's, plus the prompts' columns."""
        if self.use_trtllm_generation:
            rollout = super().infer(inference_batch)
        else:
            rollout = self._generate(inference_batch["text"].cuda(), inference_batch["length"].cuda())
        device = rollout["response_tokens"].device
        return rollout | {name: inference_batch[name].to(device) for name in PROMPT_COLUMNS}

    def _generate(self, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        group, new = expert_group(), self.max_new_tokens
        guards = 0 if group is None else GUARD_ROWS
        if group is None:
            plain = RecordingStrategy if self.records_log_probs else TrackLengthGPTModelTextGenerationStrategy
            strategy = plain(model=self, context_lengths=lengths, max_length=new)
        else:
            tokens, lengths = add_guard_rows(tokens, lengths, self.tokenizer.eos_id, new, group)
            strategy = (RecordingLockstep if self.records_log_probs else Lockstep)(self, lengths, new, group)
        output = generate_tokens(self, tokens, lengths, strategy, self._sampling_params, self._length_params)
        response_tokens = broadcast_2d_tensor_within_pp(output, dtype=torch.long)
        # NeMo generates until the longest prompt has max_length new tokens; the others end at theirs.
        response_lengths = torch.minimum(strategy.get_lengths(), lengths + new).clamp(max=response_tokens.shape[1])
        is_end = verify_is_valid_and_clamp_range_(
            response_tokens, response_lengths, strategy, self.tokenizer, self._sampling_params["end_strings"]
        )
        columns = {
            "response_tokens": response_tokens,
            "response_lengths": response_lengths,
            "prompt_lengths": lengths,
            "is_end": is_end,
        }
        if isinstance(strategy, RecordsLogProbs):
            columns[ENGINE] = strategy.log_probs(*response_tokens.shape)
        return {name: value[guards:] for name, value in columns.items()}
