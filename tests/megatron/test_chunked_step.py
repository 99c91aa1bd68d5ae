"""The exact step with log-probs from hidden states against one process with all logits: loss and every gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from nemo_fiberpo import logits
from nemo_fiberpo.megatron import output_layer
from nemo_fiberpo.megatron.gpt import gpt_policy
from tests.megatron import batches, comparison, tiny
from tests.megatron.comparison import BOUND, Reference
from tests.megatron.slow import same_metrics
from tests.megatron.tiny import Layout
from tests.support import distributed

pytestmark = pytest.mark.distributed

CHUNKED: dict[str, Any] = {"logprobs": "chunked", "microbatches": 2, "dispatcher": "allgather"}
LAYOUTS = [
    (1, Layout(tied=True, packed=True, **CHUNKED)),
    (2, Layout(tp=2, tied=True, packed=True, **CHUNKED)),
    (2, Layout(tp=2, tied=True, experts=0, sequence_parallel=False, **CHUNKED)),
    (2, Layout(cp=2, packed=True, distributed_optimizer=True, overlap=True, **CHUNKED)),
    (2, Layout(pp=2, tied=True, recompute=True, **CHUNKED)),
]


@pytest.fixture(scope="module")
def references() -> Mapping[tuple[comparison.Kind, str], Reference]:
    return comparison.references_for([layout for _, layout in LAYOUTS], ["penalty"])


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=str)
def test_loss_and_every_gradient_are_those_of_one_process(references, world: int, layout: Layout) -> None:
    expected = references[layout.kind, "penalty"]
    [outcomes] = comparison.run_steps(world, [(layout, "penalty")], references)
    error, name = comparison.largest_error(outcomes, expected)
    print(f"{world} ranks {layout}: gradient error {error:.1e} ({name})")
    assert error <= BOUND, name
    for outcome in outcomes:
        assert outcome.loss == pytest.approx(expected.loss, rel=BOUND)
        assert same_metrics(outcome.metrics, expected.metrics) and outcome.recompute_error < 1e-12


def shapes_worker(rank: int, world: int) -> dict[str, Any]:
    """What the model returns by choice, and what is refused; one process."""
    found: dict[str, Any] = {}
    layout = Layout(experts=0)
    with tiny.megatron(layout):
        model, batch = tiny.make_model(layout), batches.make_batch()
        [laid] = batches.lay_out(layout, [batch], batches.LENGTH, 0)
        vocab = tiny.VOCAB - 3
        rows = dataclasses.replace(laid.rows, targets=laid.rows.targets % vocab)
        given = {"rows": rows}
        layer = output_layer.output_layer(model)
        for choice in ("logits", "auto", "chunked"):
            policy = gpt_policy(model, [rows], None, vocab, choice)
            output = policy.forward(given, model)
            found[choice] = tuple(output.shape), policy.log_probs(output, given).detach()
        assert "forward" not in vars(layer)  # as it was
        large, logits.AUTO_BYTES = logits.AUTO_BYTES, 1
        found["auto, large"] = tuple(gpt_policy(model, [rows], None, vocab).forward(given, model).shape)
        logits.AUTO_BYTES = large
        changes: dict[str, Callable[[], None]] = {
            "bias": lambda: setattr(layer, "bias", torch.nn.Parameter(torch.zeros(1))),
            "deferred": lambda: setattr(layer.config, "defer_embedding_wgrad_compute", True),
            "replaced": lambda: setattr(layer, "forward", layer.forward),
        }
        for name, change in changes.items():
            change()
            policy = gpt_policy(model, [rows], None, vocab, "chunked")
            with pytest.raises(ValueError) as error:
                policy.forward(given, model)
            found[name] = str(error.value)
            layer.bias, layer.config.defer_embedding_wgrad_compute = None, False
        with pytest.raises(ValueError) as error:
            gpt_policy(model, [rows], None, vocab, "chunks")
        found["unknown"] = str(error.value)
    return found


def test_the_choice_is_made_in_the_model() -> None:
    [found] = distributed.run(shapes_worker, 1)
    (rows, width, columns), logits = found["logits"]
    assert columns == tiny.VOCAB and found["auto"][0] == (rows, width, columns)
    assert found["chunked"][0] == found["auto, large"] == (rows, width)
    torch.testing.assert_close(found["chunked"][1], logits, rtol=1e-13, atol=1e-13)
    assert torch.equal(found["auto"][1], logits)
    assert "has a bias" in found["bias"] and "use logits or auto" in found["bias"]
    assert "defer_embedding_wgrad_compute" in found["deferred"]
    assert "was replaced" in found["replaced"]
    assert found["unknown"].startswith("logprobs: 'chunks' is unknown")
