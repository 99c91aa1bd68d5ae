"""`exact_step` on a tiny GPT in bf16 on the device, and in float64 on the CPU as the reference.

On a GPU Megatron runs as it is, over NCCL with one rank; on a CPU over gloo with `nemo_fiberpo.megatron.cpu`. The
log-ratios are given: old log-probs are the model's own minus them, so that both precisions gate the same numbers and
gradients differ by rounding alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_fiberpo.megatron.groups import Reducer, TokenAxes
from nemo_fiberpo.megatron.schedule import Policy
from nemo_fiberpo.megatron.step import StepResult, current_log_probs, exact_step
from nemo_fiberpo.verification import shards
from tests.gpu.device import CPU, DEVICE, ON_GPU
from tests.gpu.traffic import host_reads
from tests.megatron import batches, tiny
from tests.megatron.batches import STRATA, Batch
from tests.megatron.tiny import Layout
from tests.support import distributed

SPECS = ("local", "transformer_engine", "apex")
HIDDEN, HEADS, CHANNELS, FFN, LAYERS = 64, 4, 16, 128, 2
SAME_PARAMETERS = {
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}
"""Transformer Engine's names of norms that it fuses with the layer behind them, and the others' names."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step gave: gradients by name, float64 on the CPU; log-probs before it and coefficients [b, s - 1].

    reads   the places where the host read from the device during the step
    """

    grads: dict[str, Tensor]
    log_probs: Tensor
    coefficients: Tensor
    loss: float | None
    recompute_error: float
    reads: list[str]


def missing(spec: str) -> str | None:
    """Why a layer spec cannot be had here; None where it can."""
    needs = {"local": [], "transformer_engine": ["transformer_engine.pytorch"], "apex": ["apex"]}[spec]
    if needs and not ON_GPU:
        return f"{spec} needs a GPU"
    for name in needs:
        try:
            __import__(name)
        except Exception as error:  # a build for another CUDA or torch fails in many ways
            return f"{name} cannot be imported: {type(error).__name__}: {error}"
    return None


@contextlib.contextmanager
def _megatron(device: torch.device) -> Iterator[None]:
    """Megatron's process groups with this process as their only rank."""
    for name in distributed.PRELOAD:  # torch.compile, which Megatron imports call, must not see what CPUs replace
        importlib.import_module(name)
    from megatron.core import parallel_state, tensor_parallel

    with tempfile.TemporaryDirectory() as folder:
        if device == CPU:
            distributed.join(folder, 0, 1, 100.0)
            with tiny.megatron(Layout()):
                yield
        else:
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
            parallel_state.initialize_model_parallel()
            tensor_parallel.model_parallel_cuda_manual_seed(1234)
            yield
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _fuses_accumulation() -> bool:
    try:
        import fused_weight_gradient_mlp_cuda  # noqa: F401
    except ImportError:
        return False
    return True


def _layers(spec: str, config: Any) -> Any:
    """The layers of a spec. Apex's are those of the local one with apex's norm."""
    from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
    from megatron.core.models.gpt import gpt_layer_specs

    from nemo_fiberpo.megatron.cpu_layers import local_block_spec

    if spec == "transformer_engine":
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()
    layers = local_block_spec(config, LAYERS)
    if spec == "apex":
        layers.layer_norm = FusedLayerNorm
        for layer in layers.layer_specs:
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = FusedLayerNorm
    return layers


def make_model(spec: str, dtype: torch.dtype) -> Any:
    """The GPT under Megatron's DDP, in bf16 as Megatron's training loop has it; parameters are a function of their
    names, and can be written in bf16."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    half = dtype == torch.bfloat16
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, kv_channels=CHANNELS, ffn_hidden_size=FFN,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, bf16=half, params_dtype=dtype,
        pipeline_dtype=dtype, use_cpu_initialization=not ON_GPU or not half,
        gradient_accumulation_fusion=spec == "apex" and _fuses_accumulation(),
        finalize_model_grads_func=finalize_model_grads,
    )  # fmt: skip
    model: Any = GPTModel(
        config, _layers(spec, config), vocab_size=tiny.VOCAB, max_sequence_length=tiny.MAX_POSITIONS,
        position_embedding_type="rope",
    )  # fmt: skip
    if half:
        model = Float16Module(config, model.to(DEVICE))
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=half), model).train()
    with torch.no_grad():
        for name, parameter in parameters(model).items():
            value = shards.full_parameter(name, parameter, 1)
            parameter.copy_((value if "norm" in name else value / 3.0).bfloat16())  # logits of a freshly made model
    return model


def parameters(model: Any) -> dict[str, Any]:
    """Parameters by the names that they have with the local spec."""
    found = {}
    for name, parameter in model.named_parameters():
        name = name[name.rindex("module.") + len("module.") :]
        for other, own in SAME_PARAMETERS.items():
            name = name.replace(other, own)
        found[name] = parameter
    return found


def take_step(model: Any, microbatches: int, on_policy: bool, device: torch.device, nosy: bool = False) -> Step:
    """A step with gradients from zero; with `nosy` the policy reads a number of every micro-batch."""
    layout, axes = Layout(experts=0, microbatches=microbatches), TokenAxes.from_parallel_state()
    kind = "on_policy" if on_policy else "uneven"
    batch = {name: value.to(device) for name, value in batches.make_batch(kind).items()}
    batch["old"] = torch.zeros_like(batch["log_ratio"])
    step = batches.make_step(layout, batch, STRATA, axes)
    policy = batches.make_policy(layout, model, step.rows)
    batch["old"] = _put(current_log_probs(policy, step.microbatches), step, batch) - batch["log_ratio"]
    step = batches.make_step(layout, batch, STRATA, axes)
    if nosy:
        policy = dataclasses.replace(policy, log_probs=_reading(policy))
    model.zero_grad_buffer()
    arguments = policy, step.microbatches, step.tokens, batches.hierarchy(STRATA), Reducer(axes)
    with host_reads(device) as reads:
        result: StepResult = exact_step(*arguments, on_policy=on_policy)
    grads = {
        name: parameter.main_grad.to(CPU, torch.float64, copy=True) for name, parameter in parameters(model).items()
    }
    coefficients = _put(result.coefficients, step, batch).cpu()
    log_probs = (batch["old"] + batch["log_ratio"]).cpu()
    return Step(grads, log_probs, coefficients, result.loss, result.recompute_error, reads)


def _put(values: list[Tensor], step: batches.Step, batch: Batch) -> Tensor:
    """Values of rows, micro-batch by micro-batch, as a column of the samples, float64."""
    parts = [torch.zeros_like(part["log_ratio"]) for part in batches.split(batch, len(values))]
    for value, rows, part in zip(values, step.rows, parts, strict=True):
        rows.put(value.double(), part)
    return torch.cat(parts)


def _reading(policy: Policy) -> Callable[[Tensor, Any], Tensor]:
    def log_probs(output: Tensor, batch: Any) -> Tensor:
        assert float(output.detach().sum()) == float(output.detach().sum())
        return policy.log_probs(output, batch)

    return log_probs


STEPS = [(1, False, False), (4, False, False), (1, True, False), (4, True, False), (4, True, True)]
"""Micro-batches, on-policy, nosy."""


def write_device_steps(spec: str, path: str) -> None:
    """All `STEPS` in bf16 on the device. For a process of its own."""
    with _megatron(DEVICE):
        torch.set_default_dtype(torch.float32)
        Path(path).write_bytes(pickle.dumps(_steps(make_model(spec, torch.bfloat16), DEVICE)))


def write_reference(path: str) -> None:
    """Steps with one micro-batch in float64 by on-policy or not. For a process of its own, which sees no GPU."""
    assert not ON_GPU
    with _megatron(CPU):
        model = make_model("local", torch.float64)
        steps = {on_policy: take_step(model, 1, on_policy, CPU) for on_policy in (False, True)}
        Path(path).write_bytes(pickle.dumps(steps))


def _steps(model: Any, device: torch.device) -> dict[tuple[int, bool, bool], Step]:
    take_step(model, 1, False, device)  # what is made once, at first use, is no part of a step
    return {key: take_step(model, key[0], key[1], device, key[2]) for key in STEPS}
