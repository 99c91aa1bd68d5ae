"""Strata of labels that the sampled tokens give, on the layouts of `test_exact_step` that split sequences over ranks:
labels, loss, metrics and every gradient are those of one process, whose labels share no code with the package."""

from __future__ import annotations

import pytest
import torch

from nemo_fiberpo.megatron.sequences import packed_rows, padded_rows
from tests.megatron import batches, comparison
from tests.megatron.comparison import BOUND
from tests.megatron.segments import SEGMENT, SEGMENTS
from tests.megatron.slow import same_metrics
from tests.megatron.test_exact_step import FEW, MANY

CASES = ("segments", "segments_inside")
JOBS = [(world, layout) for world, layout in FEW + MANY if layout.cp > 1 or layout.splits_sequence]


@pytest.fixture(scope="module")
def references():
    return comparison.references_for([layout for _, layout in JOBS], CASES)


def test_every_segment_has_live_and_masked_tokens():
    batch = batches.make_batch("segments")
    for number in range(len(SEGMENTS)):
        here = batch[SEGMENT] == number
        assert int((here & batch["mask"]).sum()) > 5
    assert int(batch["ignored"].sum()) > 5


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "layout"), JOBS, ids=[f"{world}-{layout}" for world, layout in JOBS])
def test_labels_and_gradients_are_those_of_one_process(references, world, layout):
    every = comparison.run_steps(world, [(layout, case) for case in CASES], references)
    for case, outcomes in zip(CASES, every, strict=True):
        expected = references[layout.kind, case]
        error, name = comparison.largest_error(outcomes, expected)
        print(f"{world} ranks {layout} {case}: gradient error {error:.1e} ({name})")
        assert all(outcome.same_labels for outcome in outcomes)
        assert comparison.loss_error(outcomes, expected) <= BOUND and error <= BOUND, name
        for outcome in outcomes:
            assert same_metrics(outcome.metrics, expected.metrics)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_labels_follow_their_tokens_into_rows(packed, cp):
    batch = batches.make_batch("segments")
    column, token = batch[SEGMENT] + 1, batch["tokens"][:, 1:]
    seen = torch.zeros_like(batch["mask"])
    for rank in range(cp):
        options = {"lengths": batch["lengths"], "cp_size": cp, "cp_rank": rank, "multiple": 2 * cp}
        rows = packed_rows(batch["tokens"], **options) if packed else padded_rows(batch["tokens"], **options)
        label, here = rows.take(column), rows.source >= 0
        assert torch.equal(rows.take(token)[here], rows.targets[here]), "of the token that is predicted"
        assert torch.equal(label[here], column.flatten()[rows.source[here]]) and not label[~here].any()
        rows.put(torch.ones_like(label).bool(), seen)
    assert bool(seen[batch["mask"] | batch["ignored"]].all()), "every response token is in the rows of one rank"
