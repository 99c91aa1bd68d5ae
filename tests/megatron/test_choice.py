"""Which step is taken where, by what second passes have cost."""

from __future__ import annotations

from nemo_fiberpo.megatron.choice import RETRY, StepChoice
from nemo_fiberpo.step_cost import FORWARD, FORWARD_RECOMPUTED


def visits(choice: StepChoice, place: int, share: float, number: int) -> list[bool]:
    """Whether the optimistic step was taken at each of the visits, where its second pass costs `share`."""
    taken = []
    for _ in range(number):
        taken.append(choice.optimistic(place))
        if taken[-1]:
            choice.note(place, share)
    return taken


def test_it_is_taken_where_it_is_cheaper_than_a_forward_pass():
    assert all(visits(StepChoice(), 1, FORWARD - 0.01, 3 * RETRY))


def test_recomputation_makes_a_forward_pass_cheaper():
    choice = StepChoice()
    choice.note(1, 0.3)
    assert choice.optimistic(1) and not choice.optimistic(1, FORWARD_RECOMPUTED)


def test_elsewhere_it_is_tried_once_and_then_now_and_again():
    taken = visits(StepChoice(), 1, 1.0, 4 * RETRY)
    assert taken[0] and sum(taken) == 1 + 4
    mean = sum(1.0 + (1.0 if one else FORWARD) for one in taken[1:]) / len(taken[1:])
    assert mean <= 1.38, "the price of trying where everything acts all the time"


def test_a_place_without_a_mean_takes_that_of_the_place_before():
    choice = StepChoice()
    visits(choice, 1, 1.0, 1)
    assert not choice.optimistic(2)
    quiet = StepChoice()
    visits(quiet, 1, 0.0, 1)
    assert quiet.optimistic(2)


def test_it_comes_back_when_second_passes_become_rare():
    choice = StepChoice()
    visits(choice, 1, 1.0, 5)
    taken = visits(choice, 1, 0.0, 8 * RETRY)
    assert not taken[0] and all(taken[-RETRY:])


def test_a_single_step_does_not_decide():
    choice = StepChoice()
    visits(choice, 1, 0.0, 10)
    choice.note(1, 1.0)
    assert choice.optimistic(1)
