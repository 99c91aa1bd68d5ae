"""Metrics of a rollout: rewards, lengths and truncation, overall and per domain, and grader failures; and of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_fiberpo.aligner.data.prompts import PromptDataset
from nemo_fiberpo.aligner.rewards.reward_model import reward_metrics
from nemo_fiberpo.aligner.rollout.experts import routing_metrics
from nemo_fiberpo.aligner.rollout.minibatch import Minibatch
from nemo_fiberpo.megatron.step import StepResult


def rollout_metrics(batch: Mapping[str, Tensor], prompts: PromptDataset, drops_failures: bool) -> dict[str, Any]:
    """Metrics of the whole, gathered rollout; docs/metrics.md lists them. Mean rewards are over the valid samples."""
    length = (batch["response_lengths"] - batch["prompt_lengths"]).double()
    truncated = 1.0 - batch["is_end"].double()
    counted = batch["valid"].bool()
    metrics: dict[str, Any] = {
        "advantage/abs_mean": batch["advantage"].abs().mean().item(),
        "rewards": batch["rewards"][counted].double().mean().item() if bool(counted.any()) else float("nan"),
        "response_length": length.mean().item(),
        "prompt_length": batch["prompt_lengths"].double().mean().item(),
        "truncated": truncated.mean().item(),
    }
    domain = prompts.label_table("domain")[batch["prompt_index"]]
    names = prompts.label_names("domain")
    metrics |= reward_metrics(batch["rewards"], domain, batch["grader_failed"], names, drops_failures)
    for number, name in enumerate(names):
        here = domain == number
        if bool(here.any()):
            metrics[f"response_length/{name}"] = length[here].mean().item()
            metrics[f"truncated/{name}"] = truncated[here].mean().item()
    return metrics


def first_sample(batch: Mapping[str, Tensor], tokenizer: Any) -> dict[str, Any]:
    """The first sample, for NeMo-Aligner's table of samples."""
    tokens = batch["response_tokens"][0]
    start, stop = int(batch["prompt_lengths"][0]), int(batch["response_lengths"][0])
    return {
        "reward": batch["rewards"][0].item(),
        "prompt": tokenizer.ids_to_text(tokens[:start].tolist()),
        "response": tokenizer.ids_to_text(tokens[start:stop].tolist()),
    }


def step_metrics(result: StepResult, minibatch: Minibatch, actor: Any, *, penalised: bool) -> dict[str, float]:
    """Metrics of an optimizer step over all ranks, by one exchange: the maximum recompute error, the KL penalty if
    there is one, and shares of tokens that changed their experts. SPMD: every rank calls it."""
    axes, experts = actor.reducer.axes, actor.experts
    counts = torch.zeros(2, 0, dtype=torch.float64)
    if minibatch.expert_labels is not None:
        counts = experts.changed(minibatch)
    sums = torch.cat([torch.tensor([result.extra_loss], dtype=torch.float64), counts.flatten()])
    own = torch.cat([torch.tensor([result.recompute_error]).double(), sums * axes.represents])
    own = own.to(torch.cuda.current_device())
    gathered = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(axes.group))]
    torch.distributed.all_gather(gathered, own, group=axes.group)
    values = torch.stack(gathered).cpu()
    metrics = {"recompute_error": values[:, 0].max().item()}
    if penalised:
        metrics["kl_penalty"] = values[:, 1].sum().item()
    if minibatch.expert_labels is not None:
        metrics |= routing_metrics(values[:, 2:].sum(0).view_as(counts), experts.names)
    return metrics
