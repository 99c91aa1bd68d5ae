"""What a step of verl must give: the slow loops of the objective on the log-probs of an unsharded float64 model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_fiberpo import load_hierarchy
from tests.objective.reference import evaluate
from tests.verl.host import Batch, load_model, log_probs_of


@dataclass
class Expected:
    value: float
    gradients: dict[str, Tensor]


def expected(folder: Any, batch: Batch, hierarchy: Any, weights: str = "seq-mean-token-mean") -> Expected:
    """J and the gradient of -J for a batch whose gates act as `hierarchy` has it."""
    model = load_model(folder)
    log_probs = log_probs_of(model, batch)
    live = batch.response_mask.bool()
    ell = torch.where(live, log_probs.detach() - batch.old_log_probs.double(), 0.0)
    weight = token_weight(live, weights) * batch.advantages.double()
    if batch.rollout_is_weights is not None:
        weight = weight * batch.rollout_is_weights.double()
    labels, names = label_lists(batch)
    outcome = evaluate(
        load_hierarchy(hierarchy),
        labels,
        ell.flatten().tolist(),
        weight.flatten().tolist(),
        live.flatten().tolist(),
        names,
    )
    coefficients = torch.tensor(outcome.coefficients, dtype=torch.float64).view(live.shape)
    (-(coefficients * log_probs).sum()).backward()
    return Expected(outcome.value, {name: p.grad for name, p in model.named_parameters()})


def label_lists(batch: Batch) -> tuple[dict[str, list[int]], dict[str, list[str]]]:
    """A label of every token, and the names of the labels, by column."""
    texts = {
        "domain": batch.data_source,
        "prompt_group": batch.uid,
        "language": [row["language"] for row in batch.extra_info],
        "trajectory": [str(row) for row in range(len(batch.uid))],
    }
    names = {column: sorted(set(of_rows)) for column, of_rows in texts.items()}
    width = batch.response_mask.shape[1]
    labels = {
        column: [names[column].index(text) for text in of_rows for _ in range(width)]
        for column, of_rows in texts.items()
    }
    return labels, names


def token_weight(live: Tensor, kind: str) -> Tensor:
    """w_i of every token, as verl names the aggregation."""
    count = live.sum(1, keepdim=True)
    if kind == "token-mean":
        return live.double() / live.sum()
    if kind == "seq-mean-token-sum":
        return live.double() / len(live)
    if kind == "seq-mean-token-sum-norm":
        return live.double() / live.numel()  # by the width of the responses where no loss_scale_factor is set
    assert kind == "seq-mean-token-mean"
    return live.double() / (count * len(live))


def relative_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest difference of any gradient, relative to the largest entry of that parameter's."""
    assert set(found) == set(wanted)
    return max(float((found[name].double() - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted)


def largest_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Of any entry of any parameter."""
    assert set(found) == set(wanted)
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)
