"""Figure 4: one trajectory of ten tokens while its drift grows, ratios 1 + t Delta for t from 0 to 1, beside GRPO.

    python docs/figures/figure4.py [folder]

The settings are those of the paper's caption: T = 10, k = 32, eps = 0.04, C+ = 0.12, C- = 0.05, every advantage with
the sign of its token's Delta, and GRPO clipped with the same eps. The paper does not give its Delta and advantages:
those here are a random draw of ours with a fixed seed, so only the order of events can be compared, not a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from drawing import BLACK, BLUE, GREEN, MINUS, ORANGE, RED, frame, new_figure, save, signed
from matplotlib.axes import Axes
from torch import Tensor

import nemo_fiberpo as fpo
from nemo_fiberpo.objective.gates import aggregate_gate, zeroed_from

TOKENS, TOKEN_CLIP = 10, 0.04
BUDGET, SLOPE = torch.tensor([[0.12], [0.05]], dtype=torch.float64), torch.tensor([32.0], dtype=torch.float64)
STRATUM = fpo.Stratum("trajectory", fpo.Budget(*BUDGET[:, 0].tolist()), slope=float(SLOPE))
HIERARCHY = fpo.Hierarchy((STRATUM,), TOKEN_CLIP)
GRPO = fpo.PpoClip(TOKEN_CLIP, TOKEN_CLIP)
SEED = 0
EVENTS = ("first eps clip", "C- onset", "C-*", "C+ onset", "C+*")


@dataclass(frozen=True)
class Draw:
    """Ratio deviations and advantages of the tokens at t = 1, [10] each."""

    delta: Tensor
    advantage: Tensor


@dataclass(frozen=True)
class Course:
    """What happens over t. By step, [n]: t, the aggregates P and N, log w. By step and token, [n, 10]: the log-ratio,
    its gated form, and A_i rhat_i of FiberPO, of FiberPO with the base weight held at 1, and of GRPO."""

    t: Tensor
    pos: Tensor
    neg: Tensor
    log_weight: Tensor
    log_ratio: Tensor
    gated: Tensor
    fiberpo: Tensor
    without_weight: Tensor
    grpo: Tensor


def draw(seed: int = SEED) -> Draw:
    """Delta of mean 0, (65), and mean size 0.4; advantages of the same signs. Draws whose mean advantage is not
    positive, or in which a ratio would fall below 0.1, are drawn again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        delta, size = torch.randn(2, TOKENS, generator=generator, dtype=torch.float64)
        delta = delta - delta.mean()
        delta *= 0.4 / delta.abs().mean()
        advantage = delta.sign() * size.abs()
        if advantage.mean() > 0.0 and delta.min() > -0.9:
            return Draw(delta, advantage)


def log_base_weight(pos: Tensor, neg: Tensor) -> Tensor:
    """log w of (8) at aggregates of any one shape."""
    mean = torch.stack([pos.flatten(), -neg.flatten()])
    return aggregate_gate(mean, BUDGET, SLOPE)[0].sum(0).view(pos.shape)


def follow(drawn: Draw, steps: int = 1001) -> Course:
    """One trajectory per t, all in one batch, none of which sees another."""
    t = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
    log_ratio = torch.log1p(t[:, None] * drawn.delta)
    rows = torch.arange(steps).repeat_interleave(TOKENS)
    cells = HIERARCHY.cells({"trajectory": rows}, shape=(steps, TOKENS))
    gated = fpo.gated_log_ratio(log_ratio.flatten(), cells, HIERARCHY).view(steps, TOKENS)
    advantage = drawn.advantage.expand(steps, TOKENS)
    clipped = fpo.gated_ratio(log_ratio.flatten(), advantage.flatten(), cells, GRPO).view(steps, TOKENS)
    pos, neg = log_ratio.clamp_min(0.0).mean(1), -log_ratio.clamp_max(0.0).mean(1)
    log_weight = log_base_weight(pos, neg)
    return Course(
        t, pos, neg, log_weight, log_ratio, gated,
        fiberpo=gated.exp() * advantage,
        without_weight=(gated - log_weight[:, None]).exp() * advantage,
        grpo=clipped * advantage,
    )  # fmt: skip


def first(t: Tensor, reached: Tensor) -> float:
    """The first t at which something holds, 2 where it never does."""
    return float(t[reached][0]) if reached.any() else 2.0


def clip_times(course: Course) -> list[float]:
    """For every token, the first t at which its own residual u_i (14) is beyond eps."""
    own_mean = torch.where(course.log_ratio >= 0.0, course.pos[:, None], -course.neg[:, None])
    beyond = (course.log_ratio - own_mean).abs() > TOKEN_CLIP
    return [first(course.t, column) for column in beyond.T]


def events(course: Course) -> dict[str, float]:
    """The first t of each event, in the order in which they are expected."""
    ends = zeroed_from(BUDGET, SLOPE)[:, 0]
    reached = (course.neg > BUDGET[1], course.neg >= ends[1], course.pos > BUDGET[0], course.pos >= ends[0])
    times = [min(clip_times(course)), *(first(course.t, where) for where in reached)]
    return dict(zip(EVENTS, times, strict=True))


def draw_path(axes: Axes, course: Course) -> None:
    """(a): where the trajectory is, over log w as a function of the two aggregates."""
    right, top = 1.12 * float(course.pos[-1]), 1.08 * float(course.neg[-1])
    across = torch.linspace(0.0, right, 301, dtype=torch.float64)
    up = torch.linspace(0.0, top, 301, dtype=torch.float64)
    neg, pos = torch.meshgrid(up, across, indexing="ij")
    levels = [n / 100 - 0.125 for n in range(26)]  # steps of 0.01 around 0
    mesh = axes.contourf(across, up, log_base_weight(pos, neg), levels=levels, cmap="RdBu_r")
    axes.get_figure().colorbar(mesh, ax=axes, label=r"$\log w$", ticks=[-0.1, -0.05, 0.0, 0.05, 0.1])
    axes.plot(course.pos, course.neg, color=BLACK, linewidth=2.0)
    for t in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = int((course.t - t).abs().argmin())
        x, y = float(course.pos[at]), float(course.neg[at])
        axes.plot([x], [y], "o", color=BLACK, markersize=4.5, clip_on=False, zorder=3)
        if t == 0.0:
            continue
        place, side = ((-8, -2), "right") if t == 1.0 else ((7, -9), "left")
        axes.annotate(f"t = {t:g}", (x, y), place, textcoords="offset points", ha=side, fontsize=9)
    for budget, line, text, x, y, va in (
        (float(BUDGET[1]), axes.axhline, "$N = C^-$", 0.985 * right, float(BUDGET[1]) + 0.004, "bottom"),
        (float(BUDGET[0]), axes.axvline, "$P = C^+$ ", float(BUDGET[0]), 0.03 * top, "bottom"),
    ):
        line(budget, color="0.2", linewidth=0.9, linestyle="--")
        axes.text(x, y, text, ha="right", va=va, fontsize=9)
    axes.set_xlim(0.0, right)
    axes.set_ylim(0.0, top)
    frame(axes, "(a) the path over the two aggregates", r"P = $\log s^+$", r"N = $\log s^-$")


def draw_tokens(axes: Axes, course: Course) -> None:
    """(b): the two parts of every token's gated log-ratio at t = 1."""
    place = torch.arange(TOKENS)
    weight = course.log_weight[-1].expand(TOKENS)
    residual = course.gated[-1] - weight
    axes.bar(place, residual, 0.62, color=BLUE, label="residual $\\log r^{res}$")
    same_side = torch.where(residual * weight > 0.0, residual, torch.zeros_like(residual))
    name = "base weight $\\log w$" + (" = 0" if weight[0] == 0.0 else "")
    axes.bar(place, weight, 0.62, bottom=same_side, color=ORANGE, label=name)
    axes.plot(place, course.gated[-1], "D", color=BLACK, markersize=5, label="sum $\\log \\hat{r}$", linestyle="none")
    axes.axhline(0.0, color="0.3", linewidth=0.7)
    marks = {-2: f"{MINUS}2$\\epsilon$", -1: f"{MINUS}$\\epsilon$", 0: "0", 1: "$\\epsilon$", 2: "2$\\epsilon$"}
    axes.set_yticks([TOKEN_CLIP * units for units in marks], marks.values())
    axes.grid(axis="y", color="0.85", linewidth=0.7)
    axes.set_axisbelow(True)
    labels = [f"{i + 1}\n{signed(float(course.log_ratio[-1, i]))}" for i in range(TOKENS)]
    axes.set_xticks(place.tolist(), labels, fontsize=8.5)
    axes.set_ylim(-2.6 * TOKEN_CLIP, 3.4 * TOKEN_CLIP)
    axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=3, columnspacing=1.2, handlelength=1.2)
    frame(axes, "(b) every token at t = 1", "token, and below it its $\\log r$", "log-ratio")


COLOURS = dict(zip(EVENTS, (GREEN, BLACK, BLACK, RED, RED), strict=True))
TEXTS = dict(zip(EVENTS, ("first $\\epsilon$", "$C^-$", "", "$C^+$", ""), strict=True))


def mark_events(axes: Axes, happened: Mapping[str, float]) -> None:
    for name, t in happened.items():
        axes.axvline(t, color=COLOURS[name], linewidth=0.9, linestyle="-" if name.endswith("*") else "--", alpha=0.8)
        axes.annotate(
            TEXTS[name], (t, 1.0), (0, 1), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="center", fontsize=9, color=COLOURS[name],
        )  # fmt: skip


def shown_tokens(drawn: Draw) -> tuple[int, int]:
    """One token of either sign, those with the median size of advantage."""
    chosen = []
    for sign in (1.0, -1.0):
        of_sign = torch.nonzero(drawn.delta.sign() == sign).squeeze(1)
        order = drawn.advantage[of_sign].abs().argsort()
        chosen.append(int(of_sign[order[len(order) // 2]]))
    return chosen[0], chosen[1]


def draw_two(axes: Axes, course: Course, drawn: Draw, happened: Mapping[str, float]) -> None:
    """(c): what the drift adds to the objective of two tokens."""
    mark_events(axes, happened)
    for token, colour in zip(shown_tokens(drawn), (ORANGE, BLUE), strict=True):
        sign = "+" if drawn.delta[token] > 0 else MINUS
        for value, dash, name in ((course.fiberpo, "-", "FiberPO"), (course.grpo, ":", "GRPO")):
            gain = value[:, token] - drawn.advantage[token]
            axes.plot(
                course.t, gain, color=colour, linestyle=dash, linewidth=2.0, label=f"token {token + 1} ({sign}), {name}"
            )
    axes.legend(frameon=False, fontsize=9)
    axes.set_xlim(0.0, 1.0)
    frame(axes, "", "scale $t$ of the drift", r"$A_i \hat{r}_i - A_i$")
    axes.set_title("(c) objective of two tokens", loc="left", fontsize=11, pad=16)


def draw_total(axes: Axes, course: Course, happened: Mapping[str, float]) -> None:
    """(d): the objective of the trajectory."""
    mark_events(axes, happened)
    axes.plot(course.t, course.fiberpo.mean(1), color=BLUE, linewidth=2.2, label="FiberPO")
    axes.plot(
        course.t, course.without_weight.mean(1), color=BLACK, linewidth=1.2, linestyle="--", label="FiberPO with w = 1"
    )
    axes.plot(course.t, course.grpo.mean(1), color=BLUE, linewidth=2.0, linestyle=":", label="GRPO")
    low, high = axes.get_ylim()
    times = [t for t in clip_times(course) if t <= 1.0]
    axes.plot(
        times, [low] * len(times), "|", color=GREEN, markersize=12, clip_on=False, label="a token meets $\\epsilon$"
    )
    axes.set_ylim(low, high + 0.1 * (high - low))
    axes.legend(frameon=False, fontsize=9)
    axes.set_xlim(0.0, 1.0)
    frame(axes, "", "scale $t$ of the drift", "J")
    axes.set_title("(d) objective of the trajectory", loc="left", fontsize=11, pad=16)


def main() -> None:
    drawn = draw()
    course = follow(drawn)
    happened = events(course)
    figure = new_figure(12.0, 8.6)
    (path, tokens), (two, total) = figure.subplots(2, 2)
    draw_path(path, course)
    draw_tokens(tokens, course)
    draw_two(two, course, drawn, happened)
    draw_total(total, course, happened)
    save(figure, "figure4.png")


if __name__ == "__main__":
    main()
