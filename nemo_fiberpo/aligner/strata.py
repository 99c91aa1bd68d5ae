"""Labels of the strata: from the prompts' data, and from the rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nemo_fiberpo.aligner.experts import labels_of
from nemo_fiberpo.aligner.prompts import PromptDataset
from nemo_fiberpo.labelling.expert_partitions import COLUMN
from nemo_fiberpo.objective import Hierarchy, prefix_state_labels

UNNAMED_STRATA = ("prompt_group", "trajectory", "state")  # their labels are numbers of the rollout


class StrataLabels:
    """Labels and names of everything that a hierarchy needs labels of.

    partitions   names of the partitions of experts, where the hierarchy asks for them
    """

    def __init__(self, hierarchy: Hierarchy, prompts: PromptDataset, partitions: Sequence[str] = ()):
        self.hierarchy, self.prompts, self.partitions = hierarchy, prompts, tuple(partitions)

    @property
    def names(self) -> dict[str, Sequence[str]]:
        """The names of the label values, by the name of the column, of the columns that have names."""
        optional = self.hierarchy.optional_columns
        out: dict[str, Sequence[str]] = {}
        for name in self.hierarchy.columns:
            if name == COLUMN:
                out[name] = self.partitions
            elif name not in UNNAMED_STRATA:
                out[name] = self.prompts.label_names(name, name in optional)
        return out

    def labels(self, part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """int64 [b] per column of the hierarchy: the labels of each sample, -1 for none where that may be. Those of
        states and of experts are labels of tokens, [b, s - 1]; memberships of experts are uint8 [b, s - 1, partitions].
        Without `response_tokens` every sample stands for a state of its own."""
        index = part["prompt_index"]
        out: dict[str, Tensor] = {}
        for name in self.hierarchy.columns:
            if name == COLUMN:
                out[name] = labels_of(part)
            elif name == "state" and "response_tokens" in part:
                out[name] = prefix_state_labels(part["response_tokens"], index)
            elif name in UNNAMED_STRATA:
                out[name] = index if name == "prompt_group" else part["trajectory"]
            else:
                table = self.prompts.label_table(name, name in self.hierarchy.optional_columns)
                out[name] = table[index.cpu()].to(index.device)
        return out

    def check(self) -> None:
        """ValueError if the hierarchy cannot be made from this data set: an unknown stratum, a budget override that
        names no cell, strata that do not nest, a join or a branch that would count a drift twice. One token per prompt
        stands for all that will be sampled from it; one for each of two partitions of experts."""
        tokens = min(max(len(self.partitions), 1), 2)
        sample = torch.arange(len(self.prompts)).repeat_interleave(tokens)
        part = {"prompt_index": sample + self.prompts.first_index, "trajectory": sample}
        part[COLUMN] = torch.arange(len(sample)) % tokens
        labels, mask = self.labels(part), torch.ones(len(sample), dtype=torch.bool)
        # The mask tells the number of tokens where no stratum does: with the token clip alone there are no labels.
        self.hierarchy.cells(labels, mask, names=self.names)
        self.hierarchy.check_data(labels, mask, names=self.names)
