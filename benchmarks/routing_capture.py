"""Time that reading the routers adds to a pass for log-probs, on one CPU process with Megatron's own GPT.

    OMP_NUM_THREADS=1 python benchmarks/routing_capture.py          (and with OMP_NUM_THREADS=2)

A mixture of experts in float32 under Megatron's schedule, forward only, samples of 512 tokens. A pair is one pass for
log-probs without and one with `RoutingCapture`, labels of all tokens included, in turns of either order. Printed are
the medians, and what the labels add by the median of the pairs' ratios and by the fastest passes, for two partitions
and for every expert by itself. Times are processor time of this process, of all its threads, which other processes
disturb least. The vocabulary is small, so that what is added is rather too large a share than too small a one.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from nemo_fiberpo.megatron import cpu
from nemo_fiberpo.megatron.cpu_layers import local_block_spec
from nemo_fiberpo.megatron.gpt import gpt_policy
from nemo_fiberpo.megatron.routing import RoutingCapture, hard_labels
from nemo_fiberpo.megatron.schedule import Policy
from nemo_fiberpo.megatron.sequences import padded_rows
from nemo_fiberpo.megatron.step import current_log_probs
from nemo_fiberpo.objective import ExpertPartitions

VOCABULARY = 1024


def make_spec(
    layers: int, hidden: int, experts: int, **options: Any
) -> tuple[TransformerConfig, TransformerBlockSubmodules]:
    """Of a GPT all of whose layers are mixtures of so many experts, or dense for 0; `options` are fields of the config,
    in float32 on a CPU without them."""
    given: dict[str, Any] = {"use_cpu_initialization": True}
    if experts:
        given |= {
            "num_moe_experts": experts, "moe_router_topk": 2, "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 0.01, "moe_token_dispatcher_type": "alltoall",
        }  # fmt: skip
    config = TransformerConfig(
        num_layers=layers, hidden_size=hidden, num_attention_heads=hidden // 64,
        ffn_hidden_size=(2 if experts else 4) * hidden, add_bias_linear=False, hidden_dropout=0.0,
        attention_dropout=0.0, **(given | options),
    )  # fmt: skip
    return config, local_block_spec(config, layers)


def pairs(plain: Callable[[], Any], watched: Callable[[], Any], repeats: int) -> list[tuple[float, float]]:
    """Processor seconds of both, pair by pair; the first pair warms up."""
    times: list[tuple[float, float]] = []
    for index in range(repeats + 1):
        spent = {}
        for work in (plain, watched) if index % 2 else (watched, plain):
            start = time.process_time()
            work()
            spent[work] = time.process_time() - start
        times.append((spent[plain], spent[watched]))
    return times[1:]


def measure(args: argparse.Namespace, config: TransformerConfig, spec: TransformerBlockSubmodules) -> None:
    sizes = {"vocab_size": VOCABULARY, "max_sequence_length": args.length}
    model = GPTModel(config, spec, position_embedding_type="rope", **sizes).train()
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (args.microbatches, args.samples, args.length))
    rows = [padded_rows(part) for part in tokens]
    microbatches = [{"rows": entry} for entry in rows]
    policy = gpt_policy(model, rows)
    print(
        f"{args.layers} layers of {args.hidden}, {args.experts} experts, {args.microbatches} micro-batches of "
        f"{args.samples} x {args.length} tokens, float32, {torch.get_num_threads()} thread(s), torch "
        f"{torch.__version__}, {platform.machine()}, {os.cpu_count()} cores"
    )
    print(f"{'partitions':<14}{'pass, ms':>10}{'with labels, ms':>18}{'added':>9}{'of fastest':>12}")
    few = {"even": list(range(0, args.experts, 2)), "odd": list(range(1, args.experts, 2))}
    for name, by in (("2", few), (f"{args.experts}", "expert")):
        capture = RoutingCapture([model], ExpertPartitions(by).table(args.experts)[0])

        def watched(capture: RoutingCapture = capture) -> list[torch.Tensor]:
            with capture.watch(policy, microbatches) as reading:
                log_probs(reading)
            return [hard_labels(mass) for mass in capture.masses()]

        def log_probs(reading: Policy = policy) -> list[torch.Tensor]:
            return current_log_probs(reading, microbatches)

        found = pairs(log_probs, watched, args.repeats)
        before, after = ([pair[index] for pair in found] for index in (0, 1))
        ratio, fastest = statistics.median(b / a for a, b in found), min(after) / min(before)
        times = f"{statistics.median(before) * 1e3:>10.1f}{statistics.median(after) * 1e3:>18.1f}"
        print(f"{name:<14}{times}{ratio - 1:>9.2%}{fastest - 1:>12.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--samples", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=21)
    args = parser.parse_args()
    # Before: importing layers compiles functions, which must not meet the stand-ins for CUDA.
    spec = make_spec(args.layers, args.hidden, args.experts)
    with tempfile.TemporaryDirectory() as folder, cpu.megatron_on_cpu():
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        measure(args, *spec)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
