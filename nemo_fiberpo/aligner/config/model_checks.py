"""What the actor does not support, found in the model config before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor

from nemo_fiberpo.aligner.config.precision import check_precision
from nemo_fiberpo.labelling.expert_partitions import COLUMN, ExpertPartitions
from nemo_fiberpo.logits import check_choice
from nemo_fiberpo.megatron import cpu
from nemo_fiberpo.megatron.all_forward import refuse_unkept
from nemo_fiberpo.megatron.routing import chosen_layers
from nemo_fiberpo.megatron.schedule import refuse_inexact
from nemo_fiberpo.values import nearest


def check_model(cfg: DictConfig) -> None:
    """ValueError naming the first unsupported field of the model config, and what to use instead."""
    for problem in model_problems(cfg, cpu.installed()):
        raise ValueError(problem)


def check_all_forward(cfg: DictConfig, on_host: bool = False) -> None:
    """ValueError naming the first field of the model config that `algorithm.passes: all_forward` does not support."""
    try:
        refuse_unkept(cfg, on_host)  # the fields have the names that Megatron's config has
    except ValueError as error:
        raise ValueError(f"algorithm.passes: all_forward, but model.{error}") from None


def recompute_warnings(cfg: DictConfig) -> list[str]:
    """A line where `algorithm.passes: all_forward` holds all activations of all micro-batches, and what to set."""
    if cfg.get("activations_checkpoint_granularity") == "full":
        return []
    return [
        "algorithm.passes: all_forward holds the activations of all micro-batches of an optimizer step at once; set "
        "model.activations_checkpoint_granularity to full, activations_checkpoint_method to uniform and "
        "activations_checkpoint_num_layers to 1, algorithm.kept_on to host, or passes to 2 where memory is short "
        "(`fiberpo plan` estimates it)"
    ]


def model_problems(cfg: DictConfig, on_cpu: bool) -> Iterator[str]:
    """A message for every unsupported field."""
    optimizer = cfg.get("optim", {}).get("name")
    if optimizer != "mcore_distributed_optim":
        yield (
            f"model.optim.name: {optimizer!r}; use mcore_distributed_optim, whose gradient scale the exact step knows"
        )
    if not cfg.get("mcore_gpt", False):
        yield "model.mcore_gpt: must be true; NeMo's own GPT without Megatron-core is not supported"
    if cfg.get("precision") is not None and not OmegaConf.is_interpolation(cfg, "precision"):
        yield from _problem("", check_precision, cfg.precision, "model.precision")
    virtual = cfg.get("virtual_pipeline_model_parallel_size")
    if (virtual or 1) > 1:
        yield (
            f"model.virtual_pipeline_model_parallel_size: {virtual}; NeMo cannot generate with virtual stages; set it "
            "to null and use only pipeline_model_parallel_size"
        )
    tensor_parallel = (cfg.get("tensor_model_parallel_size") or 1) > 1
    if cfg.get("sequence_parallel") and not tensor_parallel:
        yield "model.sequence_parallel: true, but tensor_model_parallel_size is 1; set it to false"
    if cfg.get("num_moe_experts") and tensor_parallel and not cfg.get("sequence_parallel"):
        yield (
            f"model.sequence_parallel: must be true with a mixture of experts and tensor_model_parallel_size = "
            f"{cfg.tensor_model_parallel_size}; Megatron-core supports tensor-parallel experts only so"
        )
    yield from _dispatcher_problems(cfg)
    if (cfg.get("context_parallel_size") or 1) > 1:
        if not cfg.get("transformer_engine", True) and not on_cpu:
            yield (f"model.context_parallel_size: {cfg.context_parallel_size} needs transformer_engine: true on a GPU")
        if cfg.ppo.get("trt_llm", {}).get("enable"):
            yield (
                f"model.context_parallel_size: {cfg.context_parallel_size} does not support generation by "
                "TensorRT-LLM; set model.ppo.trt_llm.enable to false"
            )
    for name, off in (("offload_adam_states", False), ("entropy_bonus", 0.0), ("ratio_eps", 0.0)):
        if cfg.ppo.get(name):
            yield f"model.ppo.{name}: {cfg.ppo.get(name)} is not supported by this actor; set it to {off}"
    yield from _problem("", check_choice, cfg.get("logprobs") or "auto", "model.logprobs")
    yield from _problem("model.", refuse_inexact, cfg)  # the fields have the names that Megatron's config has
    yield from _sampling_problems(cfg.ppo)
    yield from _adapter_problems(cfg.get("peft") or {}, on_cpu)


def _problem(prefix: str, check: Callable[..., Any], *values: Any) -> Iterator[str]:
    """The message of the ValueError that `check` raises for these values, if it does."""
    try:
        check(*values)
    except ValueError as error:
        yield f"{prefix}{error}"


def _adapter_problems(peft: Any, on_cpu: bool) -> Iterator[str]:
    scheme = peft.get("peft_scheme", "none")
    if scheme not in ("none", "lora"):
        yield f"model.peft.peft_scheme: {scheme!r} is unknown{nearest(str(scheme), ('none', 'lora'))}"
    elif scheme == "lora" and on_cpu:
        yield "model.peft.peft_scheme: lora needs Transformer Engine, on a GPU; set it to none to train all weights"
    elif scheme == "lora":
        dropout = (peft.get("lora_tuning") or {}).get("adapter_dropout")
        if isinstance(dropout, bool) or dropout != 0:
            yield (
                f"model.peft.lora_tuning.adapter_dropout: {dropout!r}; must be 0.0: the exact step runs the forward "
                "pass twice, and both must be the same function"
            )


_OTHER = "responses must be samples of the policy itself, since ratios are relative to it"
_SAMPLING: dict[str, tuple[Any, str]] = {
    "use_greedy": (False, "all responses to a prompt would be equal and their advantages 0; see data.heldout_greedy"),
    "temperature": (1.0, _OTHER),
    "top_k": (0, _OTHER),
    "top_p": (1.0, _OTHER),
    "repetition_penalty": (1.0, _OTHER),
    "all_probs": (False, "nothing here reads them; log-probs are computed in the training layout"),
    "compute_logprob": (False, "nothing here reads them; log-probs are computed in the training layout"),
}
"""The required value of each key of `sampling_params`, and why. Only `add_BOS` and `end_strings` are free."""
_LENGTHS: dict[str, tuple[Any, str]] = {
    "min_length": (0, "it masks the end-of-sequence token, so responses would not be samples of the policy")
}


def _sampling_problems(ppo: DictConfig) -> Iterator[str]:
    """Keys by which responses would not be samples of the policy, or that nothing reads."""
    sections = (
        ("sampling_params", _SAMPLING, ("add_BOS", "end_strings")),
        ("length_params", _LENGTHS, ("max_length",)),
    )
    for section, fixed, free in sections:
        given = ppo.get(section) or {}
        for name in given:
            if name not in (*fixed, *free):
                yield f"model.ppo.{section}.{name}: unknown key{nearest(name, (*fixed, *free))}"
        for name, (value, reason) in fixed.items():
            # True == 1 in Python, but true is not a valid temperature.
            if name in given and (given[name] != value or isinstance(given[name], bool) != isinstance(value, bool)):
                yield f"model.ppo.{section}.{name}: {given[name]!r}; must be {value}: {reason}"
    sampling = ppo.get("sampling_params") or {}
    if not isinstance(sampling.get("add_BOS", False), bool):
        yield f"model.ppo.sampling_params.add_BOS: must be true or false, got {sampling['add_BOS']!r}"
    ends = sampling.get("end_strings", [])
    if not isinstance(ends, list | ListConfig) or not all(isinstance(end, str) and end for end in ends):
        yield f"model.ppo.sampling_params.end_strings: must be a list of texts, got {ends!r}"


def first_token(model: DictConfig, tokenizer: Any) -> int | None:
    """The BOS token that every prompt begins with if `add_BOS` is set, else None. ValueError if there is none."""
    if not model.ppo.sampling_params.get("add_BOS", False):
        return None
    token = tokenizer.bos_id
    if token is None or not 0 <= token < tokenizer.vocab_size:
        raise ValueError(
            "model.ppo.sampling_params.add_BOS: true, but the policy's tokenizer has no BOS token; set it to false"
        )
    return int(token)


def check_vocabulary(cfg: DictConfig, tokenizer: Any, padded: int) -> None:
    """ValueError if the tokenizer has more tokens than the embedding has rows, or an invalid EOS token.

    padded  rows of the embedding unless `override_vocab_size` sets them
    """
    size, end = tokenizer.vocab_size, tokenizer.eos_id
    rows = cfg.get("override_vocab_size") or padded
    if size > rows:
        raise ValueError(
            f"model.tokenizer: {size} tokens, but the policy's embedding has {rows} rows (override_vocab_size); use "
            "the policy's own tokenizer"
        )
    if end is None or not 0 <= end < size:
        raise ValueError(
            f"model.tokenizer: the end-of-sequence token has the id {end}, which is not among its {size} tokens, so no "
            "response could end"
        )


def partition_table(partitions: ExpertPartitions, model: DictConfig) -> tuple[Tensor, tuple[str, ...]]:
    """The partition of each expert, int64 [experts], and the partitions' names.

    Raises ValueError naming the field for a dense policy, and as `ExpertPartitions.table` and `chosen_layers`.
    """
    experts = model.get("num_moe_experts")
    if not experts:
        raise ValueError(
            f"hierarchy: needs the column {COLUMN!r}, but the policy is dense (model.num_moe_experts is not set); use "
            "a hierarchy without it"
        )
    if model.get("num_layers"):
        fields = {"num_moe_experts": experts, "moe_layer_freq": model.get("moe_layer_freq") or 1}
        chosen_layers(SimpleNamespace(num_layers=model.num_layers, **fields), partitions.layers)
    return partitions.table(experts, model.get("expert_model_parallel_size") or 1)


def _dispatcher_problems(cfg: DictConfig) -> Iterator[str]:
    """Megatron-core 0.11.0 unsorts tokens wrongly after the all-to-all if experts are split over TP and several are on
    a rank, unless Transformer Engine permutes them: the forward pass silently computes another function."""
    experts, expert_parallel = cfg.get("num_moe_experts") or 0, cfg.get("expert_model_parallel_size") or 1
    split = cfg.get("expert_tensor_parallel_size") or cfg.get("tensor_model_parallel_size") or 1
    if (
        cfg.get("moe_token_dispatcher_type") == "alltoall"
        and split > 1
        and 1 < expert_parallel < experts
        and not cfg.get("moe_permute_fusion")
    ):
        yield (
            "model.moe_token_dispatcher_type: alltoall is wrong in megatron-core 0.11.0 with experts "
            f"split over {split} tensor-parallel ranks and expert_model_parallel_size = {expert_parallel}; use "
            "allgather"
        )
