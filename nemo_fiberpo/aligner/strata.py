"""Labels of the strata: from the prompts' data, and from the rollout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_fiberpo.aligner.prompts import PromptDataset
from nemo_fiberpo.objective import Hierarchy, prefix_state_labels

UNNAMED_STRATA = ("prompt_group", "trajectory", "state")  # their labels are numbers of the rollout


def check_strata(hierarchy: Hierarchy, prompts: PromptDataset) -> None:
    """ValueError if the hierarchy cannot be made from this data set: an unknown stratum, a budget override that names
    no cell, strata that do not nest, a join or a branch that would count a drift twice. One token per prompt stands for
    all that will be sampled from it."""
    everything = torch.arange(len(prompts))
    part = {"prompt_index": everything + prompts.first_index, "trajectory": everything}
    labels, names = stratum_labels(hierarchy, part, prompts), stratum_names(hierarchy, prompts)
    hierarchy.cells(labels, names=names)
    hierarchy.check_data(labels, names=names)


def stratum_names(hierarchy: Hierarchy, prompts: PromptDataset) -> dict[str, list[str]]:
    """The names of the label values of everything that the hierarchy needs labels of and that has names."""
    optional = hierarchy.optional_columns
    return {
        name: prompts.label_names(name, name in optional) for name in hierarchy.columns if name not in UNNAMED_STRATA
    }


def stratum_labels(hierarchy: Hierarchy, part: Mapping[str, Tensor], prompts: PromptDataset) -> dict[str, Tensor]:
    """int64 [b] per name of `hierarchy.columns`: the labels of each sample, -1 for none where that may be; [b, s - 1]
    for states, which are those of tokens. Without `response_tokens` every sample stands for a state of its own."""
    index, labels = part["prompt_index"], {}
    for name in hierarchy.columns:
        if name == "state" and "response_tokens" in part:
            labels[name] = prefix_state_labels(part["response_tokens"], index)
        elif name in UNNAMED_STRATA:
            labels[name] = index if name == "prompt_group" else part["trajectory"]
        else:
            table = prompts.label_table(name, name in hierarchy.optional_columns)
            labels[name] = table[index.cpu()].to(index.device)
    return labels
