"""Megatron on CPU: reversible, idempotent, off unless asked for, and enough for a training step with everything on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_fiberpo.megatron import cpu
from nemo_fiberpo.megatron.patching import Patch, Patches
from tests.support import distributed

pytestmark = pytest.mark.distributed


def values() -> list[Any]:
    return [patch.resolve()[1] for patch in cpu._PATCHES]


def reversible_worker(rank: int, world: int) -> None:
    before = values()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with cpu.megatron_on_cpu():
        assert cpu.installed()
        cpu.install()
        with cpu.megatron_on_cpu():
            pass
        assert cpu.installed() and torch.zeros(1, device="cuda").device.type == "cpu"
    assert not cpu.installed()
    cpu.uninstall()
    assert all(a is b for a, b in zip(before, values(), strict=True))
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_it_is_off_unless_asked_for_and_leaves_every_attribute_as_it_was() -> None:
    distributed.run(reversible_worker, 1, init=False)


class AsksForADevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.full((1,), 2.0, device=torch.cuda.current_device()) * grad


def device_worker(rank: int, world: int) -> None:
    with cpu.megatron_on_cpu():
        index = torch.cuda.current_device()
        x = torch.arange(3.0)
        tensors = [
            torch.zeros(3, device="cuda"), torch.empty(3, device=torch.device("cuda", 1)),
            torch.tensor([1], device=index), x.cuda(), x.cuda(non_blocking=True),
            x.to("cuda:0"), x.to(index), x.to(device="cuda", dtype=torch.float64),
            x.to("cuda", torch.int32), x.new_zeros(2, device="cuda"), torch.zeros_like(x, device="cuda"),
            torch.cuda.LongTensor([1, 2]), torch.nn.Linear(2, 2).cuda().to("cuda").weight,
        ]  # fmt: skip
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
        assert x.to("cuda", torch.int32).dtype == torch.int32 and x.to(torch.float64).dtype == torch.float64
        assert x.to(torch.zeros(1, dtype=torch.int64)).dtype == torch.int64
        assert x.type() == "torch.cuda.FloatTensor" and x.type("torch.cuda.DoubleTensor").dtype == torch.float64
        y = torch.ones(1, requires_grad=True)
        AsksForADevice.apply(y).sum().backward()
        assert torch.autograd.grad(AsksForADevice.apply(y).sum(), y)[0].item() == 2.0 == y.grad.item()
        event = torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.device(0):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            event.record(), event.synchronize(), torch.cuda.synchronize(), torch.cuda.empty_cache()
        assert event.elapsed_time(event) == 0.0 and torch.cuda.memory_allocated() == 0
        torch.cuda.manual_seed(5)
        state, first = torch.cuda.get_rng_state(), torch.rand(2, device="cuda")
        torch.cuda.set_rng_state(state)
        assert torch.equal(first, torch.rand(2, device="cuda"))
        assert not torch.cuda.is_available()


def test_every_way_to_name_a_gpu_means_the_cpu() -> None:
    distributed.run(device_worker, 1, init=False)


def test_a_missing_symbol_is_named_before_anything_changes() -> None:
    gone = Patch("torch.cuda", "no_such_function", "made up", None)
    with pytest.raises(ImportError, match=r"torch\.cuda\.no_such_function does not exist .* made up"):
        Patches([Patch("torch.cuda", "synchronize", "would change", None), gone]).apply()
    assert torch.cuda.synchronize is not None


def average_worker(rank: int, world: int) -> tuple[list[float], list[float]]:
    with cpu.megatron_on_cpu():
        whole, part = torch.tensor([1.0, 2.0]) * (rank + 1), torch.zeros(1)
        given = whole.clone()
        dist.reduce_scatter_tensor(part, given, op=dist.ReduceOp.AVG)
        assert torch.equal(given, whole)
        dist.all_reduce(whole, op=dist.ReduceOp.AVG)
        return whole.tolist(), part.tolist()


def test_gloo_averages() -> None:
    """Ranks hold (1, 2) and (2, 4): the mean is (1.5, 3)."""
    assert distributed.run(average_worker, 2) == [([1.5, 3.0], [1.5]), ([1.5, 3.0], [3.0])]


def training_worker(rank: int, world: int, expert_parallel: int, dispatcher: str, overlap: bool) -> list[float]:
    """Three steps of Megatron's distributed optimizer, with recomputation, dropout and averages in collectives."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig

    with cpu.megatron_on_cpu():
        parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_parallel)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        torch.manual_seed(1)
        config = TransformerConfig(
            num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=32, num_moe_experts=4,
            moe_router_topk=2, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01,
            moe_token_dispatcher_type=dispatcher,
            use_cpu_initialization=True, add_bias_linear=False, expert_model_parallel_size=expert_parallel,
            hidden_dropout=0.01, attention_dropout=0.01, finalize_model_grads_func=finalize_model_grads,
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1,
        )  # fmt: skip
        spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False)
        module = GPTModel(config, spec, vocab_size=16, max_sequence_length=8)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            average_in_collective=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
        )
        model = DistributedDataParallel(config, ddp, module)
        config.no_sync_func = model.no_sync if overlap else None
        optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-2, use_distributed_optimizer=True), [model])
        tokens = torch.arange(8).repeat(2, 1)

        def forward_step(data: Any, module: Any) -> Any:
            logits = module(next(data), torch.arange(8).repeat(2, 1), None)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
            return loss, lambda output: (output, {"loss": output.detach().item()})

        losses = []
        for _ in range(3):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            data = get_forward_backward_func()(
                forward_step_func=forward_step, data_iterator=iter([tokens, tokens]), model=model, num_microbatches=2,
                seq_length=8, micro_batch_size=2, forward_only=False,
            )  # fmt: skip
            assert optimizer.step()[0]
            losses.append(data[0]["loss"])
        parallel_state.destroy_model_parallel()
        return losses


@pytest.mark.parametrize(
    ("expert_parallel", "dispatcher", "overlap"),
    [(1, "alltoall", True), (2, "alltoall", False), (2, "allgather", False)],
)
def test_the_distributed_optimizer_trains_a_mixture_of_experts(
    expert_parallel: int, dispatcher: str, overlap: bool
) -> None:
    for losses in distributed.run(training_worker, 2, expert_parallel, dispatcher, overlap):
        assert losses[2] < losses[1] < losses[0]
