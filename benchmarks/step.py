"""What an optimizer step costs in processor time, as a multiple of plain forward and backward passes over its tokens.

    OMP_NUM_THREADS=1 python -m benchmarks.step [--recompute]

One CPU process, a mixture of experts in float32 under Megatron's schedule. Rows are the plain step (the first one after
a rollout), two passes, all forward passes first, one pass with a hierarchy whose cells lie in micro-batches, and
optimistic steps in which the gates of none, a quarter, half and all of the domains act; each domain has its tokens in
two micro-batches. With `--recompute` every layer's activations are recomputed in all of them. All take turns in one
process; printed are medians of the ratios to the plain step of the same turn. There is one rank, so neither gradients
nor gates cross a network.
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

from benchmarks.routing_capture import VOCABULARY, make_spec
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
Work = Callable[[], Any]


def works_of(model: Any, args: argparse.Namespace) -> dict[str, Work]:
    """The kinds of steps, by name."""
    torch.manual_seed(0)
    shape = (args.microbatches, args.samples, args.length)
    rows = [padded_rows(part) for part in torch.randint(0, VOCABULARY, shape)]
    microbatches, policy = [{"rows": entry} for entry in rows], gpt_policy(model, rows)
    current = current_log_probs(policy, microbatches)
    trajectory = torch.arange(args.microbatches * args.samples).view(args.microbatches, args.samples, 1).expand(shape)
    labels = {"domain": trajectory // (2 * args.samples), "trajectory": trajectory}
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
        domains = args.microbatches // 2
        drift = [0.1 if domain < acting * domains else 0.01 for domain in range(domains)]
        old = [log_probs - drift[index // 2] for index, log_probs in enumerate(current)]
        weights = token_weights(whole).split([one.numel() for one in live])
        weighted = [weight.view_as(one) * torch.randn(len(one), 1) for weight, one in zip(weights, live, strict=True)]
        return StepTokens(old, weighted, live, whole), parts

    works: dict[str, Work] = {}
    tokens, _ = given(DOMAINS, 0.0)
    options = policy, microbatches

    def exact(**more: Any) -> Work:
        return lambda: exact_step(*options, tokens, DOMAINS, Reducer(axes), **more)

    works["plain"], works["two passes"] = exact(on_policy=True), exact()
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


def ratios(works: dict[str, Work], model: Any, repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds, and median ratio to the first work of the same turn; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            model.zero_grad(set_to_none=True)
            start = time.process_time()
            work()
            times[name].append(time.process_time() - start)
    base, *_ = times.values()
    return {
        name: (
            statistics.median(spent[1:]),
            statistics.median(a / b for a, b in zip(spent[1:], base[1:], strict=True)),
        )
        for name, spent in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--samples", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--microbatches", type=int, default=8, help="a multiple of 8")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--recompute", action="store_true", help="activations are recomputed in the backward pass")
    args = parser.parse_args()
    config, spec = make_spec(args)
    if args.recompute:
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    with tempfile.TemporaryDirectory() as folder, cpu.megatron_on_cpu():
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        sizes = {"vocab_size": VOCABULARY, "max_sequence_length": args.length}
        model = GPTModel(config, spec, position_embedding_type="rope", **sizes).train()
        print(
            f"{args.layers} layers of {args.hidden}, {args.experts} experts, {args.microbatches} micro-batches of "
            f"{args.samples} x {args.length} tokens, float32, activations "
            f"{'recomputed' if args.recompute else 'kept'}, {torch.get_num_threads()} thread(s), torch "
            f"{torch.__version__}, {platform.machine()}, {os.cpu_count()} cores"
        )
        print("| step | ms | x plain |\n|---|---|---|")
        for name, (seconds, ratio) in ratios(works_of(model, args), model, args.repeats).items():
            print(f"| {name} | {seconds * 1e3:.0f} | {ratio:.2f} |")
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
