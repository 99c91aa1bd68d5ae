"""A tiny Qwen3 or Qwen3-MoE under verl's Megatron engine on CPUs, with the same weights on every layout."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemo_fiberpo import load_hierarchy
from nemo_fiberpo.verification import shards
from tests.objective.reference import evaluate
from tests.support.distributed import run
from tests.verl import host
from tests.verl.host import GROUPS, RESPONSE, SAMPLES, VOCABULARY, Batch, mini_batch
from tests.verl.slow import label_lists, token_weight

LAYERS, MICRO_BATCHES = 2, 4
TP: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP: dict[str, Any] = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "Qwen3": {
        "one rank": {},
        "DP 2": {},
        "DP 2, distributed optimizer": {"use_distributed_optimizer": True},
        "TP 2 and SP": TP,
        "CP 2": {"context_parallel_size": 2},
        "PP 2": {"pipeline_model_parallel_size": 2},
    },
    "Qwen3-MoE": {
        "one rank": {},
        "EP 2": EP,
        "EP 2, distributed optimizer": EP | {"use_distributed_optimizer": True},
        "TP 2 and SP": TP,
        "TP 2 and SP, EP 2": TP | EP,
    },
}
"""Settings of verl's Megatron engine, by model and layout. All but the first of each have two ranks."""


def save_model(folder: Any, model: str) -> None:
    """The config of a model of two layers; its weights are those of `load_weights`."""
    if model == "Qwen3-MoE":
        host.save_model(folder)
        return
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)


def by_halves(name: str, full: Tensor, number: int) -> Tensor:
    """A gated layer's rows as tensor-parallel ranks hold them, one after the other: each has a part of both halves."""
    if "linear_fc1" not in name or number == 1:
        return full
    gate, up = full.chunk(2)
    return torch.cat([part for pair in zip(gate.chunk(number), up.chunk(number), strict=True) for part in pair])


def load_weights(model: list[Any]) -> None:
    """Weights that depend on a parameter's name alone, and this rank's part of them."""
    for name, parameter in shards.named_parameters(model):
        rank, number = shards.shard_place(name)
        full = by_halves(name, shards.full_parameter(name, parameter, number), number)
        parameter.data.copy_(shards.shard_of(full, parameter, rank, number))


def install() -> None:
    """What Megatron and mbridge lack on a CPU: devices, layers without Transformer Engine, and their weights' names."""
    from mbridge.core.bridge import Bridge
    from mbridge.core.llm_bridge import LLMBridge
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    from nemo_fiberpo.megatron import cpu
    from nemo_fiberpo.megatron.cpu_layers import local_block_spec

    cpu.install()
    LLMBridge._get_transformer_layer_spec = lambda self, vp_stage=None: local_block_spec(
        self.config, get_num_layers_to_build(self.config, vp_stage=vp_stage)
    )
    Bridge.load_weights = lambda self, models, *_, **__: load_weights(models)


def make_worker(folder: Any, micro_batch_size: int, policy_loss: dict[str, Any], **layout: Any) -> Any:
    """verl's own worker with the actor's loss, on the ranks of a layout."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import (
        HFModelConfig,
        McoreActorConfig,
        McoreEngineConfig,
        McoreOptimizerConfig,
        TrainingWorkerConfig,
    )
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    from nemo_fiberpo.integrations.verl import FiberPOConfig

    engine = McoreEngineConfig(
        vanilla_mbridge=True, use_dynamic_bsz=False, micro_batch_size_per_gpu=micro_batch_size,
        infer_micro_batch_size_per_gpu=micro_batch_size,
        override_transformer_config={"attention_backend": "unfused", "bias_activation_fusion": False,
                                     "apply_rope_fusion": False, "gradient_accumulation_fusion": False,
                                     "masked_softmax_fusion": False, "bias_dropout_fusion": False,
                                     "moe_grouped_gemm": False},
        **{"use_distributed_optimizer": False, **layout},
    )  # fmt: skip
    object.__setattr__(engine, "dtype", "float32")  # its check wants half precision, in which all is rounding
    config = McoreActorConfig(
        strategy="megatron", rollout_n=SAMPLES, ppo_micro_batch_size_per_gpu=micro_batch_size, megatron=engine,
        policy_loss=FiberPOConfig(**policy_loss), loss_agg_mode="seq-mean-token-mean",
    )  # fmt: skip
    optimizer = McoreOptimizerConfig(lr=1e-3, clip_grad=1e9, total_training_steps=10, lr_decay_steps=10)
    model = HFModelConfig(path=str(folder), load_tokenizer=False, use_remove_padding=True)
    model.tokenizer = PadToken()
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=engine,
            optimizer_config=optimizer,
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.flops_counter = None  # knows GPUs only
    worker.reset()
    worker.set_loss_fn(partial(ppo_loss, config=config))
    return worker


class PadToken:
    """All that the Megatron engine asks of a tokenizer."""

    pad_token_id = 0


def one_step(worker: Any, batch: Batch, step: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """A mini-batch of this rank's rows: its parts of the gradients and, after the optimizer step, of the parameters;
    metrics where verl has them.

    step   in place of verl's `train_mini_batch`, given the mini-batch
    """
    gradients: dict[str, Any] = {}
    engine = worker.engine
    optimizer_step = engine.optimizer_step

    def recording() -> Any:
        gradients.update(shards.gradients(list(engine.module)))
        return optimizer_step()

    engine.optimizer_step = recording
    rank, size, rows = engine.get_data_parallel_rank(), engine.get_data_parallel_size(), len(batch.uid)
    data = mini_batch(batch.rows(list(range(rank, rows, size))), rows)
    output = (step or worker.train_mini_batch)(data)
    metrics = output["metrics"] if output is not None and step is None else None
    parameters = {
        name: dataclasses.replace(gradients[name], value=parameter.detach().clone())
        for name, parameter in shards.named_parameters(list(engine.module))
    }
    return {"gradients": gradients, "parameters": parameters, "metrics": metrics}


@dataclasses.dataclass
class Expected:
    """The batch with old log-probs near those of the model, J, the gradient of -J, and parameters after a step."""

    batch: Batch
    value: float
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


def reference(rank: int, world_size: int, folder: Any, batch: Batch, hierarchy: Any) -> Expected:
    """One process: coefficients by the slow loops, and verl's own engine with -sum_j c_j log pi_j as its loss."""
    from verl.workers.utils.padding import no_padding_2_padding

    prepare(rank, world_size)
    rows = len(batch.uid)
    worker = make_worker(folder, rows, {"loss_mode": "vanilla"})
    settings = {"micro_batch_size_per_gpu": rows, "use_dynamic_bsz": False, "use_remove_padding": True}
    data = batch.tensordict(**settings)
    with worker.engine.eval_mode():
        output = worker.engine.infer_batch(data, None)
    log_probs = no_padding_2_padding(output["model_output"]["log_probs"], data).detach().double()
    live = batch.response_mask.bool()
    noise = torch.Generator().manual_seed(3)
    shift = 0.1 * torch.randn(rows, RESPONSE, generator=noise) + 0.03 * torch.randn(rows, 1, generator=noise)
    batch = dataclasses.replace(batch, old_log_probs=((log_probs - shift) * live).float())
    ell = torch.where(live, log_probs - batch.old_log_probs.double(), 0.0)
    weight = token_weight(live, "seq-mean-token-mean") * batch.advantages.double()
    labels, names = label_lists(batch)
    flat = (value.flatten().tolist() for value in (ell, weight, live))
    outcome = evaluate(load_hierarchy(hierarchy), labels, *flat, names)
    c = torch.tensor(outcome.coefficients, dtype=torch.float64).view(live.shape)

    def loss(model_output: Any, data: Any, dp_group: Any) -> Any:
        return -(c * no_padding_2_padding(model_output["log_probs"], data)).sum(), {}

    def step(data: Any) -> None:
        data = batch.tensordict(**settings)
        with worker.engine.train_mode():
            worker.engine.train_batch(data, loss)

    found = one_step(worker, batch, step)
    whole = ({name: part.value for name, part in found[kind].items()} for kind in ("gradients", "parameters"))
    return Expected(batch, outcome.value, *whole)


def prepare(rank: int, world_size: int) -> None:
    import nemo_fiberpo.integrations.verl  # noqa: F401  before verl's worker asks for an engine

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    install()


def step_on_layout(
    rank: int, world_size: int, folder: Any, batch: Batch, micro_batch_size: int, layout: dict[str, Any], hierarchy: Any
) -> dict[str, Any]:
    prepare(rank, world_size)
    worker = make_worker(folder, micro_batch_size, {"loss_mode": "fiberpo", "hierarchy": hierarchy}, **layout)
    return one_step(worker, batch)


@dataclasses.dataclass
class Comparison:
    """A layout beside the reference: the largest relative error of any gradient and whose it is, the largest difference
    of any parameter after the step, and verl's metrics."""

    gradient: float
    name: str
    parameter: float
    metrics: dict[str, Any]


def compare(folder: Any, expected: Expected, hierarchy: Any, model: str, layout: str) -> Comparison:
    axes, ranks = LAYOUTS[model][layout], 1 if layout == "one rank" else 2
    sharded = {"tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"} & set(axes)
    size = GROUPS * SAMPLES // MICRO_BATCHES // (1 if sharded else ranks)
    results = run(step_on_layout, ranks, folder, expected.batch, size, axes, hierarchy, timeout=240)
    number = {name: part.number for result in results for name, part in result["gradients"].items()}
    gradients, parameters = (
        {name: by_halves(name, value, number[name]) for name, value in whole.items()}
        for whole in (expected.gradients, expected.parameters)
    )
    error, worst = shards.largest_gradient_error([result["gradients"] for result in results], gradients)
    difference = max(
        float((part.value - part.part_of(parameters[name])).abs().max())
        for result in results
        for name, part in result["parameters"].items()
    )
    metrics = next(result["metrics"] for result in results if result["metrics"] is not None)
    return Comparison(error, worst, difference, metrics)
