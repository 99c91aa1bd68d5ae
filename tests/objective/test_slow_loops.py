"""Random hierarchies of every feature against the slow loops: with every gate, with the minimum, with named clips."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import nemo_fiberpo as fpo
from nemo_fiberpo.objective.gates import GATES
from tests.objective.cases import Case, with_gates
from tests.objective.checks import equals_the_slow_loops
from tests.objective.random_cases import make_case

SEEDS = range(1, 300, 3)


def random_case(seed: int) -> tuple[Case, bool]:
    """A case, and whether with the minimum. One in three has the gate (10) alone, the others two gates or three; all
    whose coarsest cells have names have a token clip of its own for one of them."""
    drawn = make_case(seed)
    hierarchy = fpo.load_hierarchy(drawn.config)
    gates = [["rollback"], ["soft", "rollback"], ["clip", "soft", "rollback"]][seed % 9 // 3]
    hierarchy = with_gates(hierarchy, *gates)
    if hierarchy.active:
        coarsest = hierarchy.active[0]
        called = [f"{name}" for name in drawn.names.get(coarsest.name, [])] if not coarsest.join else []
        hierarchy = replace(hierarchy, token_clips=dict.fromkeys(called[:1], 0.4 * hierarchy.token_clip))
    labels = {name: torch.from_numpy(np.ascontiguousarray(label)) for name, label in drawn.labels.items()}
    tokens = (torch.from_numpy(v.copy()) for v in (drawn.live, drawn.log_ratio, drawn.weighted_advantage))
    return Case(labels, *tokens, hierarchy, drawn.names), seed % 2 == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_hierarchy_equals_the_slow_loops(seed: int):
    case, use_min = random_case(seed)
    equals_the_slow_loops(case, use_min)


def test_the_cases_above_have_every_gate_named_clips_and_binding_minima():
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        case, use_min = random_case(seed)
        seen.update({f"gate {case.hierarchy.gate_of(stratum).name}" for stratum in case.hierarchy.active})
        seen.update(["a named clip"] if case.hierarchy.token_clips else [])
        seen.update(["a soft column"] if any(v.ndim == 2 for v in case.labels.values()) else [])
        if use_min:
            without = case.surrogate().value
            seen.update(["a minimum that binds"] if case.surrogate(use_min=True).value < without - 1e-9 else [])
    assert set(seen) == {*(f"gate {name}" for name in GATES), "a named clip", "a soft column", "a minimum that binds"}
    assert min(seen.values()) >= 10, seen
