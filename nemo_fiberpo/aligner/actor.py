"""The policy: NeMo-Aligner's PPO actor with the exact FiberPO step in place of its per-micro-batch loss."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from nemo_aligner.models.nlp.gpt.megatron_gpt_ppo_actor import MegatronGPTActorModel
from nemo_aligner.utils.distributed import broadcast_2d_tensor_within_pp
from nemo_aligner.utils.text_generation_utils import (
    TrackLengthGPTModelTextGenerationStrategy,
    verify_is_valid_and_clamp_range_,
)
from nemo_aligner.utils.train_utils import set_sync_funcs
from omegaconf import DictConfig
from torch import Tensor

from nemo_fiberpo.aligner.generation import GUARD_ROWS, Lockstep, add_guard_rows, expert_group, generate_tokens
from nemo_fiberpo.megatron.groups import Reducer, TokenAxes
from nemo_fiberpo.megatron.logprobs import next_token_log_probs
from nemo_fiberpo.megatron.step import Policy, StepResult, StepTokens, exact_step
from nemo_fiberpo.objective import Cells, Hierarchy

PROMPT_COLUMNS = ("prompt_index",)


@dataclass(frozen=True)
class Minibatch:
    """This rank's samples of one optimizer step.

    tokens              int64 [b, s], prompt and response, padded on the right
    old_log_probs       float [b, s - 1]; entry t belongs to the token at position t + 1, here and below
    init_log_probs      the same under the initial policy, or None where no KL penalty asks for it
    weights             float64 [b, s - 1], w_i with global denominators, 0 at masked tokens
    weighted_advantage  float64 [b, s - 1], w_i A_i
    mask                bool [b, s - 1], live tokens
    cells               of the b (s - 1) flattened tokens, shared with the other ranks
    """

    tokens: Tensor
    old_log_probs: Tensor
    init_log_probs: Tensor | None
    weights: Tensor
    weighted_advantage: Tensor
    mask: Tensor
    cells: Cells


def check_model(cfg: DictConfig) -> None:
    """ValueError naming the first field of the model config that the actor cannot run with, and what to use instead."""
    optimizer = cfg.get("optim", {}).get("name")
    if optimizer != "mcore_distributed_optim":
        raise ValueError(
            f"model.optim.name: {optimizer!r}; use mcore_distributed_optim, whose gradient scale the exact step knows"
        )
    if not cfg.get("mcore_gpt", False):
        raise ValueError("model.mcore_gpt: must be true; NeMo's own GPT without Megatron-core is not supported")
    for name, instead in (
        ("context_parallel_size", "a larger tensor_model_parallel_size"),
        ("virtual_pipeline_model_parallel_size", "pipeline_model_parallel_size alone"),
        ("sequence_parallel", "tensor_model_parallel_size alone"),
    ):
        if (cfg.get(name) or 1) > 1 or cfg.get(name) is True:
            raise ValueError(f"model.{name}: {cfg.get(name)} is not supported by this actor; use {instead}")
    if cfg.get("num_moe_experts") and (cfg.get("tensor_model_parallel_size") or 1) > 1:
        raise ValueError(
            f"model.tensor_model_parallel_size: {cfg.tensor_model_parallel_size} with a mixture of experts; "
            "Megatron-core trains that only under sequence parallelism, which this actor does not support; use "
            "expert_model_parallel_size or pipeline_model_parallel_size"
        )
    for name, off in (("offload_adam_states", False), ("entropy_bonus", 0.0)):
        if cfg.ppo.get(name):
            raise ValueError(f"model.ppo.{name}: {cfg.ppo.get(name)} is not supported by this actor; set it to {off}")
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    for name, value in neutral.items():
        given = cfg.ppo.sampling_params.get(name, value)
        if given != value:
            raise ValueError(
                f"model.ppo.sampling_params.{name}: {given}; must be {value}: the ratios compare the policy with "
                "itself, and responses sampled from another distribution are not its own"
            )


class FiberPOActor(MegatronGPTActorModel):
    """MegatronGPTActorModel whose training step is `megatron.step.exact_step`, and whose generation keeps
    expert-parallel ranks in lockstep.

    Reads the sections of the model config that its parent reads (`model.ppo` holds generation and micro-batch sizes).
    SPMD: as its parent; samples are sharded over data parallel ranks (expert-parallel ones included), replicated over
    tensor and pipeline parallel ones.
    """

    def __init__(self, cfg: DictConfig, trainer: Any):
        check_model(cfg)
        super().__init__(cfg, trainer)
        self._reducer: Reducer | None = None
        self._sampling_params: dict[str, Any]

    @property
    def reducer(self) -> Reducer:
        """The one reducer of the job; counts its calls and bytes."""
        if self._reducer is None:
            self._reducer = Reducer(TokenAxes.from_parallel_state())
        return self._reducer

    @property
    def max_new_tokens(self) -> int:
        """Longest response, in tokens, the one that ends it included."""
        return int(self._length_params["max_length"])

    @contextlib.contextmanager
    def decoding(self, *, greedy: bool) -> Iterator[None]:
        """Generate greedily, or with the configured sampling parameters, within the block."""
        before = self._sampling_params
        self._sampling_params = before | {"use_greedy": greedy or before["use_greedy"]}
        try:
            yield
        finally:
            self._sampling_params = before

    def token_log_probs(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """[b, s - 1] log-probs of tokens[:, 1:] from vocabulary-parallel logits [b, s, V/tp], at the sampling
        temperature 1."""
        return next_token_log_probs(logits, tokens, mpu.get_tensor_model_parallel_group())

    def get_logprob_output_only_func(self, inference_only: bool = True) -> Callable:
        """The parent's forward-only function, with the log-probs of the exact step: old log-probs and pass A are one
        function, so that on the first step after a rollout the log-ratio is 0."""
        forward = self.get_forward_output_only_func()

        def step(data: Any, module: torch.nn.Module):
            batch = next(data)
            output, _ = forward(iter([batch]), module)
            return output, lambda output, non_loss_data=True: self.token_log_probs(output, batch[0].to(output.device))

        return step

    def get_loss_and_metrics(self, batch: dict, forward_only: bool):
        """Not how FiberPO trains: a loss per micro-batch would gate each by its own part of a cell's aggregate."""
        raise NotImplementedError("FiberPOActor trains by step(): the gates need the whole batch of the optimizer step")

    def step(
        self, minibatch: Minibatch, hierarchy: Hierarchy, *, on_policy: bool, kl_coefficient: float = 0.0
    ) -> StepResult:
        """Accumulate the gradient of one optimizer step: -J of the global minibatch, plus the KL penalty.

        Call between `prepare_for_training_step` and `finish_training_step`. SPMD: every rank calls it.
        """
        size = self.cfg.micro_batch_size
        set_sync_funcs(self, forward_only=False)
        policy = Policy(
            model=self.model,
            forward_backward_func=get_forward_backward_func(),
            forward=self._forward,
            log_probs=lambda output, batch: self.token_log_probs(output, batch["tokens"]),
            seq_length=minibatch.tokens.shape[1],
            micro_batch_size=size,
        )
        tokens = StepTokens(
            old_log_probs=minibatch.old_log_probs.split(size),
            weighted_advantage=minibatch.weighted_advantage.split(size),
            mask=minibatch.mask.split(size),
            cells=minibatch.cells,
        )
        penalty = functools.partial(kl_penalty, coefficient=kl_coefficient) if kl_coefficient > 0 else None
        return exact_step(
            policy,
            self._microbatches(minibatch, penalty is not None),
            tokens,
            hierarchy,
            self.reducer,
            on_policy=on_policy,
            extra_loss=penalty,
        )

    def _microbatches(self, minibatch: Minibatch, with_penalty: bool) -> Sequence[dict[str, Tensor]]:
        columns = {"tokens": minibatch.tokens}
        if with_penalty:
            assert minibatch.init_log_probs is not None
            columns |= {
                "init_log_probs": minibatch.init_log_probs,
                "weights": minibatch.weights,
                "mask": minibatch.mask,
            }
        parts = {name: value.split(self.cfg.micro_batch_size) for name, value in columns.items()}
        return [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]

    def _forward(self, batch: dict[str, Tensor], module: torch.nn.Module) -> Tensor:
        tokens = batch["tokens"].cuda(non_blocking=True)
        batch["tokens"] = tokens
        # Megatron-core makes the causal mask itself; right padding is behind every live token.
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return module(tokens, positions, None)

    @torch.no_grad()
    def infer(self, inference_batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Generate one response per row of `text`; as the parent's, with the columns that follow the prompt."""
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
            strategy = TrackLengthGPTModelTextGenerationStrategy(model=self, context_lengths=lengths, max_length=new)
        else:
            tokens, lengths = add_guard_rows(tokens, lengths, self.tokenizer.eos_id, new, group)
            strategy = Lockstep(self, lengths, new, group)
        output = generate_tokens(self, tokens, lengths, strategy, self._sampling_params, self._length_params)
        response_tokens = broadcast_2d_tensor_within_pp(output, dtype=torch.long)
        # NeMo goes on until the longest prompt has its max_length new tokens; the others end at theirs.
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
        return {name: value[guards:] for name, value in columns.items()}


def kl_penalty(log_probs: Tensor, batch: dict[str, Tensor], *, coefficient: float) -> Tensor:
    """coefficient * sum_i w_i (exp(d_i) - d_i - 1), d = log pi_init - log pi: the k3 estimate of KL(pi || pi_init).

    All [b, s - 1]; masked tokens add nothing, whatever their values. The exponent is limited to 20 nats (a ratio of
    5e8), beyond which float32 would overflow.
    """
    mask = batch["mask"].to(log_probs.device)
    difference = batch["init_log_probs"].to(log_probs.device) - log_probs
    difference = torch.where(mask, difference, 0.0)
    estimate = difference.clamp(max=20.0).exp() - difference - 1.0
    return coefficient * (batch["weights"].to(log_probs.device) * estimate.double()).sum()
