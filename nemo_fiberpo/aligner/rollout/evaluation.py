"""Rewards on the held-out prompts, sampled and greedy."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nemo_aligner.utils.server_utils import FutureResult

from nemo_fiberpo.aligner.data.prompts import PromptDataset, collate_prompts
from nemo_fiberpo.aligner.generation.inference_layout import generation_axis
from nemo_fiberpo.aligner.generation.lockstep import deterministic
from nemo_fiberpo.aligner.rewards.reward_model import check_failures, decode_responses
from nemo_fiberpo.aligner.rollout.dealing import padded_share
from nemo_fiberpo.rewards import CRASH
from nemo_fiberpo.storage.manifest import write_atomically


@torch.no_grad()
def evaluate(
    actor: Any, reward_model: Any, prompts: PromptDataset, *, batch: int, seed: int, modes: Sequence[str] = ("sampled",)
) -> list[dict[str, Any]]:
    """One graded response per prompt and mode ("sampled": the actor's sampling parameters, "greedy").

    batch  prompts per generation batch and rank
    seed   of the sampling: equal prompts and seed give paired samples before and after training

    Returns rows {prompt_index, domain, mode, reward, response, length, ended}, by mode and prompt, the same on every
    rank; prompt_index counts within `prompts`, reward is None if the grader crashed.

    SPMD: every rank calls this; prompts are sharded over data- and context-parallel ranks.
    """
    actor.prepare_for_inference()
    rank, ranks, group = generation_axis()
    rows: list[dict[str, Any]] = []
    for mode in modes:
        with deterministic(seed, 0, rank), actor.decoding(greedy=mode == "greedy"):
            for indices, real in padded_share(range(len(prompts)), rank, ranks, batch):
                rows += _evaluate_batch(actor, reward_model, prompts, indices, mode)[:real]
    actor.finish_inference()
    gathered: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(gathered, rows, group=group)
    rows = [row for part in gathered for row in part]
    failed = sum(row["reward"] is None for row in rows)
    check_failures(failed, len(rows), reward_model.max_failed, reward_model.reasons)
    order = {mode: place for place, mode in enumerate(modes)}
    return sorted(rows, key=lambda row: (order[row["mode"]], row["prompt_index"]))


def _evaluate_batch(
    actor: Any, reward_model: Any, prompts: PromptDataset, indices: Sequence[int], mode: str
) -> list[dict[str, Any]]:
    items = [prompts[index] for index in indices]
    rollout = actor.infer(collate_prompts(items, actor.tokenizer.eos_id, actor.max_new_tokens))
    answer = reward_model.infer_rm_critic(rollout)
    rewards, _ = answer.result() if isinstance(answer, FutureResult) else answer
    lengths = rollout["response_lengths"] - rollout["prompt_lengths"]
    return [
        {
            "prompt_index": index,
            "domain": prompts.records[index].domain,
            "mode": mode,
            "reward": None if int(rollout["grader_failed"][place]) == CRASH else rewards[place].item(),
            "response": text,
            "length": int(lengths[place]),
            "ended": bool(rollout["is_end"][place]),
        }
        for place, (index, text) in enumerate(zip(indices, decode_responses(rollout, actor.tokenizer), strict=True))
    ]


def write_rows(path: str | os.PathLike[str], rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line; atomic."""
    write_atomically(Path(path), "".join(json.dumps(row) + "\n" for row in rows))


def mean_rewards(rows: Sequence[dict[str, Any]], mode: str) -> dict[str, float]:
    """Mean reward of the graded responses by domain, and over all of them as "all"."""
    graded = [row for row in rows if row["mode"] == mode and row["reward"] is not None]
    domains = sorted({row["domain"] for row in graded})
    groups = {domain: [row["reward"] for row in graded if row["domain"] == domain] for domain in domains}
    groups["all"] = [row["reward"] for row in graded]
    return {domain: sum(values) / len(values) for domain, values in groups.items() if values}
