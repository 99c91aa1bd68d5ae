"""Weights for the mismatch of engine and model: each kind by loops and by hand, on one rank and split over several."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nemo_fiberpo.objective import RolloutCorrection, build_cells, correction_metrics, correction_weights
from nemo_fiberpo.objective import rollout_correction as module
from tests.objective.ranks import on_ranks

CORRECTIONS = {
    "tis": RolloutCorrection("tis", high=1.1),
    "icepop": RolloutCorrection("icepop", 0.85, 1.2),
    "icepop, mask alone": RolloutCorrection("icepop", 0.85, 1.2, keep_weight=False),
    "geometric mean": RolloutCorrection("sequence_mask", 0.96, 1.05),
    "geometric mean, mask alone": RolloutCorrection("sequence_mask", 0.96, 1.05, keep_weight=False),
    "extremes": RolloutCorrection("sequence_mask", 0.75, 1.3, sequence_ratio="extremes"),
    "extremes, mask alone": RolloutCorrection("sequence_mask", 0.75, 1.3, False, "extremes"),
}


def batch(rows: int = 12, width: int = 10) -> dict[str, Tensor]:
    """Trajectories of 0 to `width` tokens; masked places hold what must not be read."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, width + 1, (rows,), generator=generator)
    lengths[:3] = torch.tensor([0, 1, width])
    mask = torch.arange(width) < lengths[:, None]
    rollout = -3 * torch.rand(rows, width, generator=generator, dtype=torch.float64)
    drift = torch.randn(rows, 1, generator=generator, dtype=torch.float64) * 0.05
    noise = torch.randn(rows, width, generator=generator, dtype=torch.float64) * 0.15
    old = torch.where(mask, rollout + drift + noise, math.nan)
    rollout = torch.where(mask, rollout, math.inf)
    trajectory = torch.arange(rows)[:, None].expand(rows, width)
    return {"old": old, "rollout": rollout, "mask": mask, "trajectory": trajectory}


def by_loops(data: dict[str, Tensor], correction: RolloutCorrection) -> tuple[Tensor, Tensor]:
    """Weights, and which tokens are touched, token by token from probabilities instead of their logarithms."""
    weight, touched = torch.zeros_like(data["old"]), torch.zeros_like(data["mask"])
    for row, width in enumerate(data["mask"].sum(1).tolist()):
        ratios = [math.exp(data["old"][row, t]) / math.exp(data["rollout"][row, t]) for t in range(width)]
        mean = math.prod(ratios) ** (1 / width) if width else 1.0
        for t, ratio in enumerate(ratios):
            low, high = correction.low, correction.high
            if correction.kind == "tis":
                out, value = ratio > high, min(ratio, high)
            else:
                if correction.kind == "icepop":
                    out = not low <= ratio <= high
                elif correction.sequence_ratio == "geometric_mean":
                    out = not low <= mean <= high
                else:
                    out = not (low <= min(ratios) and max(ratios) <= high)
                value = 0.0 if out else ratio if correction.keep_weight else 1.0
            weight[row, t], touched[row, t] = value, out
    return weight, touched


def weights(data: dict[str, Tensor], correction: RolloutCorrection) -> module.Corrected:
    flat = {name: value.flatten() for name, value in data.items()}
    cells = build_cells(["trajectory"], {"trajectory": flat["trajectory"]}, flat["mask"], shape=data["mask"].shape)
    return correction_weights(flat["old"], flat["rollout"], cells, correction)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_weights_are_those_of_the_definition(name: str):
    data, correction = batch(), CORRECTIONS[name]
    found, (expected, touched) = weights(data, correction), by_loops(data, correction)
    assert torch.allclose(found.weight, expected.flatten(), rtol=1e-13, atol=0)
    assert 0 < touched.sum() < data["mask"].sum(), "both happen"
    metrics = correction_metrics(found.sums)
    live = data["mask"].sum().item()
    difference = (data["old"] - data["rollout"])[data["mask"]].abs().mean()
    assert metrics["touched"].item() == pytest.approx(touched.sum().item() / live)
    assert metrics["abs_log_ratio"].item() == pytest.approx(difference.item())
    assert metrics["mean_weight"].item() == pytest.approx(expected.sum().item() / live)


def test_by_hand():
    """Ratios 2, 1/2 and 1 in one trajectory, whose geometric mean is 1; 4 alone in another."""
    data = {
        "old": torch.tensor([[2.0, 0.5, 1.0], [4.0, 1.0, 1.0]]).double().log(),
        "rollout": torch.zeros(2, 3, dtype=torch.float64),
        "mask": torch.tensor([[True, True, True], [True, False, False]]),
        "trajectory": torch.tensor([[0, 0, 0], [1, 1, 1]]),
    }

    def of(*given, **named) -> list[float]:
        return [round(value, 12) for value in weights(data, RolloutCorrection(*given, **named)).weight.tolist()]

    assert of("tis", high=1.5) == [1.5, 0.5, 1.0, 1.5, 0.0, 0.0]
    assert of("icepop", 0.9, 2.5) == [2.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert of("icepop", 0.9, 2.5, keep_weight=False) == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert of("sequence_mask", 0.9, 1.1) == [2.0, 0.5, 1.0, 0.0, 0.0, 0.0]
    assert of("sequence_mask", 0.9, 5.0, sequence_ratio="extremes") == [0.0, 0.0, 0.0, 4.0, 0.0, 0.0]


def split(data: dict[str, Tensor], how: str, ranks: int) -> list[Tensor]:
    """Flat places of the tokens of every rank."""
    places = torch.arange(data["mask"].numel()).view(data["mask"].shape)
    if how == "columns":  # as context parallelism: each rank has a part of every trajectory
        return [places[:, rank::ranks].flatten() for rank in range(ranks)]
    generator = torch.Generator().manual_seed(1)
    return list(places.flatten()[torch.randperm(places.numel(), generator=generator)].chunk(ranks))


def on_several(data: dict[str, Tensor], correction: RolloutCorrection, how: str, ranks: int) -> tuple[Tensor, Tensor]:
    """Weights put together from all ranks, and the sum of their `sums`."""
    flat = {name: value.flatten() for name, value in data.items()}
    places = split(data, how, ranks)
    parts = [{name: value[own] for name, value in flat.items()} for own in places]
    cells = [build_cells(["trajectory"], {"trajectory": part["trajectory"]}, part["mask"]) for part in parts]
    censuses = [entry.census() for entry in cells]

    def work(rank: int, reduce: Callable[[Tensor], Tensor]) -> module.Corrected:
        shared = cells[rank].share(censuses, rank)
        return correction_weights(parts[rank]["old"], parts[rank]["rollout"], shared, correction, reduce)

    found, meeting = on_ranks(ranks, work)
    assert {len(sizes) for sizes in meeting.sizes} == {int(correction.kind == "sequence_mask")}
    weight = torch.zeros_like(flat["old"])
    for own, one in zip(places, found, strict=True):
        weight[own] = one.weight
    return weight, torch.stack([one.sums for one in found]).sum(0)


@pytest.mark.parametrize("how", ["columns", "scattered"])
@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_ranks_that_share_trajectories_have_the_weights_of_one(name: str, ranks: int, how: str):
    data, correction = batch(), CORRECTIONS[name]
    expected = weights(data, correction)
    weight, sums = on_several(data, correction, how, ranks)
    assert torch.equal(weight, expected.weight)
    assert torch.allclose(sums, expected.sums, rtol=1e-13)


def test_a_trajectory_that_is_gated_by_the_part_of_one_rank_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "sum_nodes", lambda values, reduce, riders: ([value for _, value in values], riders))
    for name in ("geometric mean", "extremes"):
        data, correction = batch(), CORRECTIONS[name]
        flat = {key: value.flatten() for key, value in data.items()}
        wrong = torch.zeros_like(flat["old"])
        parts = split(data, "columns", 2)
        cells = [
            build_cells(["trajectory"], {"trajectory": flat["trajectory"][own]}, flat["mask"][own]) for own in parts
        ]
        for rank, own in enumerate(parts):
            shared = cells[rank].share([entry.census() for entry in cells], rank)
            wrong[own] = correction_weights(flat["old"][own], flat["rollout"][own], shared, correction).weight
        assert not torch.allclose(wrong, by_loops(data, correction)[0].flatten())


@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_live_log_prob_that_is_not_finite_is_never_a_weight(name: str, value: float):
    data = batch()
    data["rollout"][2, 4] = value
    assert weights(data, CORRECTIONS[name]).weight.view(data["mask"].shape)[2, 4].isnan()


def test_ratios_too_large_for_a_float_are_truncated():
    data = batch()
    data["rollout"][2, 4] = data["old"][2, 4] - 2000.0
    assert weights(data, CORRECTIONS["tis"]).weight.view(data["mask"].shape)[2, 4] == 1.1


def test_the_weights_carry_no_gradient():
    data = batch()
    data["old"] = data["old"].nan_to_num(0.0).requires_grad_()
    assert not weights(data, CORRECTIONS["tis"]).weight.requires_grad


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "mis"}, "kind: must be one of none, tis, icepop, sequence_mask"),
        ({"kind": "tis"}, "high: is required for kind tis; usual are 2"),
        ({"kind": "tis", "low": 0.5, "high": 2.0}, "low: is not for kind tis"),
        ({"kind": "icepop", "high": 2.0}, "low: is required for kind icepop; usual are 0.5 and 5"),
        ({"kind": "icepop", "low": 2.0, "high": 0.5}, "low: 2 must be smaller than high = 0.5"),
        ({"kind": "none", "high": 2.0}, "high: is not for kind none"),
        ({"kind": "tis", "high": 2.0, "keep_weight": False}, "keep_weight: false is not for kind tis"),
        ({"kind": "tis", "high": -1}, "high: must be"),
        ({"kind": "icepop", "low": 0.5, "high": 2, "sequence_ratio": "extremes"}, "sequence_ratio: is for kind sequ"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields: dict, said: str):
    with pytest.raises(ValueError, match=said):
        RolloutCorrection(**fields)
