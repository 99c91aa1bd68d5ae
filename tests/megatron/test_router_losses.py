"""Routers learn from real tokens alone: their gradients, logs and counts on padded rows, against Megatron's own on rows
that have no padding.

A pass with coefficients 0 leaves the gradients of the auxiliary losses. The reference is one process under Megatron's
own schedule, which knows nothing of `router_losses`: a micro-batch is one packed row without a place too many, or for
seq_aux_loss, which is a mean over sequences, one sequence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from nemo_fiberpo.megatron.compat import schedule_cp_factor
from nemo_fiberpo.megatron.groups import TokenAxes
from nemo_fiberpo.megatron.sequences import Rows, packed_rows
from nemo_fiberpo.megatron.step import backward_pass
from nemo_fiberpo.verification import shards
from nemo_fiberpo.verification.shards import Gradient
from tests.megatron import batches, tiny
from tests.megatron.batches import Batch
from tests.megatron.test_exact_step import plain_schedule
from tests.megatron.tiny import Layout
from tests.support import distributed

pytestmark = pytest.mark.distributed

MICRO_BATCHES = 4
WIDTHS = (16, 24, 64)
"""Of rows, whose longest sequence has 12 tokens."""
LOSSES: dict[str, tuple[tuple[str, Any], ...]] = {
    "aux_loss": (("moe_z_loss_coeff", 0.1),),
    "seq_aux_loss": (("moe_router_load_balancing_type", "seq_aux_loss"),),
    "sigmoid": (("moe_router_score_function", "sigmoid"), ("moe_router_enable_expert_bias", True)),
}
LAYOUTS = [
    (1, Layout(), ("aux_loss", "seq_aux_loss", "sigmoid")),
    (1, Layout(packed=True, recompute=True), ("aux_loss",)),
    (2, Layout(tp=2, dispatcher="allgather"), ("aux_loss", "seq_aux_loss")),
    (2, Layout(cp=2), ("aux_loss",)),
    (2, Layout(ep=2), ("sigmoid",)),
    (2, Layout(pp=2, vpp=2, recompute=True, overlap=True), ("aux_loss", "sigmoid")),
    (4, Layout(tp=2, cp=2, dispatcher="allgather", recompute=True), ("seq_aux_loss", "sigmoid")),
]


def with_losses(layout: Layout, losses: str, micro_batches: int = MICRO_BATCHES, **changes: Any) -> Layout:
    """That layout of a model of four layers with these losses; a tenth of a gradient is theirs whatever their kind."""
    options = {"aux_loss": 0.1, "options": LOSSES[losses], "layers": 4, "microbatches": micro_batches}
    return dataclasses.replace(layout, **(options | changes))


def parts_of(layout: Layout, batch: Batch, axes: TokenAxes) -> list[Batch]:
    """The samples of each micro-batch of the whole job are the same in all layouts: a rank has whole ones of them."""
    data = axes.axis("dp")
    return batches.split(batches.share_of(batch, data.rank, data.size), layout.microbatches)


def rows_of(layout: Layout, parts: Sequence[Batch], width: int, cp_rank: int) -> list[Rows]:
    return [laid.rows for laid in batches.lay_out(layout, parts, width * (4 if layout.packed else 1), cp_rank)]


def make_model(layout: Layout) -> Any:
    """The model with expert biases that are not 0."""
    model = tiny.make_model(layout)
    for chunk in shards.chunks_of(model):
        for module in chunk.modules():
            if getattr(module, "expert_bias", None) is not None:
                module.expert_bias.copy_(torch.arange(tiny.EXPERTS) % 3 * 0.2)
    return model


@contextlib.contextmanager
def counted_for_bias() -> Iterator[list[torch.Tensor]]:
    """Tokens per expert [layers, experts] of all ranks by which Megatron would move the biases at the end of a step."""
    # By its name: megatron.core.distributed has a function that is called as this module is.
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    counts: list[torch.Tensor] = []
    before = module.get_updated_expert_bias

    def read(tokens: torch.Tensor, bias: torch.Tensor, rate: float, **groups: Any) -> torch.Tensor:
        before(tokens, bias, rate, **groups)  # sums the tokens over the ranks in place
        counts.append(tokens.clone())
        return bias  # it stays: the next pass is the same function

    module.get_updated_expert_bias = read
    try:
        yield counts
    finally:
        module.get_updated_expert_bias = before


@dataclasses.dataclass
class Read:
    """What a pass left: gradients, and tokens per expert of this rank's layers."""

    grads: dict[str, Gradient]
    counts: torch.Tensor | None


def read_pass(layout: Layout, model: Any, rows: Sequence[Rows], own: bool = True) -> Read:
    """One pass without signal by the exact step's schedule, or one a micro-batch by Megatron's own."""
    for chunk in shards.chunks_of(model):
        chunk.zero_grad_buffer()
    with counted_for_bias() as counts:
        if own:
            policy = batches.make_policy(layout, model, rows)
            backward_pass(policy, [{"rows": entry} for entry in rows], lambda _, lp: torch.zeros_like(lp), 1.0, None)
            return Read(shards.gradients(model), counts[0] if counts else None)
        for entry in rows:  # of different widths: gradients add up
            plain_schedule(batches.make_policy(layout, model, [entry]), [{"rows": entry}])
    grads = shards.gradients(model)
    mean = {name: dataclasses.replace(part, value=part.value / len(rows)) for name, part in grads.items()}
    return Read(mean, sum(counts) if counts else None)


def reference_worker(rank: int, world: int, batch: Batch) -> dict[str, Read]:
    """Of every kind of loss, by Megatron alone, on rows that have no padding."""
    reads = {}
    with tiny.megatron(Layout()):
        for losses in LOSSES:
            number = batches.SAMPLES if losses == "seq_aux_loss" else MICRO_BATCHES
            parts = batches.split(batch, number)
            rows = [packed_rows(part["tokens"], part["lengths"]) for part in parts]
            assert all(int(entry.routed.mask.sum()) == entry.tokens.numel() for entry in rows)
            layout = with_losses(Layout(), losses, 1)
            reads[losses] = read_pass(layout, make_model(layout), rows, own=False)
    return reads


@pytest.fixture(scope="module")
def batch() -> Batch:
    return batches.make_batch("uneven")


@pytest.fixture(scope="module")
def reference(batch: Batch) -> dict[str, Read]:
    return distributed.run(reference_worker, 1, batch, timeout=200.0)[0]


def padded_worker(rank: int, world: int, layout: Layout, every: Sequence[str], pickled: bytes) -> dict[str, list[Read]]:
    """For each kind of loss, what a rank has for each width."""
    batch, reads = pickle.loads(pickled), {}
    with tiny.megatron(layout):
        axes = TokenAxes.from_parallel_state()
        for losses in every:
            laid = with_losses(layout, losses, MICRO_BATCHES // axes.axis("dp").size)
            parts = parts_of(laid, batch, axes)
            model, widths = make_model(laid), WIDTHS if losses == "aux_loss" else WIDTHS[::2]
            rows = [rows_of(laid, parts, width, axes.axis("cp").rank) for width in widths]
            reads[losses] = [read_pass(laid, model, of_width) for of_width in rows]
    return reads


def factor_worker(rank: int, world: int, layout: Layout) -> float:
    """What auxiliary losses are multiplied by under context parallelism: some versions of the schedule divide by it."""
    return schedule_cp_factor(layout.cp) / layout.cp


def error(read: Read, expected: Mapping[str, torch.Tensor]) -> float:
    """Largest difference between a rank's gradients and those of one process, over the largest of these."""
    largest = max(float(grad.abs().max()) for grad in expected.values())
    gaps = [
        part.value - (expected[name] if part.dim is None else expected[name].chunk(part.number, part.dim)[part.index])
        for name, part in read.grads.items()
    ]
    return max(float(gap.abs().max()) for gap in gaps) / largest


@pytest.mark.parametrize(
    ("world", "layout", "every"), LAYOUTS, ids=[f"{world}-{layout}" for world, layout, _ in LAYOUTS]
)
def test_padding_adds_nothing_to_what_routers_learn(
    batch, reference, world: int, layout: Layout, every: tuple[str, ...]
) -> None:
    ranks = distributed.run(padded_worker, world, layout, every, pickle.dumps(batch), timeout=200.0)
    [factor] = distributed.run(factor_worker, 1, layout)
    for losses in every:
        expected = {name: part.value * factor for name, part in reference[losses].grads.items()}
        # Megatron computes in float32 whatever the type of the rest: 0.16 the sigmoid, 0.11 the counts of sequences.
        bound = 1e-12 if losses == "aux_loss" else 1e-7
        for widths in (rank[losses] for rank in ranks):
            assert error(widths[0], expected) < bound, losses
            for read in widths[1:]:
                same = {name: part.value for name, part in read.grads.items()}
                own = Read({n: dataclasses.replace(p, dim=None) for n, p in widths[0].grads.items()}, None)
                assert error(own, same) < bound, losses
        for reads in zip(*(rank[losses] for rank in ranks), strict=True):
            check_counts(reads, reference[losses])


def check_counts(reads: Sequence[Read], expected: Read) -> None:
    """Every stage counts the tokens of its own layers, over all ranks that see them."""
    assert (expected.counts is None) == (reads[0].counts is None)
    if expected.counts is not None:
        every = {tuple(counts.tolist()) for read in reads for counts in read.counts}
        assert every == {tuple(counts.tolist()) for counts in expected.counts}


def test_padding_would_train_the_router_without_it(batch, reference) -> None:
    """The fault itself: under Megatron alone the gradient of the same samples grows with the width of their rows."""
    norms = distributed.run(faulty_worker, 1, batch)[0]
    wanted = reference["aux_loss"].grads["decoder.layers.0.mlp.router.weight"].value.norm()
    assert abs(norms[0] / wanted - 1) > 0.05 and norms == sorted(norms)


def faulty_worker(rank: int, world: int, batch: Batch) -> list[float]:
    layout = with_losses(Layout(), "aux_loss")
    with tiny.megatron(layout):
        parts = batches.split({**batch, "tokens": repeated_padding(batch)}, MICRO_BATCHES)
        model = make_model(layout)
        reads = [read_pass(layout, model, rows_of(layout, parts, width, 0), own=False) for width in WIDTHS]
    return [float(read.grads["decoder.layers.0.mlp.router.weight"].value.norm()) for read in reads]


def repeated_padding(batch: Batch) -> torch.Tensor:
    behind = torch.arange(batches.LENGTH) >= batch["lengths"][:, None]
    return torch.where(behind, 0, batch["tokens"])
