"""Time and peak memory of an optimizer step, against those of plain forward and backward passes over its tokens.

    OMP_NUM_THREADS=1 python -m benchmarks.step [--model dense moe] [--recompute] [--out FILE]

One process with a model of random weights under Megatron's schedule and DDP. Rows are the plain step (the first one
after a rollout), two passes, all forward passes first, one pass with a hierarchy whose cells lie in micro-batches, and
optimistic steps in which the gates of none, a quarter, half and all of the domains act; each domain has its tokens in
two micro-batches. With `--recompute` every layer's activations are recomputed in all of them, with `--recompute both`
there is a table with and one without it.

On a GPU models are in bf16, of about a billion parameters (dense) and half a billion (a mixture of 8 experts), and
times are wall time until the device is done. On a CPU they are small and in float32, and times are processor time. All
steps take turns in one process; printed are medians, and medians of the ratios to the plain step of the same turn.
Memory is the peak beyond what is held between steps (parameters and gradients), from
`torch.cuda.max_memory_allocated` on a GPU, and with `--memory` from the allocator's events on a CPU. There is one rank,
so neither gradients nor gates cross a network.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401  compiles functions, before there are stand-ins for CUDA
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module

from benchmarks.logprobs import DEVICE, ON_GPU, synchronize
from benchmarks.routing_capture import VOCABULARY, make_spec
from benchmarks.token_coefficients import peak_bytes, processor, timed
from nemo_fiberpo.megatron import cpu
from nemo_fiberpo.megatron.all_forward import all_forward_step
from nemo_fiberpo.megatron.gpt import gpt_policy
from nemo_fiberpo.megatron.groups import Reducer, TokenAxes
from nemo_fiberpo.megatron.one_pass import one_pass_cells, one_pass_step
from nemo_fiberpo.megatron.optimistic import optimistic_step
from nemo_fiberpo.megatron.sequences import padded_rows
from nemo_fiberpo.megatron.step import StepTokens, current_log_probs, exact_step
from nemo_fiberpo.objective import Budget, Hierarchy, Stratum, token_weights
from nemo_fiberpo.objective.optimistic import part_cells

WIDE, TIGHT = Budget(1.0, 1.0), Budget(0.05, 0.05)
DOMAINS = Hierarchy((Stratum("domain", TIGHT), Stratum("trajectory", WIDE)), token_clip=1.0)
TRAJECTORIES = Hierarchy((Stratum("trajectory", WIDE),), token_clip=1.0)
ACTING = (0.0, 0.25, 0.5, 1.0)
PLAIN = "plain"
COLUMNS = ("ms", "x plain", "peak MiB")
RECOMPUTED: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
Work = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """Of a model and its micro-batches; without experts it is dense."""

    layers: int
    hidden: int
    experts: int
    vocab: int
    length: int


if ON_GPU:
    MODELS = {"moe": Sizes(5, 1536, 8, 1 << 15, 1024), "dense": Sizes(16, 2048, 0, 3 << 14, 1024)}
else:
    MODELS = {"moe": Sizes(2, 128, 4, VOCABULARY, 128), "dense": Sizes(2, 128, 0, VOCABULARY, 128)}


def sizes_of(name: str, args: argparse.Namespace) -> Sizes:
    """The sizes of a model, those that were given on the command line in place of its own."""
    known = MODELS[name]
    own = {key: value if (given := getattr(args, key)) is None else given for key, value in vars(known).items()}
    return Sizes(**(own | {"experts": own["experts"] if known.experts else 0}))


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """Megatron's process groups with this process as their only rank: over NCCL on a GPU, else over gloo on the CPU."""
    if "lo" in (name for _, name in socket.if_nameindex()):  # Megatron makes groups of gloo on a GPU too
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder, contextlib.nullcontext() if ON_GPU else cpu.megatron_on_cpu():
        if ON_GPU:
            torch.cuda.set_device(0)
        backend = "nccl" if ON_GPU else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        yield
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def make_model(sizes: Sizes, recompute: bool, dtype: torch.dtype) -> Any:
    """The GPT under Megatron's DDP, which holds the gradients of bf16 in float32."""
    half = dtype == torch.bfloat16
    config, spec = make_spec(
        sizes.layers, sizes.hidden, sizes.experts, bf16=half, params_dtype=dtype, pipeline_dtype=dtype,
        use_cpu_initialization=not ON_GPU, finalize_model_grads_func=finalize_model_grads,
        **(RECOMPUTED if recompute else {}),
    )  # fmt: skip
    shapes = {"vocab_size": sizes.vocab, "max_sequence_length": sizes.length}
    model: Any = GPTModel(config, spec, position_embedding_type="rope", **shapes).to(DEVICE)
    if half:
        model = Float16Module(config, model)
    return DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=half), model).train()


def works_of(model: Any, sizes: Sizes, samples: int, microbatches: int) -> dict[str, Work]:
    """The kinds of steps, by name."""
    torch.manual_seed(0)
    shape = (microbatches, samples, sizes.length)
    rows = [padded_rows(part) for part in torch.randint(0, sizes.vocab, shape).to(DEVICE)]
    batches, policy = [{"rows": entry} for entry in rows], gpt_policy(model, rows)
    current = current_log_probs(policy, batches)
    trajectory = torch.arange(microbatches * samples, device=DEVICE).view(microbatches, samples, 1).expand(shape)
    labels = {"domain": trajectory // (2 * samples), "trajectory": trajectory}
    live = [entry.source >= 0 for entry in rows]
    axes = TokenAxes.from_parallel_state()

    def given(hierarchy: Hierarchy, acting: float) -> tuple[StepTokens, list[Any]]:
        parts = [
            hierarchy.cells(
                {name: labels[name][index].flatten() for name in hierarchy.columns},
                mask.flatten(),
                shape=(len(mask), mask.shape[1]),
            )
            for index, mask in enumerate(live)
        ]
        mask = torch.cat([one.flatten() for one in live])
        whole = hierarchy.cells({name: labels[name].flatten() for name in hierarchy.columns}, mask).shared
        domains = microbatches // 2
        drift = [0.1 if domain < acting * domains else 0.01 for domain in range(domains)]
        old = [log_probs - drift[index // 2] for index, log_probs in enumerate(current)]
        weights = token_weights(whole).split([one.numel() for one in live])
        advantages = torch.randn(microbatches, samples, 1).to(DEVICE)
        weighted = [
            weight.view_as(one) * advantage for weight, one, advantage in zip(weights, live, advantages, strict=True)
        ]
        return StepTokens(old, weighted, live, whole), parts

    works: dict[str, Work] = {}
    tokens, _ = given(DOMAINS, 0.0)
    options = policy, batches

    def exact(**more: Any) -> Work:
        return lambda: exact_step(*options, tokens, DOMAINS, Reducer(axes), **more)

    works[PLAIN], works["two passes"] = exact(on_policy=True), exact()
    works["all forward passes first"] = lambda: all_forward_step(*options, tokens, DOMAINS, Reducer(axes))
    alone, own = given(TRAJECTORIES, 0.0)
    local = one_pass_cells(own, axes)
    works["one pass"] = lambda: one_pass_step(*options, alone, local, TRAJECTORIES, Reducer(axes))
    for acting in ACTING:
        found, parts = given(DOMAINS, acting)
        guessed = part_cells(parts, found.cells)

        def guess(found: StepTokens = found, guessed: Any = guessed, acting: float = acting) -> None:
            result = optimistic_step(*options, found, guessed, DOMAINS, Reducer(axes))
            assert result.second_share == acting, result.second_share

        works[f"optimistic, f = {acting:g}"] = guess
    return works


def from_zero(model: Any, work: Work) -> Work:
    """A step as a training loop takes it: gradients are zeroed before, and the device is done at the end."""

    def run() -> None:
        model.zero_grad_buffer()
        work()
        synchronize()

    return run


def measure(name: str, sizes: Sizes, recompute: bool, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of a model, with recomputation or without."""
    model = make_model(sizes, recompute, getattr(torch, args.dtype))
    steps = works_of(model, sizes, args.samples, args.microbatches)
    works = {row: from_zero(model, work) for row, work in steps.items()}
    peaks = {row: peak_bytes(work, ON_GPU) for row, work in works.items()} if args.memory else {}
    times = timed(works, args.repeats, time.perf_counter if ON_GPU else time.process_time, warm_up=not peaks)
    table = {}
    for row, spent in times.items():
        ratio = statistics.median(one / plain for one, plain in zip(spent, times[PLAIN], strict=True))
        figures = statistics.median(spent) * 1e3, ratio, peaks[row] / 2**20 if peaks else None
        table[row] = dict(zip(COLUMNS, figures, strict=True))
    parameters = list(model.parameters())
    held = sum(one.numel() * (one.element_size() + one.main_grad.element_size()) for one in parameters)
    return {
        "model": name, **vars(sizes), "samples": args.samples, "microbatches": args.microbatches,
        "parameters": sum(one.numel() for one in parameters), "held MiB": held / 2**20, "dtype": args.dtype,
        "recompute": recompute, "torch": torch.__version__, "table": table,
        "megatron-core": importlib.metadata.version("megatron-core"),
        "device": torch.cuda.get_device_name() if ON_GPU else f"{processor()}, {torch.get_num_threads()} thread(s)",
    }  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """The figures as a table."""
    kind = f"mixtures of {result['experts']} experts" if result["experts"] else "dense"
    lines = [
        f"{result['parameters'] / 1e6:.4g}M parameters: {result['layers']} layers of {result['hidden']}, {kind}, "
        f"vocabulary {result['vocab']}; {result['microbatches']} micro-batches of {result['samples']} x "
        f"{result['length']} tokens; {result['dtype']}, activations {'recomputed' if result['recompute'] else 'kept'}.",
        f"On {result['device']}, torch {result['torch']}, megatron-core {result['megatron-core']}. Parameters and "
        f"gradients hold {result['held MiB']:.4g} MiB; peaks are beyond them.",
        "",
        f"| step | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for row, figures in result["table"].items():
        peak = "" if figures["peak MiB"] is None else f"{figures['peak MiB']:.4g}"
        lines.append(f"| {row} | {figures['ms']:.0f} | {figures['x plain']:.2f} | {peak} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), nargs="+", default=["moe"], help="one table each")
    parser.add_argument(
        "--recompute", choices=["yes", "no", "both"], nargs="?", const="yes", default="no",
        help="activations are recomputed in the backward pass; both: a table with and one without",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, help="default: by the model and the device, as the four after it")
    parser.add_argument("--hidden", type=int, help="a multiple of 64")
    parser.add_argument("--experts", type=int, help="of the model moe")
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--samples", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--microbatches", type=int, default=8, help="a multiple of 8")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if ON_GPU else "float32")
    parser.add_argument("--repeats", type=int, default=3 if ON_GPU else 9)
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=ON_GPU,
        help="peak memory, default: on a GPU; on a CPU it takes several times as long as the times",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    return parser.parse_args()


def main() -> None:
    args = parse()
    results: list[dict[str, Any]] = []
    with one_rank():
        for name in args.model:
            for recompute in {"yes": [True], "no": [False], "both": [False, True]}[args.recompute]:
                results.append(measure(name, sizes_of(name, args), recompute, args))
                if args.out:  # what is measured is not lost if the next model does not fit
                    args.out.write_text(json.dumps(results, indent=1))
                print(markdown(results[-1]), end="\n\n", flush=True)
                gc.collect()  # Megatron's DDP and its hooks hold each other, and the buffers
                if ON_GPU:
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
