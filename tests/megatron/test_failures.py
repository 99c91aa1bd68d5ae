"""A rank that dies, stalls, runs out of data or has other micro-batches: every other rank raises, none waits for ever.

The model is two linear layers under Megatron's real groups, DDP and schedules. Survivors stay alive after their error,
so that nobody is told by a closed connection of theirs. Time is an upper bound alone, and a wide one.
"""

from __future__ import annotations

import os
import tempfile
import time
import types
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import pytest
import torch

from nemo_fiberpo.megatron import cpu, timeouts
from nemo_fiberpo.megatron.exchange import exchange
from nemo_fiberpo.megatron.groups import Reducer, TokenAxes
from nemo_fiberpo.megatron.logprobs import next_token_log_probs
from nemo_fiberpo.megatron.schedule import Policy
from nemo_fiberpo.megatron.step import StepTokens, exact_step
from nemo_fiberpo.megatron.timeouts import limit_collectives
from nemo_fiberpo.objective import Budget, Hierarchy, Stratum, token_weights
from tests.support import distributed

pytestmark = pytest.mark.distributed

TIMEOUT = 8.0
MARGIN = 60.0
VOCAB, LENGTH, HIDDEN, SAMPLES = 8, 5, 4, 4
PLACES = ("before the exchange", "in pass A", "between the reductions", "in pass D")
STRATA = ("prompt_group", "trajectory")
LAYOUTS = {"dp2": (2, 1), "pp2": (2, 2), "dp2-pp2": (4, 2)}
AT_ONCE = ("twice the micro-batches", "twice the micro-batches, unsaid", "no micro-batch", "one micro-batch less")
Outcome = tuple[str, str, float]  # name of the exception, its message, seconds from before the step


def make_model(pp: int) -> Any:
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.enums import ModelType
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    class Stage(MegatronModule):
        """Embedding on the first stage, logits on the last, a linear layer on each; activations are [s, b, h]."""

        def __init__(self, config: Any):
            super().__init__(config)
            self.model_type = ModelType.encoder_or_decoder  # the schedule of the older versions asks
            self.first, self.last, self.given = mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage(), None
            self.embedding = torch.nn.Embedding(VOCAB, HIDDEN) if self.first else None
            self.inner = torch.nn.Linear(HIDDEN, HIDDEN)
            self.head = torch.nn.Linear(HIDDEN, VOCAB) if self.last else None

        def set_input_tensor(self, given: Any) -> None:
            self.given = given[0] if isinstance(given, list) else given

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.inner(self.embedding(tokens).transpose(0, 1) if self.first else self.given)
            return self.head(x).transpose(0, 1) if self.last else x

    config = TransformerConfig(
        num_layers=2, hidden_size=HIDDEN, num_attention_heads=1, hidden_dropout=0.0, attention_dropout=0.0,
        pipeline_model_parallel_size=pp, pipeline_dtype=torch.float32, use_cpu_initialization=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), Stage(config))
    config.finalize_model_grads_func = lambda models, *_, **__: [each.finish_grad_sync() for each in models]
    return model.train()


class Interrupted(Reducer):
    """Calls `interrupt` before its second reduction."""

    interrupt: Callable[[str], None]

    def __call__(self, buffer: torch.Tensor) -> torch.Tensor:
        if self.calls == 1:
            self.interrupt("between the reductions")
        return super().__call__(buffer)


def take_step(pp: int, interrupt: Callable[[str], None], change: str = "") -> None:
    """One exact step off-policy; `change` is what is wrong with this rank's data."""
    from megatron.core import parallel_state as mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model, reducer = make_model(pp), Interrupted(TokenAxes.from_parallel_state())
    reducer.interrupt = interrupt
    first = mpu.get_data_parallel_rank() * SAMPLES
    labels = {
        "prompt_group": torch.arange(SAMPLES * (LENGTH - 1)) % 2,  # on all ranks
        "trajectory": first * 10 + torch.arange(SAMPLES * (LENGTH - 1)) % 2,
    }
    chain = Hierarchy((Stratum("prompt_group", Budget(0.1, 0.1)), Stratum("trajectory", Budget(0.1, 0.1))), 0.2)
    number = 4 if change.startswith("twice the micro-batches") else 2
    facts = {"micro-batches per step": 2 if change == "twice the micro-batches, unsaid" else number}
    interrupt("before the exchange")
    (cells,) = exchange([chain.cells(labels, None, shape=(SAMPLES, LENGTH - 1))], reducer.axes, facts)
    weights = token_weights(cells).view(SAMPLES, LENGTH - 1)
    tokens = torch.randint(0, VOCAB, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(first))

    def forward(batch: torch.Tensor, module: Any) -> torch.Tensor:
        interrupt("in pass D" if torch.is_grad_enabled() else "in pass A")
        return module(batch)

    def log_probs(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return next_token_log_probs(output, batch, mpu.get_tensor_model_parallel_group())

    size = SAMPLES // number
    batches = list(tokens.split(size))
    if change == "no micro-batch":
        batches = []
    elif change == "one micro-batch less":
        batches = batches[:-1]
    old = torch.full(weights.shape, -2.0)
    policy = Policy(model, get_forward_backward_func(), forward, log_probs, LENGTH, size)
    if change == "no step":
        return
    kept = SAMPLES // 2 if change == "fewer samples" else SAMPLES
    step = StepTokens(old[:kept].split(size), weights[:kept].split(size), (old[:kept] < 0).split(size), cells)
    exact_step(policy, batches, step, chain, reducer, on_policy=False)


def worker(sender: Any, folder: str, rank: int, world: int, pp: int, how: str, where: str) -> None:
    """Initialise, take a step, send the outcome, stay alive. `how`: dies, stalls, or what is wrong with the data.

    Data is wrong on all stages of the last data-parallel rank; the last rank of all is the one that dies or stalls.
    """
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    distributed.join(folder, rank, world, MARGIN)
    cpu.install()
    # Where an error must come at once, the time-out is one that the test would not pass with.
    timeout = 10 * MARGIN if how in AT_ONCE else TIMEOUT
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=pp, distributed_timeout_minutes=timeout / 60)
    limit_collectives(timeout)
    replicas = world // pp
    fails = rank == world - 1 if how in ("dies", "stalls") else rank % replicas == replicas - 1

    def interrupt(here: str) -> None:
        if fails and here == where:
            if how == "dies":
                os._exit(1)
            elif how == "stalls":
                time.sleep(10 * MARGIN)

    begun = time.monotonic()
    try:
        take_step(pp, interrupt, how if fails else "")
        outcome: Outcome = ("", "", 0.0)
    except Exception as error:
        outcome = (type(error).__name__, str(error), time.monotonic() - begun)
    sender.send(outcome)
    time.sleep(10 * MARGIN)


def outcomes_of(jobs: list[tuple[int, int, str, str]], answers: Callable[[int, int], int]) -> list[dict[int, Outcome]]:
    """For each job (ranks, pp, how, where), started all at once: outcomes by rank, of as many ranks as `answers`."""
    context = distributed.context()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes, results = {}, [], [{} for _ in jobs]
        try:
            for number, (world, pp, how, where) in enumerate(jobs):
                os.mkdir(f"{folder}/{number}")
                for rank in range(world):
                    receiver, sender = context.Pipe(duplex=False)
                    arguments = (sender, f"{folder}/{number}", rank, world, pp, how, where)
                    processes.append(context.Process(target=worker, args=arguments, daemon=True))
                    processes[-1].start()
                    sender.close()
                    pipes[receiver] = number, rank
            until = time.monotonic() + TIMEOUT + 2 * MARGIN
            wanted = sum(answers(world, pp) for world, pp, *_ in jobs)
            while sum(map(len, results)) < wanted and (left := until - time.monotonic()) > 0:
                for pipe in wait(list(pipes), timeout=left):
                    number, rank = pipes.pop(pipe)
                    try:
                        results[number][rank] = pipe.recv()
                    except EOFError:
                        pass
        finally:
            for process in processes:
                process.kill()
                process.join()
    return results


WORDS = {
    ("dp2", "before the exchange"): "the exchange of cells did not complete",
    ("dp2", "in pass A"): "a reduction of the gates did not complete",
    ("dp2", "between the reductions"): "a reduction of the gates did not complete",
    ("pp2", "before the exchange"): "the exchange of cells did not complete",
    ("pp2", "between the reductions"): "a reduction of the gates did not complete",
}
OF_GLOO = ("Timed out waiting", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_failure_every_rank_takes_the_step(layout: str) -> None:
    assert everybody("nothing", layout) == [("", "", 0.0)] * LAYOUTS[layout][0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["dies", "stalls"])
def test_every_other_rank_raises_within_the_time_out(layout: str, how: str) -> None:
    world, pp = LAYOUTS[layout]
    results = outcomes_of([(world, pp, how, where) for where in PLACES], lambda world, pp: world - 1)
    for where, outcomes in zip(PLACES, results, strict=True):
        survivors = set(range(world - 1))
        assert set(outcomes) == survivors, f"{where}: no answer of {survivors - set(outcomes)}"
        for rank, (kind, message, seconds) in outcomes.items():
            print(f"{layout}, a rank {how} {where}: rank {rank} after {seconds:.1f} s: {kind}: {message[:160]}")
            assert kind == "RuntimeError", (where, rank, message)
            assert seconds < TIMEOUT + MARGIN, (where, rank)
            assert WORDS.get((layout, where), "") in message, (where, rank)
            assert any(words in message for words in OF_GLOO), (where, rank, message)


def everybody(how: str, layout: str = "dp2") -> list[Outcome]:
    world, pp = LAYOUTS[layout]
    (outcomes,) = outcomes_of([(world, pp, how, "")], lambda world, pp: world)
    return [outcomes[rank] for rank in range(world)]


def test_another_number_of_micro_batches_is_one_error_that_names_numbers_and_ranks() -> None:
    wanted = "micro-batches per step: must be equal on all ranks, but is 2 on rank 0 and 4 on rank 1"
    for kind, message, _ in everybody("twice the micro-batches"):
        assert (kind, message) == ("ValueError", wanted)


def test_another_number_of_micro_batches_than_exchanged_is_found_by_the_first_reduction() -> None:
    for rank, (kind, message, _) in enumerate(everybody("twice the micro-batches, unsaid")):
        assert kind == "ValueError"
        assert message.startswith(f"microbatches: {(2, 4)[rank]} on rank {rank}, but 6 on all 2 ranks"), message


@pytest.mark.parametrize("how", ["no micro-batch", "one micro-batch less"])
@pytest.mark.parametrize("layout", ["dp2", "dp2-pp2"])
def test_a_rank_out_of_micro_batches_tells_every_rank_by_the_first_reduction(how: str, layout: str) -> None:
    number, last = 0 if how == "no micro-batch" else 1, LAYOUTS[layout][0] - 1
    for rank, (kind, message, _) in enumerate(everybody(how, layout)):
        assert kind == "ValueError", message
        if rank % 2:  # the data-parallel rank without data, both its stages
            assert message.startswith(f"microbatches: {number} of them, but tokens of 2")
        else:
            assert message.startswith("another rank has refused") and f"rank {last};" in message


@pytest.mark.parametrize("how", ["no step", "fewer samples"])
def test_a_rank_that_never_comes_to_the_step_is_missed_within_the_time_out(how: str) -> None:
    (kind, message, seconds), (other_kind, other, _) = everybody(how)
    assert kind == "RuntimeError" and "a reduction of the gates did not complete on rank 0" in message
    assert seconds < TIMEOUT + MARGIN
    if how == "fewer samples":
        assert other_kind == "ValueError" and other.startswith(
            "cells: made for 16 tokens, but the micro-batches have 8"
        )


def test_a_torch_without_the_symbol_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts.importlib, "import_module", lambda name: types.SimpleNamespace())
    with pytest.raises(ImportError, match="distributed_c10d._set_pg_timeout does not exist"):
        limit_collectives(1.0)
