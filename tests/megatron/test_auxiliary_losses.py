"""The auxiliary losses of routers, on samples without padding: those of Megatron's own schedule, on every layout."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from nemo_fiberpo.megatron.compat import schedule_cp_factor
from nemo_fiberpo.megatron.groups import TokenAxes
from nemo_fiberpo.verification import shards
from tests.megatron import batches, tiny
from tests.megatron.batches import Batch
from tests.megatron.comparison import take_step
from tests.megatron.test_exact_step import plain_schedule
from tests.megatron.tiny import Layout
from tests.support import distributed

pytestmark = pytest.mark.distributed


def silent_step(layout: Layout, batch: Batch) -> dict[str, shards.Gradient]:
    """An exact step without signal: what gradient there is comes from the auxiliary losses."""
    return take_step(layout, {**batch, "advantage": torch.zeros_like(batch["advantage"])}).grads


def aux_loss_worker(
    rank: int, world: int, layout: Layout, pickled: bytes
) -> tuple[float, dict[str, shards.Gradient], float]:
    """Largest difference between the gradients of an exact step without signal and of Megatron's own schedule; the
    former; and what the latter multiplies a loss by under context parallelism, over the size of that axis."""
    batch = pickle.loads(pickled)
    with tiny.megatron(layout):
        stepped = silent_step(layout, batch)
        model = tiny.make_model(layout)
        step = batches.make_step(layout, batch, batches.STRATA, TokenAxes.from_parallel_state())
        plain_schedule(batches.make_policy(layout, model, step.rows), step.microbatches)
        plain = shards.gradients(model)
        assert any(part.value.any() for part in plain.values())
        difference = max(float((stepped[name].value - part.value).abs().max()) for name, part in plain.items())
        return difference, stepped, schedule_cp_factor(layout.cp) / layout.cp


AUXILIARY = [
    (1, Layout(microbatches=4)),
    (2, Layout(pp=2, vpp=2, microbatches=4)),
    (2, Layout(tp=2, microbatches=4)),
    (2, Layout(ep=2, microbatches=2)),
    (2, Layout(cp=2, microbatches=4)),
    (2, Layout(cp=2, microbatches=4, gathered="slice")),
    (4, Layout(pp=2, cp=2, ep=2, microbatches=4)),
]
"""Layouts whose micro-batches hold the same samples."""


@pytest.fixture(scope="module")
def batch() -> bytes:
    """Samples that are all as long as their rows, with any old log-probs: without signal these say nothing."""
    made = batches.make_batch("uneven")
    full = torch.full_like(made["lengths"], batches.LENGTH)
    return pickle.dumps({**made, "lengths": full, "old": torch.full_like(made["log_ratio"], -3.0)})


def test_auxiliary_losses_keep_megatrons_scale(batch) -> None:
    """Without padding the exact step adds nothing to what Megatron's own schedule gives. That gradient is the same on
    all layouts, but for context parallelism in the versions whose schedule has no factor for it: there it is divided by
    cp. What padding adds to Megatron's own is in test_router_losses.py."""
    whole: dict[str, torch.Tensor] = {}
    for world, layout in AUXILIARY:
        losses = {"aux_loss": 0.1, "options": (("moe_z_loss_coeff", 0.1),), "layers": 4}
        loaded = dataclasses.replace(layout, **losses)
        ranks = distributed.run(aux_loss_worker, world, loaded, batch)
        whole = whole or {name: part.value for name, part in ranks[0][1].items()}
        largest = max(float(grad.abs().max()) for grad in whole.values())
        assert all(difference < 1e-13 * largest for difference, _, _ in ranks), layout
        for _, parts, factor in ranks:
            for name, part in parts.items():
                full = whole[name] if part.dim is None else whole[name].chunk(part.number, part.dim)[part.index]
                assert float((part.value - factor * full).abs().max()) < 1e-13 * largest, (layout, name)


def several_losses_worker(rank: int, world: int, layout: Layout, pickled: bytes) -> tuple[float, float] | None:
    """The same difference, and the largest gradient, with three balancing losses at once, where Megatron has them."""
    from megatron.core.transformer.moe.router import TopKRouter

    if not hasattr(TopKRouter, "get_aux_loss_coeff"):
        return None
    three = (("moe_router_load_balancing_type", ["aux_loss", "seq_aux_loss", "global_aux_loss"]),)
    loaded = dataclasses.replace(layout, options=(*three, ("moe_aux_loss_coeff", [0.1, 0.2, 0.3])))
    difference, stepped, _ = aux_loss_worker(rank, world, loaded, pickled)
    return difference, max(float(part.value.abs().max()) for part in stepped.values())


@pytest.mark.parametrize(("world", "layout"), [(2, Layout(microbatches=4)), (2, Layout(tp=2, microbatches=2))], ids=str)
def test_several_balancing_losses_are_megatrons(batch, world: int, layout: Layout) -> None:
    for outcome in distributed.run(several_losses_worker, world, layout, batch):
        assert outcome is None or outcome[0] < 1e-7 * outcome[1]  # Megatron averages the counts of ranks in float32
