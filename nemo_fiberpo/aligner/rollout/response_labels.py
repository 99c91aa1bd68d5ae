"""Labels of the sampled tokens (`token_labels` of a hierarchy), as columns of a rollout. Each rank labels what it
generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nemo_fiberpo.aligner.data.prompts import PromptDataset
from nemo_fiberpo.labelling.spelling import Speller, Tokenizer
from nemo_fiberpo.labelling.token_labels import PREFIX, TokenLabels, merged, renumbered
from nemo_fiberpo.values import at

Names = dict[str, list[str]]


class ResponseLabels:
    """Labels the samples of rollouts. ValueError naming the field for what `TokenLabels.check` finds, and for a prompt
    that has a label of its own in a column of `token_labels`."""

    def __init__(self, labels: TokenLabels, tokenizer: Tokenizer, prompts: PromptDataset):
        self._labels, self._speller, self._prompts = labels, Speller(tokenizer), prompts
        self._found: list[Names] = []
        for record in prompts.records:
            for name in labels.sources:
                if name in record.strata:
                    raise ValueError(
                        f"{record.where}: strata.{name}: hierarchy.token_labels has a column of that name; remove "
                        "one of the two"
                    )
        with_response = next((record for record in prompts.records if record.response), prompts.records[0])
        with at("hierarchy."):
            labels.check(self._speller, with_response)

    def add_to(self, sample: dict[str, Tensor]) -> None:
        """Add the columns of a batch of samples; the names of their labels are kept for `names`."""
        index = (sample["prompt_index"] - self._prompts.first_index).tolist()
        records = [self._prompts.records[place] for place in index]
        lengths = sample["prompt_lengths"], sample["response_lengths"]
        with at("hierarchy."):
            columns, names = self._labels.columns(sample["response_tokens"], *lengths, self._speller, records)
        sample.update(columns)
        self._found.append(names)

    @property
    def names(self) -> Names:
        """The labels that this rank's batches since `agree` have, for columns whose names are not known in advance."""
        columns = [name for name, cells in self._labels.cells.items() if cells is None]
        return {column: merged(column, [names.get(column, []) for names in self._found]) for column in columns}

    def agree(self, samples: Sequence[dict[str, Tensor]], of_ranks: Sequence[Mapping[str, Any]]) -> Names:
        """The rollout's names, from those of all ranks; renumbers the labels of this rank's batches accordingly."""
        agreed = {column: merged(column, [names[column] for names in of_ranks]) for column in self.names}
        for sample, names in zip(samples, self._found, strict=True):
            for column, own in names.items():
                sample[PREFIX + column] = renumbered(sample[PREFIX + column], own, agreed[column])
        self._found = []
        return agreed
