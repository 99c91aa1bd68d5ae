"""Coefficients of micro-batches by themselves: exact where no shared cell, no child of one and no clip in one acts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from nemo_fiberpo.objective import optimistic
from nemo_fiberpo.objective.fibration import Quiet, Tokens, gate_cells, measure
from nemo_fiberpo.objective.forest import Forest
from nemo_fiberpo.objective.optimistic import PartCells, differs, gates_can_pass, optimistic_coefficients, part_cells
from tests.objective.cases import CHAIN, Case, branched_case, make_case, tree_case, with_floor, with_gates
from tests.objective.test_host_reads import HostReads

BOUND = 1e-10
FAR = 1e-3
SPLITS: dict[str, Callable[[Case], Tensor]] = {
    "by token": lambda case: torch.arange(len(case.mask)) % 3,
    "by trajectory": lambda case: case.labels["trajectory"] % 3,
    "by group": lambda case: case.labels["prompt_group"] % 2,
    "by domain": lambda case: case.labels["domain"] % 2,
}
"""The micro-batch of every token."""


def guessed(
    case: Case, part_T: Tensor, use_min: bool = False, of: Callable[[PartCells], PartCells] = lambda part: part
) -> Tensor:
    """Optimistic coefficients of all tokens, micro-batch by micro-batch."""
    out, whole = torch.zeros_like(case.log_ratio), case.cells.shared
    held = [(part_T == number).nonzero().squeeze(1) for number in part_T.unique().tolist()]
    for at, part in zip(held, part_cells([case.part(at).cells for at in held], whole), strict=True):
        given = case.log_ratio[at], case.weight[at], of(part), case.hierarchy
        out[at] = optimistic_coefficients(*given, use_min=use_min)
    return out


def undisturbed(case: Case, part_T: Tensor) -> Tensor:
    """Bool [T]: tokens above which no shared cell acts, nor a child of one; from the labels, and from the drifts and
    gates of the whole batch."""
    whole = case.cells.shared
    drift, _ = measure(Tokens.of(whole, case.log_ratio, case.weight), whole, None)
    gates, [forest] = gate_cells(drift, whole, case.hierarchy), whole.forests
    joint_T = whole.layout.at_tokens(torch.arange(len(whole.count_J)).double()).long()
    eps_J, own = gates.table_5J[4], (case.log_ratio < 0).long()
    reference_T = drift.reference_2J[own, joint_T]
    clipped_T = (case.log_ratio - reference_T).abs() > eps_J[joint_T]
    clipped_T |= (drift.reference_2J[:, joint_T].abs() > eps_J[joint_T]).any(0)
    acts_N = (drift.drift[0].abs() > gates.budget[0]).any(0)
    parts: dict[int, set[int]] = {}
    for token in case.mask.nonzero().squeeze(1).tolist():
        for node in forest.node_KJ[:, joint_T[token]].tolist():
            parts.setdefault(node, set()).add(int(part_T[token]))
    disturbed = set()
    for node, held in parts.items():
        if len(held) > 1 and node < len(acts_N):
            children = (forest.parent_N == node).nonzero().squeeze(1).tolist()
            leaves = clipped_T & (forest.leaf_J[joint_T] == node) & case.mask
            if bool(acts_N[[node, *children]].any()) or bool(leaves.any()):
                disturbed.add(node)
    paths = forest.node_KJ[:, joint_T].T.tolist()
    return torch.tensor([not disturbed & set(path) for path in paths]) & case.mask


def quiet_by_hand() -> tuple[Case, Tensor]:
    """Trajectories of 10, 1 and 10 tokens with means .16, 0 and 0 in one domain, whose mean is 1.6 / 21 = .076: all are
    within the budget of .09. Without the third, in another micro-batch, the mean is .145, and the second is not."""
    trajectory = torch.tensor([0] * 10 + [1] + [2] * 10)
    log_ratio = torch.where(trajectory == 0, 0.16, 0.0).double()
    chain = tuple(fpo.Stratum(name, fpo.Budget(size, size)) for name, size in (("domain", 1.0), ("trajectory", 0.09)))
    labels = {"domain": torch.zeros_like(trajectory), "trajectory": trajectory}
    tokens = torch.ones_like(trajectory, dtype=torch.bool), log_ratio, torch.linspace(-1.0, 1.5, 21).double()
    return Case(labels, *tokens, fpo.Hierarchy(chain, 0.5)), trajectory // 2


def random_chains() -> Iterator[tuple[str, Case, Tensor]]:
    """Chains with all gates that pass exactly, budgets from narrow to wide, floors, and all splits."""
    yield "by hand", *quiet_by_hand()
    for seed in range(2):
        for budget in (0.03, 0.1, 0.4, 3.0):
            made = make_case(4, seed, num=80, budget=budget, slope=0.6)
            made = replace(made, hierarchy=replace(made.hierarchy, token_clip=0.3 * budget + 0.02))
            hierarchies = {
                "rollback": made.hierarchy,
                "clip": with_gates(made.hierarchy, "clip"),
                "floor": with_floor(with_gates(made.hierarchy, "rollback", "clip"), 4),
            }
            for name, hierarchy in hierarchies.items():
                case = replace(made, hierarchy=hierarchy)
                for split, part_of in SPLITS.items():
                    yield f"{seed} {budget} {name} {split}", case, part_of(case)
    for seed in range(2):
        case = tree_case(seed, scale=0.03)
        yield f"tree {seed}", case, SPLITS["by trajectory"](case)


@pytest.mark.parametrize("use_min", [False, True])
def test_undisturbed_tokens_have_their_exact_coefficients(use_min: bool):
    some, all_, acting = 0, 0, 0
    for name, case, part_T in random_chains():
        exact = fpo.token_coefficients(case.log_ratio, case.weight, case.cells, case.hierarchy, use_min=use_min)
        guess, clear = guessed(case, part_T, use_min), undisturbed(case, part_T)
        assert float((guess - exact)[clear].abs().sum()) <= BOUND, name
        assert not bool(differs(exact, guess, case.weight)[clear].any()), name
        assert not bool(guess[~case.mask].any())
        some += bool(clear.any()) and bool((~clear & case.mask).any())
        all_ += torch.equal(clear, case.mask)
        acting += bool((exact - case.weight * case.log_ratio.exp())[clear].abs().gt(FAR).any())
    assert min(some, all_, acting) > 3, (some, all_, acting)


def test_by_hand_no_gate_acts():
    case, part_T = quiet_by_hand()
    assert bool(undisturbed(case, part_T).all())
    assert torch.allclose(guessed(case, part_T), case.weight * case.log_ratio.exp(), rtol=0, atol=BOUND)


def test_with_every_cell_in_one_micro_batch_they_are_exact_whatever_acts():
    for seed in range(4):
        case = make_case(4, seed, num=80, slope=0.6)
        [part] = part_cells([case.cells], case.cells.shared)
        assert part.local
        part_T = case.labels["domain"] - case.labels["domain"].min()
        exact = case.surrogate().coefficients
        assert torch.allclose(guessed(case, part_T), exact, rtol=0, atol=BOUND)
        assert differs(exact, case.weight * case.log_ratio.exp(), case.weight).any()


def only_roots(quiet_N: Tensor, forest: Forest) -> Tensor:
    return quiet_N & (forest.parent_N == len(quiet_N))


MISTAKES: dict[str, Callable[[PartCells], PartCells]] = {
    "no gate is taken to pass": lambda part: replace(
        part, quiet=Quiet(tuple(torch.zeros_like(n) for n in part.quiet.nodes), torch.zeros_like(part.quiet.tokens_J))
    ),
    "children keep their gates": lambda part: replace(
        part, quiet=replace(part.quiet, nodes=tuple(map(only_roots, part.quiet.nodes, part.cells.forests)))
    ),
    "tokens keep their clips": lambda part: replace(
        part, quiet=replace(part.quiet, tokens_J=torch.zeros_like(part.quiet.tokens_J))
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows_in_undisturbed_tokens(mistake: str):
    worst = 0.0
    for _, case, part_T in random_chains():
        exact = fpo.token_coefficients(case.log_ratio, case.weight, case.cells, case.hierarchy)
        clear = undisturbed(case, part_T)
        guess = guessed(case, part_T, of=MISTAKES[mistake])
        worst = max(worst, float((guess - exact)[clear].abs().max()) if bool(clear.any()) else 0.0)
    assert worst > FAR


def test_what_only_seems_local_is_found_out():
    """Every disturbed coefficient differs from the exact one or is equal to it: none is taken for the other."""
    found = 0
    for _, case, part_T in random_chains():
        exact = fpo.token_coefficients(case.log_ratio, case.weight, case.cells, case.hierarchy)
        guess = guessed(case, part_T)
        wrong = differs(exact, guess, case.weight)
        assert float((exact - guess)[~wrong].abs().max()) < BOUND
        found += int(wrong.sum())
    assert found > 0


@pytest.mark.parametrize("form", ["after", "in two places"])
def test_with_branches_a_shared_cell_leaves_the_plain_ratio(form: str):
    case = branched_case(form, 3)
    part_T = torch.arange(len(case.mask)) % 2
    plain = torch.where(case.mask, case.weight * case.log_ratio.exp(), 0.0)
    assert torch.allclose(guessed(case, part_T), plain, rtol=0, atol=BOUND)
    whole = torch.zeros_like(part_T)
    assert torch.allclose(guessed(case, whole), case.surrogate().coefficients, rtol=0, atol=BOUND)


@pytest.mark.parametrize(
    ("gating", "split"),
    [(fpo.PpoClip(0.2, 0.2), "by token"), (fpo.TrulyPpo(0.2, 0.3), "by token"), (fpo.Gspo(0.03, 0.04), "by trajectory"),
     (fpo.Apc(0.1), "by trajectory"), (fpo.Apc(0.1, "prompt_group"), "by group")],
    ids=str,
)  # fmt: skip
def test_other_maps_are_exact_where_their_cells_are_whole(gating: fpo.RatioGating, split: str):
    case = make_case(4, 5, num=80, scale=0.3)
    part_T, whole = SPLITS[split](case), case.cells.shared
    exact = case.surrogate(gating=gating).coefficients
    for number in part_T.unique().tolist():
        at = (part_T == number).nonzero().squeeze(1)
        [part] = part_cells([case.part(at).cells], whole)
        given = case.log_ratio[at], case.weight[at], part, case.hierarchy, gating
        assert torch.allclose(optimistic_coefficients(*given), exact[at], rtol=0, atol=BOUND)


def test_a_gate_that_bends_at_once_never_passes():
    hierarchy = make_case(3, 1).hierarchy
    assert gates_can_pass(hierarchy, None) and gates_can_pass(with_gates(hierarchy, "clip"), None)
    assert not gates_can_pass(replace(hierarchy, gate="soft"), None)
    bent = with_gates(hierarchy, "rollback", "soft")
    assert not gates_can_pass(bent, None) and gates_can_pass(bent, fpo.PpoClip(0.2, 0.2))


def test_the_host_reads_nothing():
    case = make_case(len(CHAIN), 1)
    [part] = part_cells([case.part(torch.arange(30)).cells], case.cells.shared)
    for gating in (None, fpo.PpoClip(0.2, 0.2), fpo.Gspo(0.03, 0.04)):
        with HostReads(part.cells) as reads:
            optimistic_coefficients(case.log_ratio[:30], case.weight[:30], part, case.hierarchy, gating)
        assert not reads.found


def test_rounding_is_no_difference_and_what_is_not_finite_is_one():
    for dtype in (torch.float32, torch.float64):
        unit = torch.finfo(dtype).eps
        exact = torch.tensor([1.0, 1.0, 0.0, 0.0, float("nan"), 1e-3], dtype=dtype)
        guess = torch.tensor([1 + 4 * unit, 1 + 1e4 * unit, 0.0, 0.0, float("nan"), 2e-3], dtype=dtype)
        weight = torch.tensor([1.0, 1.0, float("inf"), float("nan"), 1.0, 1.0], dtype=dtype)
        assert differs(exact, guess, weight).tolist() == [False, True, False, False, True, True]
    assert optimistic.ROUNDING < 1e3
