"""What the actor cannot run, by the field of the model config that asks for it, before anything is built."""

from __future__ import annotations

from omegaconf import DictConfig

from nemo_fiberpo.megatron import cpu


def check_model(cfg: DictConfig) -> None:
    """ValueError naming the first field of the model config that the actor cannot run with, and what to use instead."""
    optimizer = cfg.get("optim", {}).get("name")
    if optimizer != "mcore_distributed_optim":
        raise ValueError(
            f"model.optim.name: {optimizer!r}; use mcore_distributed_optim, whose gradient scale the exact step knows"
        )
    if not cfg.get("mcore_gpt", False):
        raise ValueError("model.mcore_gpt: must be true; NeMo's own GPT without Megatron-core is not supported")
    virtual = cfg.get("virtual_pipeline_model_parallel_size")
    if (virtual or 1) > 1:
        raise ValueError(
            f"model.virtual_pipeline_model_parallel_size: {virtual}; NeMo cannot generate with virtual stages; set it "
            "to null and use pipeline_model_parallel_size alone"
        )
    tensor_parallel = (cfg.get("tensor_model_parallel_size") or 1) > 1
    if cfg.get("sequence_parallel") and not tensor_parallel:
        raise ValueError(
            "model.sequence_parallel: true splits what tensor-parallel ranks hold in common, but "
            "tensor_model_parallel_size is 1; set it to false"
        )
    if cfg.get("num_moe_experts") and tensor_parallel and not cfg.get("sequence_parallel"):
        raise ValueError(
            f"model.sequence_parallel: must be true with a mixture of experts and tensor_model_parallel_size = "
            f"{cfg.tensor_model_parallel_size}; Megatron-core trains experts with tensor parallelism in no other way"
        )
    _check_dispatcher(cfg)
    if (cfg.get("context_parallel_size") or 1) > 1:
        if not cfg.get("transformer_engine", True) and not cpu.installed():
            raise ValueError(
                f"model.context_parallel_size: {cfg.context_parallel_size} needs transformer_engine: true on a GPU"
            )
        if cfg.ppo.get("trt_llm", {}).get("enable"):
            raise ValueError(
                f"model.context_parallel_size: {cfg.context_parallel_size} does not go with generation by "
                "TensorRT-LLM; set model.ppo.trt_llm.enable to false"
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


def _check_dispatcher(cfg: DictConfig) -> None:
    """Megatron-core 0.11.0 sorts tokens back wrongly after the all-to-all where experts are split over TP and several
    are on a rank, unless Transformer Engine's permutation does it: the forward pass is silently another function."""
    experts, expert_parallel = cfg.get("num_moe_experts") or 0, cfg.get("expert_model_parallel_size") or 1
    split = cfg.get("expert_tensor_parallel_size") or cfg.get("tensor_model_parallel_size") or 1
    if (
        cfg.get("moe_token_dispatcher_type") == "alltoall"
        and split > 1
        and 1 < expert_parallel < experts
        and not cfg.get("moe_permute_fusion")
    ):
        raise ValueError(
            "model.moe_token_dispatcher_type: alltoall computes something else in megatron-core 0.11.0 with experts "
            f"split over {split} tensor-parallel ranks and expert_model_parallel_size = {expert_parallel}; use "
            "allgather"
        )
