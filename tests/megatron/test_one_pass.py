"""The one-pass step: exact where every cell lies inside a micro-batch, and an error that names the cell where not."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist

from tests.megatron import comparison, tiny
from tests.megatron.batches import STRATA, Batch
from tests.megatron.comparison import BOUND, Reference, take_step
from tests.megatron.slow import same_metrics
from tests.megatron.tiny import Layout
from tests.support import distributed

pytestmark = pytest.mark.distributed

# Rows of two samples at least, so that the prompt groups of `groups_in_two` lie inside micro-batches.
LAYOUTS = [
    (1, Layout(microbatches=8)),
    (2, Layout(microbatches=2, rope=False, overlap=True)),
    (2, Layout(cp=2, microbatches=4)),
    (2, Layout(cp=2, microbatches=2, gathered="slice", packed=True)),
    (2, Layout(pp=2, vpp=2, microbatches=4)),
    (4, Layout(tp=2, cp=2, microbatches=2, packed=True)),
]
CASES = ("trajectory", "groups_in_two")


@pytest.fixture(scope="module")
def references() -> Mapping[tuple[comparison.Kind, str], Reference]:
    return comparison.references_for([layout for _, layout in LAYOUTS], [*CASES, "uneven"])


def both_worker(rank: int, world: int, layout: Layout, pickled: bytes) -> list[tuple]:
    """Outcomes of two passes and of one, case by case."""
    found = []
    with tiny.megatron(layout):
        for batch, strata in pickle.loads(pickled):
            once = dataclasses.replace(layout, one_pass=True)
            found.append((take_step(layout, batch, strata), take_step(once, batch, strata)))
    return found


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=str)
def test_one_pass_is_two_passes_and_the_reference(references, world: int, layout: Layout) -> None:
    """Loss, every metric and every gradient; one reduction over all ranks, and two per micro-batch over cp alone."""
    jobs = [(references[layout.kind, case].batch, comparison.CASES[case].strata) for case in CASES]
    ranks = distributed.run(both_worker, world, layout, pickle.dumps(jobs))
    for case, pairs in zip(CASES, zip(*ranks, strict=True), strict=True):
        expected = references[layout.kind, case]
        two, one = [list(outcomes) for outcomes in zip(*pairs, strict=True)]
        for outcome in one:
            assert outcome.loss == pytest.approx(expected.loss, rel=BOUND)
            assert outcome.loss == one[0].loss and outcome.metrics == one[0].metrics
            assert same_metrics(outcome.metrics, expected.metrics) and same_metrics(outcome.metrics, two[0].metrics)
            assert outcome.calls == 1
        last = one[-1].reductions
        split = layout.cp > 1 and not layout.gathered
        assert len(last) == (1 if world > 1 else 0) + (2 * layout.microbatches if split else 0)
        assert [ranks for ranks, _ in last[:-1]] == [layout.cp] * (len(last) - 1)
        for outcomes in (one, two):
            error, name = comparison.largest_error(outcomes, expected)
            assert error <= BOUND, (case, name)


def refusal_worker(rank: int, world: int, layout: Layout, pickled: bytes, strata: tuple[str, ...]) -> list[str]:
    messages = []
    with tiny.megatron(layout):
        for batch in pickle.loads(pickled):
            try:
                take_step(layout, batch, strata)
            except ValueError as error:
                messages.append(str(error))
            dist.barrier()
    return messages


def spread(batch: Batch, name: str, first: int, second: int) -> Batch:
    """Sample `second` is put into the cell of sample `first`."""
    labels = batch[name].clone()
    labels[second] = labels[first]
    return {**batch, name: labels}


@pytest.mark.parametrize(
    ("world", "layout", "second", "places"),
    [
        (1, Layout(microbatches=4, one_pass=True), 5, ("micro-batch 0 of dp rank 0", "micro-batch 1 of dp rank 0")),
        (2, Layout(microbatches=2, one_pass=True), 9, ("micro-batch 0 of dp rank 0", "micro-batch 0 of dp rank 1")),
        (
            2,
            Layout(cp=2, microbatches=2, one_pass=True),
            9,
            ("micro-batch 0 of dp rank 0", "micro-batch 1 of dp rank 0"),
        ),
    ],
    ids=["two micro-batches", "two ranks", "two micro-batches under cp"],
)
def test_a_cell_in_two_places_is_an_error_that_names_it_on_every_rank(
    references, world: int, layout: Layout, second: int, places: tuple[str, str]
) -> None:
    batch = spread(references[layout.kind, "trajectory"].batch, "trajectory", 1, second)
    label = int(batch["trajectory"][1])
    ranks = distributed.run(refusal_worker, world, layout, pickle.dumps([batch]), ("trajectory",))
    for messages in ranks:
        assert messages == ranks[0]
        [message] = messages
        assert message.startswith("one pass: trajectory") and str(label) in message
        assert all(place in message for place in places), message


def test_prompt_groups_that_are_scattered_are_refused(references) -> None:
    layout = Layout(microbatches=4, one_pass=True)
    batch = references[layout.kind, "uneven"].batch
    [[message]] = distributed.run(refusal_worker, 1, layout, pickle.dumps([batch]), STRATA[1:])
    assert message.startswith("one pass: prompt_group") and "use two passes" in message


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, Layout(microbatches=2, one_pass=True)),
        (2, Layout(cp=2, microbatches=2, one_pass=True)),
        (2, Layout(pp=2, microbatches=2, one_pass=True)),
    ],
    ids=str,
)
@pytest.mark.parametrize(("column", "value"), [("old", math.nan), ("advantage", math.inf)])
def test_non_finite_live_input_raises_on_every_rank(
    references, world: int, layout: Layout, column: str, value: float
) -> None:
    batch = references[layout.kind, "trajectory"].batch
    poisoned = batch[column].clone()
    poisoned[tuple(batch["mask"].nonzero()[0])] = value
    jobs = pickle.dumps([{**batch, column: poisoned}])
    ranks = distributed.run(refusal_worker, world, layout, jobs, ("trajectory",))
    assert all(len(messages) == 1 for messages in ranks)
    texts = [message for messages in ranks for message in messages]
    named = [text for text in texts if "micro-batch 0: " in text]
    assert named and all({"old": "log_ratio", "advantage": "weighted_advantage"}[column] in text for text in named)
    assert all(text in named or "another rank" in text for text in texts)


def test_masked_input_changes_no_bit(references) -> None:
    layout = Layout(cp=2, microbatches=2, one_pass=True, packed=True)
    batch = references[layout.kind, "trajectory"].batch
    noisy = {**batch, "old": torch.where(batch["mask"], batch["old"], math.nan)}
    jobs = pickle.dumps([(layout, one, "trajectory") for one in (batch, noisy)])
    for clean, other in distributed.run(comparison.steps_worker, 2, jobs):
        assert clean.loss == other.loss
        assert all(torch.equal(part.value, other.grads[name].value) for name, part in clean.grads.items())
