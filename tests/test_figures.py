"""Figures 2 to 4: the settings of the paper's captions, and the order and the borders of what they show. The paper
prints no values for them, so none are compared. And what the demonstrations of segments and of the claims show.
"""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import nemo_fiberpo as fpo

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"
F64 = torch.float64


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(FIGURES))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_figure_2_has_the_settings_of_the_caption(figure):
    module = figure("figure2")
    assert module.SLOPE.tolist() == [2.0]
    assert module.BUDGET.tolist() == [[0.20], [0.10]]


def test_figure_2_passes_through_the_five_regimes_and_changes_at_their_borders(figure):
    module = figure("figure2")
    borders = list(module.borders().values())
    assert borders == sorted(borders) and borders[-1] < module.END
    edges = [0.0, *borders, module.END]
    middles = torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(edges)], dtype=F64)
    expected = ["G-I", "G-II,r", "G-II", "G-III,r", "G-III"]
    assert module.regime_names(module.on_ray(middles)) == expected
    for at, before, after in zip(borders, expected, expected[1:], strict=False):
        near = torch.tensor([at - 1e-9, at + 1e-9], dtype=F64)
        assert module.regime_names(module.on_ray(near)) == [before, after]


def test_figure_2_base_weight_falls_then_rises_to_c_plus_and_returns_to_one(figure):
    module = figure("figure2")
    c_neg, c_neg_end, c_pos, c_pos_end = module.borders().values()
    pos = torch.linspace(0.0, module.END, 3601, dtype=F64)
    weight = module.log_base_weight(module.on_ray(pos))
    assert weight[0] == 0.0
    step, middle = weight.diff(), (pos[1:] + pos[:-1]) / 2
    assert (step[middle < c_neg - 1e-3] < 0).all(), "N grows faster than P"
    assert (step[(middle > c_neg + 1e-3) & (middle < c_pos - 1e-3)] > 0).all()
    assert (step[(middle > c_pos + 1e-3) & (middle < c_pos_end - 1e-3)] < 0).all()
    assert (weight[pos > c_pos_end + 1e-9] == 0.0).all()
    assert weight.max() <= c_pos + 1e-15
    passed = (pos > c_neg_end) & (pos <= c_pos)
    torch.testing.assert_close(weight[passed], pos[passed], rtol=0, atol=1e-15)


def test_figure_3_has_the_settings_of_the_caption(figure):
    module = figure("figure3")
    assert (module.TOKENS, module.SLOPE, module.TOKEN_CLIP, module.ZOOM) == (3, 3.0, 0.025, 0.18)
    assert (module.BUDGET.pos, module.BUDGET.neg) == (0.15, 0.09)
    sides = (module.CORNERS - module.CORNERS.roll(1, 0)).norm(dim=1)
    torch.testing.assert_close(sides, torch.ones(3, dtype=F64))
    torch.testing.assert_close(module.ratios_at(module.CORNERS), 3 * torch.eye(3, dtype=F64), rtol=0, atol=1e-14)
    ratios = module.ratios_at(torch.rand(20, 2, dtype=F64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(ratios.mean(1), torch.ones(20, dtype=F64))


def test_figure_3_global_regimes_are_five_rings(figure):
    module = figure("figure3")
    axis = torch.linspace(-0.6, 0.6, 240, dtype=F64)
    ratios = module.ratios_at(module.grid(axis, axis))
    assert set(module.regimes_of(ratios[ratios.min(1).values > 0.0])[0].tolist()) == {0, 1, 2, 3, 4}
    # outwards from the centroid the regime never goes back, and every ray ends in the last one
    angle = torch.linspace(0.0, 2.0 * torch.pi, 61, dtype=F64)
    heading = torch.stack([angle.cos(), angle.sin()], 1)
    rim = 1.0 / (module.ratios_at(heading) - 1.0).neg().max(1).values  # where a ratio is 0
    points = torch.linspace(0.0, 0.999, 300, dtype=F64)[:, None, None] * (rim[:, None] * heading)
    order = module.regimes_of(module.ratios_at(points.view(-1, 2)))[0].view(300, 61)
    assert (order[0] == 0).all() and (order.diff(dim=0) >= 0).all() and (order[-1] == 4).all()


def test_figure_3_rings_begin_where_an_aggregate_reaches_its_border(figure):
    module = figure("figure3")
    axis = torch.linspace(-0.25, 0.25, 201, dtype=F64)
    points = module.grid(axis, axis)
    points = points[module.ratios_at(points).min(1).values > 0.0]
    pos, neg = module.aggregates(module.ratios_at(points))
    regime = module.regimes_of(module.ratios_at(points))[0]
    whole = 1.0 + 1.0 / module.SLOPE
    begins = (neg > 0.09, neg >= whole * 0.09, pos > 0.15, pos >= whole * 0.15)
    for number, begun in enumerate(begins, start=1):
        assert torch.equal(regime >= number, begun)
        assert begun.any() and not begun.all()
    shown = (points.abs() <= module.ZOOM).all(1)
    assert (neg[shown] > 0.09).any() and (pos[shown] > 0.15).any(), "both contours are in the part that (a) shows"


def test_figure_3_the_token_clip_acts_before_the_aggregate_gates(figure):
    module = figure("figure3")
    axis = torch.linspace(-module.ZOOM, module.ZOOM, 301, dtype=F64)
    outer, local = module.regimes_of(module.ratios_at(module.grid(axis, axis)))
    assert set(local[outer == 0].tolist()) == {0, 1, 2}
    assert local[outer > 0].min() > 0, "L-I lies inside G-I"


def test_figure_4_has_the_settings_of_the_caption(figure):
    module = figure("figure4")
    assert (module.TOKENS, module.TOKEN_CLIP, module.SLOPE.tolist()) == (10, 0.04, [32.0])
    assert module.BUDGET.tolist() == [[0.12], [0.05]]
    assert (module.GRPO.low, module.GRPO.high) == (0.04, 0.04)
    drawn = module.draw()
    assert torch.equal(drawn.delta.sign(), drawn.advantage.sign())
    assert abs(float(drawn.delta.mean())) < 1e-15 and drawn.advantage.mean() > 0


@pytest.mark.parametrize("seed", range(12))
def test_figure_4_has_the_order_of_events_for_any_draw(figure, seed: int):
    module = figure("figure4")
    course = module.follow(module.draw(seed))
    happened = module.events(course)
    assert list(happened) == ["first eps clip", "C- onset", "C-*", "C+ onset", "C+*"]
    times = list(happened.values())
    assert times == sorted(times) and len(set(times)) == 5 and times[-1] <= 1.0
    t, weight = course.t, course.log_weight
    assert (weight[t < happened["C- onset"]] <= 0.0).all()
    assert (weight[(t >= happened["C-*"]) & (t < happened["C+ onset"])] > 0.0).all()
    assert (weight[t >= happened["C+*"]] == 0.0).all()
    # J rises to where the base weight is largest, and ends as if there were none
    total = course.fiberpo.mean(1)
    assert int(total.argmax()) == int(weight.abs().argmax())
    assert total[0] < total[-1] < total.max()
    torch.testing.assert_close(total[t >= happened["C+*"]], course.without_weight.mean(1)[t >= happened["C+*"]])


def test_figure_4_draws_what_the_package_computes(figure):
    module = figure("figure4")
    drawn = module.draw()
    course = module.follow(drawn, steps=51)
    one = module.HIERARCHY.cells({"trajectory": torch.zeros(module.TOKENS, dtype=torch.int64)})
    weighted = fpo.token_weights(one) * drawn.advantage
    for at in range(0, 51, 5):
        log_ratio = course.log_ratio[at]
        for gating, values in ((None, course.fiberpo), (module.GRPO, course.grpo)):
            result = fpo.surrogate(log_ratio, weighted, one, module.HIERARCHY, gating=gating)
            assert result.value == pytest.approx(float(values[at].mean()), abs=1e-15)
        # (14)-(16): the residual of the picture is that of the equations, so that its base weight is (8)
        own = torch.where(log_ratio >= 0, course.pos[at], -course.neg[at])
        opposite = torch.where(log_ratio >= 0, -course.neg[at], course.pos[at])
        residual = (log_ratio - own).clamp(-0.04, 0.04) - opposite.clamp(-0.04, 0.04)
        torch.testing.assert_close(course.gated[at], residual + course.log_weight[at], rtol=0, atol=1e-15)


def test_the_segments_of_the_demonstration_are_those_that_were_drawn(figure):
    module = figure("segments")
    rollout = module.roll_out(groups=4)
    assert torch.equal(rollout.segment == 1, torch.arange(module.LENGTH) > rollout.closes[:, None])
    assert (rollout.tokens[:, 1:] == module.CLOSE).sum(1).eq(1).all()
    torch.testing.assert_close(rollout.advantage[:, 0].view(4, -1).sum(1), torch.zeros(4, dtype=F64), rtol=0, atol=1e-5)
    assert [stratum.name for stratum in module.ON.active] == ["trajectory", "segment_in_trajectory"]
    assert [stratum.name for stratum in module.OFF.active] == ["trajectory"]


def test_the_segment_that_is_trained_hard_is_held_and_the_other_keeps_learning(figure):
    module = figure("segments")
    rollout = module.roll_out()
    on, off = (module.train(rollout, hierarchy) for hierarchy in (module.ON, module.OFF))
    assert max(on.of_segment("answer", "beyond")) > 0.1 and not any(on.of_segment("think", "beyond"))
    assert max(off.trajectories) > max(on.trajectories) > 0.0
    # The same until a gate acts.
    first = next(step for step, share in enumerate(on.of_segment("answer", "beyond")) if share)
    assert first > 5 and on.steps_of_one[: first + 1] == off.steps_of_one[: first + 1]
    assert on.of_segment("answer", "drift")[-1] < 0.7 * off.of_segment("answer", "drift")[-1]
    assert on.of_segment("think", "drift")[-1] > 2.0 * off.of_segment("think", "drift")[-1]
    learned = [course.steps_of_one[-1] - course.steps_of_one[0] for course in (on, off)]
    assert learned[0] > 0.01 and learned[1] < 0.5 * learned[0]


def test_only_the_minimum_pulls_a_drift_back_beyond_its_budget(figure):
    module = figure("claims")
    used = (module.DRIFTS / module.BUDGET).tolist()
    window = 1 + 1 / 8  # C*, in budgets
    for advantage in (1.0, -1.0):
        paper = module.force(module.PAPER, advantage)
        for at, push in zip(used, paper, strict=True):
            expected = advantage if at <= 1 else -8 * advantage if at < window - 1e-9 else 0.0
            assert push * expected >= 0
            assert (abs(push) > 7) == (abs(expected) == 8) and (expected == 0) == (abs(push) < 1e-12)
    for objective in (module.MINIMUM, module.DEFAULT, module.GRPO):
        assert all(push < -0.99 for push in module.force(objective, -1.0)), objective.label
    beyond = [push for at, push in zip(used, module.force(module.DEFAULT, 1.0), strict=True) if at > 1]
    assert len(beyond) > 50 and not any(abs(push) > 1e-12 for push in beyond)


def test_tokens_learn_beyond_a_budget_and_half_of_them_beyond_a_clip(figure):
    module = figure("claims")
    assert all(set(module.survival(objective)) == {1.0} for objective in (module.PAPER, module.DEFAULT))
    shares = module.survival(module.GRPO)
    assert shares[0] == 1.0 and shares[-1] == 0.5


def test_a_domain_is_not_held_for_the_drift_of_another(figure):
    module = figure("claims")
    alone, batch = module.neighbour(module.DOMAINS), module.neighbour(module.BATCH)
    assert max(alone) - min(alone) < 1e-12 and alone[0] == pytest.approx(batch[0], abs=1e-12)
    assert batch[-1] < 0.6 * batch[0]


@pytest.mark.parametrize("name", ["figure2", "figure3", "figure4", "segments", "claims"])
def test_one_command_draws_a_figure(name: str, tmp_path: Path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(FIGURES / f"{name}.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    picture = tmp_path / f"{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 120_000
