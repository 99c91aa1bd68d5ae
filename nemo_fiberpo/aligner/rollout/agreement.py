"""The minibatches of a rollout, once all ranks agree on their cells and denominators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nemo_fiberpo.aligner.config.algorithm import AlgorithmSettings
from nemo_fiberpo.aligner.generation.engine_log_probs import ENGINE
from nemo_fiberpo.aligner.rollout.minibatch import Minibatch, flat, in_rows, shape_of, take
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
    """The minibatches with cells that are shared between the ranks, and weights with global denominators.

    columns   of this rank's samples, [b] or [b, s - 1]
    problem   what is wrong with them on this rank, if anything: a ValueError on every rank

    Collective over the ranks of `actor.reducer`.
    """
    samples, axes = split_columns(columns, settings.optimizer_steps), actor.reducer.axes
    # Collective where rows are packed, so that nothing that can fail on one rank stands between.
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
            old, engine = (take(part[name], of_part) for name in ("logprobs", ENGINE))
            correction = correction_weights(old, engine, trajectories, settings.rollout_correction, actor.reducer)
        made.append(in_rows(part, of_part, weights, cells, parts, guessed, compared, correction))
    return made


def split_columns(columns: Mapping[str, Tensor], parts: int) -> Sequence[dict[str, Tensor]]:
    """The samples in `parts` equal runs, in order: the minibatches as NeMo-Aligner's `fit` splits them."""
    split = {name: column.chunk(parts) for name, column in columns.items()}
    return [{name: pieces[index] for name, pieces in split.items()} for index in range(parts)]


def _hierarchy_cells(
    part: Mapping[str, Tensor], rows: Sequence[Rows], strata: StrataLabels, hierarchy: Hierarchy
) -> Cells:
    labels = {name: flat(label, part["mask"], rows) for name, label in strata.labels(part).items()}
    return hierarchy.cells(labels, take(part["mask"], rows), names=strata.names, shape=shape_of(rows))


def _trajectory_cells(part: Mapping[str, Tensor], rows: Sequence[Rows]) -> Cells:
    labels = {"trajectory": flat(part["trajectory"], part["mask"], rows)}
    return build_cells(["trajectory"], labels, take(part["mask"], rows), shape=shape_of(rows))
