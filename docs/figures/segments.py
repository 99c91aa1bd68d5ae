"""One segment of the responses is trained hard: what a hierarchy with segments does, and what one without them does.

    python docs/figures/segments.py [folder]

A policy of two tables of logits thinks, by a walk over letters in steps of one or two, and then answers with letters.
It samples responses once, and the markers of `conf/hierarchy/think_answer.yaml` label their tokens. Optimizer steps
follow, with advantages relative to the prompt group. The reward is the share of vowels in the answer, and a little for
steps of one in the thinking. The two runs differ in whether the stratum of the segments is on. In both, domains
and prompt groups are off and the token clip is wide, so that only trajectories and segments hold tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from drawing import BLACK, BLUE, RED, frame, new_figure, save
from omegaconf import OmegaConf
from torch import Tensor

import nemo_fiberpo as fpo
from nemo_fiberpo.config import load_token_labels
from nemo_fiberpo.labelling.spelling import Speller
from nemo_fiberpo.labelling.token_labels import PREFIX

LETTERS = "abcdefghijklmnop"
PIECES = (*LETTERS, "<think>", "</think>")
CLOSE = PIECES.index("</think>")
VOWEL = torch.tensor([piece in "aeio" for piece in PIECES])
LENGTH = 86  # tokens of a response: 60 to 67 letters of thinking, the closing marker, and the answer
GROUPS, SAMPLES = 24, 8
STEPS, LEARNING_RATE = 61, 2.0
FOR_THINKING = 0.3  # reward for thinking in steps of one, that of an answer of vowels being 1

CONF = Path(__file__).resolve().parents[2] / "conf" / "hierarchy" / "think_answer.yaml"
CHANGES = {
    "token_clip": 10.0,
    "strata": {
        "domain": {"enabled": False},
        "prompt_group": {"enabled": False},
    },
    "token_labels": {"segment": {"first": "think"}},  # the prompt ends with <think>
}
SECTION = OmegaConf.merge(OmegaConf.load(CONF), CHANGES)
ON = fpo.load_hierarchy(SECTION)
OFF = fpo.load_hierarchy(OmegaConf.merge(SECTION, {"strata": {"segment_in_trajectory": {"enabled": False}}}))
SEGMENTS = ("think", "answer")


class Letters:
    """A tokenizer: a token per letter, and one for each marker."""

    vocab_size = len(PIECES)

    def text_to_ids(self, text: str) -> list[int]:
        return [PIECES.index(letter) for letter in text]

    def ids_to_text(self, ids: Sequence[int]) -> str:
        return "".join(PIECES[token] for token in ids)


@dataclass(frozen=True)
class Rollout:
    """Sampled responses of GROUPS * SAMPLES trajectories.

    tokens     [b, LENGTH + 1], the last token of the prompt first; it stands for the letter that the walk begins with
    closes     place of the closing marker in the response, [b]
    segment    index into SEGMENTS, as the markers give it, [b, LENGTH]
    advantage  [b, LENGTH]
    """

    tokens: Tensor
    closes: Tensor
    segment: Tensor
    advantage: Tensor

    def cells(self, hierarchy: fpo.Hierarchy) -> Any:
        rows = torch.arange(len(self.tokens))[:, None].expand(self.segment.shape)
        labels = {"trajectory": rows.reshape(-1), "segment": self.segment.reshape(-1)}
        names = {"segment": SEGMENTS} if "segment" in hierarchy.columns else {}
        cells = hierarchy.cells(labels, torch.ones(rows.numel(), dtype=torch.bool), names)
        return cells.share([cells.census()], 0)


def start() -> Tensor:
    """Logits [2, letters, letters] by segment and the letter before, of which answers take the first row alone."""
    logits = torch.zeros(2, len(LETTERS), len(LETTERS), dtype=torch.float64)
    letter = torch.arange(len(LETTERS))
    for step in (1, 2):
        logits[0, letter, (letter + step) % len(LETTERS)] = 4.0
    return logits


def log_probs(logits: Tensor, rollout: Rollout) -> Tensor:
    """[b, LENGTH]; the closing marker is not learned: its ratio is 1."""
    before, token = rollout.tokens[:, :-1], rollout.tokens[:, 1:]
    marker = token == CLOSE
    answers = torch.arange(LENGTH) > rollout.closes[:, None]
    found = logits.log_softmax(-1)[answers.long(), before.where(~answers, 0), token.where(~marker, 0)]
    return found.where(~marker, 0.0)


def roll_out(groups: int = GROUPS) -> Rollout:
    """Responses of `groups` prompts, their labels and advantages."""
    generator = torch.Generator().manual_seed(0)
    number, shares = groups * SAMPLES, start().softmax(-1)
    tokens = torch.randint(len(LETTERS), (groups, 1), generator=generator).repeat_interleave(SAMPLES, 0)
    closes = 60 + torch.randint(8, (number,), generator=generator)
    for place in range(LENGTH):
        answers = place > closes
        before = tokens[:, -1].where(~answers, 0)
        drawn = torch.multinomial(shares[answers.long(), before], 1, generator=generator)[:, 0]
        tokens = torch.cat([tokens, drawn.where(place != closes, CLOSE)[:, None]], 1)
    labels = load_token_labels(SECTION)
    assert labels is not None
    lengths = torch.ones(number, dtype=torch.int64), torch.full((number,), LENGTH + 1)
    columns, _ = labels.columns(tokens, *lengths, Speller(Letters()), [None] * number)
    segment = columns[PREFIX + "segment"].long()
    step_of_one = tokens.diff(dim=1) % len(LETTERS) == 1
    reward = mean(VOWEL[tokens[:, 1:]], segment == 1) + FOR_THINKING * mean(step_of_one, segment == 0)
    of_group = reward.view(groups, SAMPLES)
    advantage = (of_group - of_group.mean(1, keepdim=True)) / of_group.std(1, keepdim=True)
    return Rollout(tokens, closes, segment, advantage.double().reshape(-1, 1).expand(segment.shape))


def mean(value: Tensor, among: Tensor) -> Tensor:
    return (value & among).sum(1) / among.sum(1)


@dataclass(frozen=True)
class Course:
    """A run, by optimizer step: the report's metrics with the segments watched, the share of the trajectories that left
    pass-through, and the probability that a step of the thinking is one."""

    metrics: list[dict[str, float]]
    trajectories: list[float]
    steps_of_one: list[float]

    def of_segment(self, name: str, figure: str) -> list[float]:
        """The larger one of both channels."""
        where = f"segment_in_trajectory.segment.{name}"
        return [max(metrics[f"{where}/{channel}/{figure}"] for channel in ("pos", "neg")) for metrics in self.metrics]


def train(rollout: Rollout, hierarchy: fpo.Hierarchy, steps: int = STEPS) -> Course:
    """Gradient steps on the objective of a hierarchy. The segments are watched where it has none too."""
    logits = start().requires_grad_()
    old = log_probs(start(), rollout)
    cells, watching = rollout.cells(hierarchy), rollout.cells(ON)
    weighted = fpo.token_weights(cells) * rollout.advantage.reshape(-1)
    course = Course([], [], [])
    for _ in range(steps):
        current = log_probs(logits, rollout)
        log_ratio = (current.detach() - old).reshape(-1)
        result = fpo.surrogate(log_ratio, weighted, cells, hierarchy)
        watched = result if hierarchy is ON else fpo.surrogate(log_ratio, weighted, watching, ON)
        trajectory, _ = (stratum for stratum in watched.report.strata)
        course.metrics.append(watched.report.metrics())
        course.trajectories.append(1.0 - min(channel.pass_through for channel in trajectory.channels.values()))
        letter = torch.arange(len(LETTERS))
        shares = logits.detach()[0].softmax(-1)[letter, (letter + 1) % len(LETTERS)]
        course.steps_of_one.append(float(shares.mean()))
        (gradient,) = torch.autograd.grad((result.coefficients * current.reshape(-1)).sum(), logits)
        with torch.no_grad():
            logits += LEARNING_RATE * gradient
    return course


def draw(on: Course, off: Course) -> None:
    figure = new_figure(13, 4.4)
    first, second, third = figure.subplots(1, 3)
    for course, dash, when in ((on, "-", "segments on"), (off, "--", "segments off")):
        style: dict[str, Any] = {"linestyle": dash, "linewidth": 1.8}
        for name, colour, label in (("answer", RED, "answers"), ("think", BLUE, "thinking")):
            second.plot(course.of_segment(name, "drift"), color=colour, label=f"{label}, {when}", **style)
            if course is on:
                first.plot(course.of_segment(name, "beyond"), color=colour, label=f"{label}, {when}", **style)
        first.plot(course.trajectories, color=BLACK, label=f"trajectories, {when}", **style)
        third.plot(course.steps_of_one, color=BLUE, label=when, **style)
    step = "optimizer step"
    frame(first, "Cells that left pass-through", step, "share of the cells")
    frame(second, "Drift of a segment's tokens", step, "mean drift, nats per token")
    frame(third, "What thinking learns", step, "probability of the rewarded step")
    for axes in (first, second, third):
        axes.margins(x=0.02)
        axes.locator_params(nbins=6)
        axes.set_ylim(top=axes.get_ylim()[0] + 1.35 * (axes.get_ylim()[1] - axes.get_ylim()[0]))
        axes.legend(loc="upper left", frameon=False, fontsize=9)
    save(figure, "segments.png")


if __name__ == "__main__":
    responses = roll_out()
    draw(train(responses, ON), train(responses, OFF))
