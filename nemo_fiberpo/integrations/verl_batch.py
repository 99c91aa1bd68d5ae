"""One mini-batch of verl on this rank, and the gates over those of all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import no_padding_2_padding, response_to_nested

from nemo_fiberpo.integrations.verl_columns import make_labels, read_columns
from nemo_fiberpo.megatron.exchange import exchange
from nemo_fiberpo.megatron.groups import Reducer, TokenAxes
from nemo_fiberpo.objective import (
    Hierarchy,
    RatioGating,
    RolloutCorrection,
    SharedCells,
    Surrogate,
    build_cells,
    correction_metrics,
    correction_weights,
    surrogate,
    token_weights,
)

COEFFICIENTS, REFERENCE = "fiberpo_coefficients", "fiberpo_log_probs"  # keys of the mini-batch
WEIGHTS = {"token-mean": "token_mean", "seq-mean-token-mean": "trajectory_mean"}


def token_weights_of(config: Any, trajectories: SharedCells, mask: Tensor) -> Tensor:
    """w_i of `actor.loss_agg_mode`, float64 [T], with the denominators of all ranks."""
    mode = config.loss_agg_mode
    if mode == "token-sum":
        return mask.flatten().double()
    if mode in WEIGHTS:
        return token_weights(trajectories, WEIGHTS[mode])
    length = 1.0 if mode == "seq-mean-token-sum" else config.loss_scale_factor or mask.shape[1]
    return token_weights(trajectories, "fixed_length_mean", length=float(length))


@dataclass(frozen=True)
class ResponseBatch:
    """This rank's part of a mini-batch, [b, R].

    log_prob   of the current policy; on a pipeline stage that has none the old one, which counts nowhere
    rollout    log-probs of the engine that sampled, where verl hands them over
    """

    mask: Tensor
    old: Tensor
    advantage: Tensor
    log_prob: Tensor
    rollout: Tensor | None = None

    @classmethod
    def of(cls, data: TensorDict, log_probs: Tensor | None) -> ResponseBatch:
        optional = [key for key in ("rollout_is_weights", "rollout_log_probs") if key in data]
        padded = data.select("response_mask", "old_log_probs", "advantages", *optional).to_padded_tensor()
        old = padded["old_log_probs"].double()
        current = old if log_probs is None else no_padding_2_padding(log_probs, data).double()
        advantage = padded["advantages"].double()
        if "rollout_is_weights" in data:
            advantage = advantage * padded["rollout_is_weights"]
        device = current.device
        rollout = padded["rollout_log_probs"].double().to(device) if "rollout_log_probs" in data else None
        mask = padded["response_mask"].bool().to(device)
        return cls(mask, old.to(device), advantage.to(device), current, rollout)

    def cells(self, data: TensorDict, hierarchy: Hierarchy, axes: TokenAxes) -> tuple[SharedCells, SharedCells]:
        """Cells of the hierarchy, and of the trajectories for the weights; shared with the other ranks."""
        texts: dict[str, list[str]] = {}
        problem, shape = None, (self.mask.shape[0], self.mask.shape[1])
        try:
            texts = read_columns(lambda key: tu.get(data, key), self.mask.shape[0], hierarchy)
        except ValueError as error:
            problem = str(error)
        tokens = self._tokens(data) if "state" in hierarchy.columns else None
        labels = make_labels(texts, problem, self.mask, tokens, hierarchy, axes)
        flat = self.mask.flatten()
        trajectories = build_cells(["trajectory"], {"trajectory": labels.trajectory}, flat, shape=shape)
        try:
            own: list[Any] = [hierarchy.cells(labels.columns, flat, labels.names, shape), trajectories]
        except ValueError as error:
            own, problem = [], str(error)
        cells, trajectories_of_all = exchange(own, axes, problem=problem)
        return cells, trajectories_of_all

    def _tokens(self, data: TensorDict) -> Tensor:
        """[b, R + 1]: the responses behind a place for the prompt, which the prompt group stands for."""
        responses = data.select("responses").to_padded_tensor()["responses"].to(self.mask.device)
        return torch.nn.functional.pad(responses, (1, 0))

    def carry(self, data: TensorDict, result: Surrogate) -> None:
        """Put what pass D needs into the mini-batch, in the form that its response mask has."""
        mask = data["response_mask"]
        fields = {COEFFICIENTS: result.coefficients.view(self.mask.shape), REFERENCE: self.log_prob}
        for key, value in fields.items():
            value = value.detach().to(mask.device)
            data[key] = response_to_nested(value, mask) if mask.is_nested else value


@dataclass
class Step:
    """What an engine's steps have in common."""

    hierarchy: Hierarchy
    gating: RatioGating | None
    use_min: bool
    reducer: Reducer
    correction: RolloutCorrection

    def evaluate(self, batch: ResponseBatch, data: TensorDict, config: Any) -> tuple[Surrogate, dict[str, float]]:
        """Value and coefficients of a mini-batch over all ranks, and the metrics of its correction."""
        cells, trajectories = batch.cells(data, self.hierarchy, self.reducer.axes)
        weighted = token_weights_of(config, trajectories, batch.mask) * batch.advantage.flatten()
        metrics: dict[str, float] = {}
        if self.correction.active:
            if batch.rollout is None:
                raise ValueError(
                    "actor.policy_loss.rollout_weights: needs the rollout engine's log-probs, which are not in the "
                    "batch; set actor_rollout_ref.rollout.calculate_log_probs to true"
                )
            given = batch.old.flatten(), batch.rollout.flatten(), trajectories, self.correction, self.reducer
            corrected = correction_weights(*given)
            weighted = weighted * corrected.weight
            sums = self.reducer(corrected.sums)
            metrics = {f"rollout_weights/{name}": float(value) for name, value in correction_metrics(sums).items()}
        log_ratio = (batch.log_prob - batch.old).flatten()
        tokens = (log_ratio, weighted, cells, self.hierarchy, self.reducer, self.gating, self.use_min)
        return surrogate(*tokens, old_log_probs=batch.old.flatten()), metrics
