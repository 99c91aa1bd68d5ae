"""The minibatches of a rollout, with cells and denominators agreed on by all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nemo_fiberpo.aligner.config.algorithm import AlgorithmSettings
from nemo_fiberpo.aligner.generation.engine_log_probs import ENGINE
from nemo_fiberpo.aligner.rollout.minibatch import (
    Minibatch,
    build_minibatch,
    flatten_column,
    flatten_labels,
    stacked_shape,
)
from nemo_fiberpo.aligner.rollout.strata import StrataLabels
from nemo_fiberpo.labelling.expert_partitions import COLUMN
from nemo_fiberpo.megatron.exchange import exchange
from nemo_fiberpo.megatron.one_pass import one_pass_cells
from nemo_fiberpo.megatron.sequences import Rows
from nemo_fiberpo.objective import Cells, Hierarchy, build_cells, correction_weights, token_weights
from nemo_fiberpo.objective.optimistic import gates_can_pass, part_cells


def agreed_minibatches(
    columns: Mapping[str, Tensor],
    problem: str | None,
    actor: Any,
    strata: StrataLabels,
    hierarchy: Hierarchy,
    settings: AlgorithmSettings,
) -> list[Minibatch]:
    """The minibatches, with cells shared between the ranks and weights with global denominators.

    columns   of this rank's samples, [b] or [b, s - 1]
    problem   an error in them on this rank, or None: a ValueError on every rank

    Collective over the ranks of `actor.reducer`.
    """
    samples, axes = split_columns(columns, settings.optimizer_steps), actor.reducer.axes
    # Collective for packed rows, so it must run before anything that can fail on one rank only.
    rows = [
        actor.rows(
            part["response_tokens"],
            part["response_lengths"],
            actor.cfg.micro_batch_size,
            settings.packing,
            part["mask"].any(dim=1),
            settings.samples_per_prompt if settings.micro_batches == "whole_groups" else 1,
        )
        for part in samples
    ]
    guesses = settings.passes == "auto" and gates_can_pass(hierarchy, settings.gating_map)
    own: list[Cells] = []
    pieces: list[list[Cells]] = [[] for _ in samples]
    try:
        for part, of_part, into in zip(samples, rows, pieces, strict=True):
            own += [_hierarchy_cells(part, of_part, strata, hierarchy), _trajectory_cells(part, of_part)]
            if settings.passes == 1 or guesses:
                into += [_hierarchy_cells(part, [entry], strata, hierarchy) for entry in of_part]
    except Exception as error:
        own, problem = [], str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    facts = {
        "sequence length": samples[0]["response_tokens"].shape[1],
        "samples": sum(len(part["response_tokens"]) for part in samples),
        "micro-batches per step": [len(of_part) for of_part in rows],
    }
    shared = exchange(own, axes, facts, problem)
    experts = actor.experts
    compared = COLUMN if experts is not None and experts.partitions.agreement else None
    made = []
    for index, (part, of_part) in enumerate(zip(samples, rows, strict=True)):
        cells, trajectories = shared[2 * index : 2 * index + 2]
        weights = token_weights(trajectories, settings.weights, length=settings.fixed_length)
        parts = one_pass_cells(pieces[index], axes) if settings.passes == 1 else None
        guessed = part_cells(pieces[index], cells) if guesses else None
        correction = None
        if settings.rollout_correction.active:
            old, engine = (flatten_column(part[name], of_part) for name in ("logprobs", ENGINE))
            correction = correction_weights(old, engine, trajectories, settings.rollout_correction, actor.reducer)
        made.append(build_minibatch(part, of_part, weights, cells, parts, guessed, compared, correction))
    return made


def split_columns(columns: Mapping[str, Tensor], minibatches: int) -> Sequence[dict[str, Tensor]]:
    """The samples in equal runs, one per minibatch, as NeMo-Aligner's `fit` splits them."""
    split = {name: column.chunk(minibatches) for name, column in columns.items()}
    return [{name: pieces[index] for name, pieces in split.items()} for index in range(minibatches)]


def _hierarchy_cells(
    part: Mapping[str, Tensor], rows: Sequence[Rows], strata: StrataLabels, hierarchy: Hierarchy
) -> Cells:
    labels = {name: flatten_labels(label, part["mask"], rows) for name, label in strata.labels(part).items()}
    return hierarchy.cells(labels, flatten_column(part["mask"], rows), names=strata.names, shape=stacked_shape(rows))


def _trajectory_cells(part: Mapping[str, Tensor], rows: Sequence[Rows]) -> Cells:
    labels = {"trajectory": flatten_labels(part["trajectory"], part["mask"], rows)}
    return build_cells(["trajectory"], labels, flatten_column(part["mask"], rows), shape=stacked_shape(rows))
