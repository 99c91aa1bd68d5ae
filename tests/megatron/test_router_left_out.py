"""Routers learn nothing from padding and left-out sequences, by hand; the micro-batch without a token.

Two tokens with the logits (ln 3, 0) have the scores 3/4 and 1/4 and go to expert 0, so E sum f P =
2 (1 * 3/4 + 0 * 1/4) = 1.5, whatever the padding beside them says, and logsumexp = ln 4.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from nemo_fiberpo.megatron.compat import auxiliary_loss_log, fields_of
from nemo_fiberpo.megatron.groups import TokenAxes
from nemo_fiberpo.megatron.router_losses import balancing_real_tokens
from nemo_fiberpo.megatron.schedule import Policy, refuse_inexact
from nemo_fiberpo.megatron.sequences import Routed, padded_rows
from tests.megatron import batches, tiny
from tests.megatron.batches import Batch
from tests.megatron.test_router_losses import MICRO_BATCHES, Read, make_model, read_pass, with_losses
from tests.megatron.tiny import Layout
from tests.support import distributed

pytestmark = pytest.mark.distributed


def by_hand_worker(rank: int, world: int) -> dict[str, list[float]]:
    """Losses in Megatron's log: two tokens with 0 to 3 places of padding behind them, and a row that is left out."""
    options = (("moe_router_topk", 1), ("moe_router_pre_softmax", True), ("moe_z_loss_coeff", 0.5))
    layout = Layout(experts=2, aux_loss=0.1, options=options)
    logged: dict[str, list[float]] = {}
    with tiny.megatron(layout):
        router = tiny.make_model(layout).module.decoder.layers[0].mlp.router
        with torch.no_grad():
            router.weight.zero_()[0, 0] = 1.0
        for padding in range(4):
            hidden = torch.zeros(2 + padding, 2, tiny.HIDDEN)  # [s, b, h]
            hidden[..., 0] = -7.0
            hidden[:2, 0, 0] = math.log(3.0)
            mask = torch.zeros(2, 2 + padding, dtype=torch.bool)
            mask[0, :2] = True
            policy = Policy(
                router, lambda **_: [], lambda batch, module: module(batch[0])[0], lambda *_: torch.zeros(0), 1, 1,
                routed=lambda batch: Routed(batch[1], batch[1].sum(1)),
            )  # fmt: skip
            auxiliary_loss_log().clear()
            before = dict(vars(router))
            with balancing_real_tokens(policy) as balanced:
                balanced.forward((hidden.requires_grad_(), mask), router).sum().backward()
            assert vars(router).keys() == before.keys()
            assert all(vars(router)[name] is value for name, value in before.items() if name not in ("training",))
            for name, entry in auxiliary_loss_log().items():
                logged.setdefault(name, []).append(float(fields_of(entry)["values"][0]))
    return logged


def test_two_tokens_by_hand() -> None:
    [logged] = distributed.run(by_hand_worker, 1)
    assert logged["load_balancing_loss"] == pytest.approx([1.5] * 4, rel=1e-6)
    assert logged["z_loss"] == pytest.approx([math.log(4.0) ** 2] * 4, rel=1e-6)


def shuffled(scattered: bool) -> Batch:
    """Samples of which the loss leaves out every second one, or the second half."""
    batch = batches.make_batch("uneven")
    mask = torch.zeros_like(batch["mask"])
    mask[: batches.SAMPLES // 2, 5] = True
    order = torch.arange(batches.SAMPLES)
    return {n: c[order.view(2, -1).T.reshape(-1) if scattered else order] for n, c in {**batch, "mask": mask}.items()}


def left_out_worker(rank: int, world: int, layout: Layout) -> dict[bool, tuple[Read, Read]]:
    """Where left-out samples are scattered, and where they are together: the pass with them, and that without them,
    in as many micro-batches."""
    reads = {}
    with tiny.megatron(layout):
        laid = with_losses(layout, "sigmoid")
        model, axes = make_model(laid), TokenAxes.from_parallel_state()
        for scattered in (True, False):
            batch = shuffled(scattered)
            counted, passes = batch["mask"].any(1), []
            options = {"cp_size": layout.cp, "cp_rank": axes.axis("cp").rank, "seq_length": 16}
            for of in (torch.arange(len(counted)), counted.nonzero().squeeze(1)):
                rows = [
                    padded_rows(batch["tokens"], samples, lengths=batch["lengths"], counted=counted, **options)
                    for samples in of.view(MICRO_BATCHES, -1)
                ]
                passes.append(read_pass(laid, model, rows))
            reads[scattered] = passes[0], passes[1]
    return reads


@pytest.mark.parametrize(("world", "layout"), [(1, Layout()), (2, Layout(cp=2)), (2, Layout(pp=2))], ids=str)
def test_sequences_that_the_loss_leaves_out_teach_routers_nothing(world: int, layout: Layout) -> None:
    """Scattered over the micro-batches they are as if they were not there. Together they leave two of the four
    micro-batches without a token, each of which counts as one with losses of 0."""
    for reads in distributed.run(left_out_worker, world, layout):
        for scattered, (left_out, without) in reads.items():
            assert torch.equal(left_out.counts, without.counts)
            for name, part in left_out.grads.items():
                assert bool(part.value.isfinite().all()) and (bool(part.value.any()) or "router" not in name)
                if scattered:
                    largest = float(without.grads[name].value.abs().max())
                    torch.testing.assert_close(part.value, without.grads[name].value, rtol=0, atol=1e-7 * largest)


def test_a_captured_graph_would_keep_the_mask_of_its_capture() -> None:
    refuse_inexact(SimpleNamespace(cuda_graph_impl="local"))
    refuse_inexact(SimpleNamespace(num_moe_experts=8, cuda_graph_impl="none", enable_cuda_graph=False))
    for name, value in (("cuda_graph_impl", "local"), ("enable_cuda_graph", True), ("external_cuda_graph", True)):
        with pytest.raises(ValueError, match=f"^{name}: {value}"):
            refuse_inexact(SimpleNamespace(num_moe_experts=8, **{name: value}))
