"""Labels of the strata, from the prompts' data and from the rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nemo_fiberpo.aligner.data.prompts import PromptDataset
from nemo_fiberpo.aligner.rollout.experts import labels_of
from nemo_fiberpo.labelling.expert_partitions import COLUMN
from nemo_fiberpo.labelling.token_labels import PREFIX
from nemo_fiberpo.objective import Hierarchy, prefix_state_labels

UNNAMED_STRATA = ("prompt_group", "trajectory", "state")  # labelled by numbers of the rollout


class StrataLabels:
    """Labels and label names of all columns of a hierarchy.

    partitions   names of the partitions of experts, if the hierarchy uses them
    of_tokens    column of `token_labels` -> names of its labels, or None if each rollout has its own: `of_rollout`
    """

    def __init__(
        self,
        hierarchy: Hierarchy,
        prompts: PromptDataset,
        partitions: Sequence[str] = (),
        of_tokens: Mapping[str, Sequence[str] | None] | None = None,
    ):
        self.hierarchy, self.prompts, self.partitions = hierarchy, prompts, tuple(partitions)
        self.of_tokens = dict(of_tokens or {})
        self.of_rollout: Mapping[str, Sequence[str]] = {}

    @property
    def names(self) -> dict[str, Sequence[str]]:
        """The names of the label values by column, for the columns that have names."""
        optional = self.hierarchy.optional_columns
        out: dict[str, Sequence[str]] = {}
        for name in self.hierarchy.columns:
            if name == COLUMN:
                out[name] = self.partitions
            elif name in self.of_tokens:
                out[name] = self.of_tokens[name] or self.of_rollout[name]
            elif name not in UNNAMED_STRATA:
                out[name] = self.prompts.label_names(name, name in optional)
        return out

    def labels(self, part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Per column of the hierarchy: int64 [b], the label of each sample, -1 for none if optional. Labels of states,
        experts and `token_labels` are [b, s - 1]; memberships of experts are uint8 [b, s - 1, partitions]. Without
        `response_tokens` every sample has a state of its own."""
        index = part["prompt_index"]
        out: dict[str, Tensor] = {}
        for name in self.hierarchy.columns:
            if name == COLUMN:
                out[name] = labels_of(part)
            elif name in self.of_tokens:
                out[name] = part[PREFIX + name].long()
            elif name == "state" and "response_tokens" in part:
                out[name] = prefix_state_labels(part["response_tokens"], index)
            elif name in UNNAMED_STRATA:
                out[name] = index if name == "prompt_group" else part["trajectory"]
            else:
                table = self.prompts.label_table(name, name in self.hierarchy.optional_columns)
                out[name] = table[index.cpu()].to(index.device)
        return out

    def check(self) -> None:
        """ValueError if the hierarchy does not fit this data set: an unknown stratum, a budget of an unknown cell,
        strata that do not nest, a join or a branch that would count a drift twice.

        One token per prompt stands for its samples; one for each combination of two labels where experts and
        `token_labels` distinguish tokens.
        """
        self._refuse_names_of_rollouts()
        own = [COLUMN] if len(self.partitions) > 1 else []
        own += [name for name in self.of_tokens if name in self.hierarchy.columns]
        tokens = 2 ** len(own)
        sample = torch.arange(len(self.prompts)).repeat_interleave(tokens)
        part = {"prompt_index": sample + self.prompts.first_index, "trajectory": sample}
        part[COLUMN] = torch.zeros_like(sample)
        for place, name in enumerate(own):
            part[name if name == COLUMN else PREFIX + name] = torch.arange(len(sample)) >> place & 1
        self.of_rollout = {name: ("first", "second") for name, names in self.of_tokens.items() if names is None}
        labels, mask = self.labels(part), torch.ones(len(sample), dtype=torch.bool)
        # With only a token clip there are no labels; the mask gives the number of tokens.
        self.hierarchy.cells(labels, mask, names=self.names)
        self.hierarchy.check_data(labels, mask, names=self.names)
        self.of_rollout = {}

    def _refuse_names_of_rollouts(self) -> None:
        """ValueError if the hierarchy refers to labels by names that only a rollout determines."""
        strata = {stratum.name: stratum for stratum in self.hierarchy.active}
        for column in (name for name, names in self.of_tokens.items() if names is None):
            for stratum in strata.values():
                kept = [name for name in stratum.only if column in strata[name].columns]
                if kept or (stratum.budgets and column in stratum.columns):
                    field = f"only.{kept[0]}" if kept else "budgets"
                    raise ValueError(
                        f"stratum {stratum.name!r}, {field}: refers to cells by name, but the names of {column!r} "
                        f"are known only after a rollout; list them in token_labels.{column}.names"
                    )
