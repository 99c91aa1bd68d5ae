"""Prompts as items and batches for NeMo-Aligner's PPO generation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_fiberpo.prompts.chat import chat_ids
from nemo_fiberpo.prompts.records import PromptRecord
from nemo_fiberpo.values import at, did_you_mean, one_of


class Tokenizer(Protocol):
    """The methods of NeMo's tokenizers that are used."""

    @property
    def eos_id(self) -> int: ...
    def text_to_ids(self, text: str) -> list[int]: ...
    def ids_to_text(self, ids: list[int]) -> str: ...


def prompt_ids(record: PromptRecord, tokenizer: Tokenizer, bos_id: int | None) -> list[int]:
    """The tokens of a prompt. A text begins with `bos_id`, unless that is None; `messages` follow the chat template.
    ValueError naming file and line for a prompt without tokens, or as `chat_ids`."""
    if record.messages is not None:
        with at(f"{record.where}: "):
            ids = chat_ids(record.messages, tokenizer)
    else:
        ids = tokenizer.text_to_ids(record.prompt)
    if not ids:
        raise ValueError(f"{record.where}: {record.prompt_field}: {record.prompt!r} has no tokens in this vocabulary")
    return ids if bos_id is None or record.messages is not None else [bos_id, *ids]


class PromptDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The prompts of one file, as `load_prompts` reads them, tokenized. An item is {text: int64 [length], length,
    prompt_index, domain}.

    domains        names of the domains in the order of their ids; None: the file's own, sorted. Give a held-out set the
                   training set's; other domains are an error.
    first_index    `prompt_index` of the first prompt, so that a held-out set can share the training set's grader
    too_long       for a prompt of more than max_prompt_length tokens: "error", or "drop" it (`dropped` counts them)
    bos_id         a token that every text begins with, counted in its length, or None. For `messages` the chat template
                   decides

    Every rank holds the same items.
    """

    def __init__(
        self,
        records: Sequence[PromptRecord],
        tokenizer: Tokenizer,
        max_prompt_length: int,
        *,
        domains: Sequence[str] | None = None,
        first_index: int = 0,
        too_long: str = "error",
        bos_id: int | None = None,
    ):
        one_of(too_long, "too_long", ("error", "drop"))
        self.domains = list(domains) if domains is not None else sorted({record.domain for record in records})
        for record in records:
            if record.domain not in self.domains:
                hint = did_you_mean(record.domain, self.domains)
                raise ValueError(
                    f"{record.where}: domain: {record.domain!r} is not in the training data{hint}; "
                    f"its domains are {', '.join(self.domains)}"
                )
        tokens = [prompt_ids(record, tokenizer, bos_id) for record in records]
        fits = [len(ids) <= max_prompt_length for ids in tokens]
        self.dropped = fits.count(False)
        if self.dropped and (too_long == "error" or self.dropped == len(records)):
            record, ids = next((record, ids) for record, ids, fit in zip(records, tokens, fits, strict=True) if not fit)
            raise ValueError(
                f"{record.where}: {record.prompt_field}: {len(ids)} tokens, more than max_prompt_length = "
                f"{max_prompt_length}; so are {self.dropped} of {len(records)} prompts of this file. Shorten them, "
                "raise max_prompt_length, or set too_long: drop"
            )
        self.records = [record for record, fit in zip(records, fits, strict=True) if fit]
        self.first_index = first_index
        domain_id = {name: number for number, name in enumerate(self.domains)}
        self._domain = [domain_id[record.domain] for record in self.records]
        self._tokens = [torch.tensor(ids, dtype=torch.int64) for ids, fit in zip(tokens, fits, strict=True) if fit]

    def __len__(self) -> int:
        return len(self.records)

    def check_tokens(self, vocab_size: int) -> None:
        """ValueError naming the first prompt with a token outside [0, vocab_size)."""
        for record, tokens in zip(self.records, self._tokens, strict=True):
            outside = tokens[(tokens < 0) | (tokens >= vocab_size)].tolist()
            if outside:
                raise ValueError(
                    f"{record.where}: {record.prompt_field}: has the token {outside[0]}, which is outside the "
                    f"tokenizer's vocabulary of {vocab_size}"
                )

    def label_names(self, stratum: str, optional: bool = False) -> list[str]:
        """The names of a stratum's label values: the domains, or the records' own labels, sorted.

        ValueError naming the first record that has no label for the stratum; with `optional`, only if none has one.
        """
        if stratum == "domain":
            return self.domains
        labels = {record.strata[stratum] for record in self.records if stratum in record.strata}
        without = next((record for record in self.records if stratum not in record.strata), None)
        if without is not None and not (optional and labels):
            known = ["domain", "prompt_group", "trajectory", *without.strata]
            raise ValueError(
                f"{without.where}: strata: has no label for the stratum {stratum!r} of the hierarchy; domain, "
                f"prompt_group and trajectory need none{did_you_mean(stratum, known)}"
            )
        return sorted(labels)

    @functools.cache  # noqa: B019 (a data set lives as long as the process)
    def label_table(self, stratum: str, optional: bool = False) -> Tensor:
        """int64 [prompts]: the label of each prompt at a stratum; -1 for none."""
        value: dict[str | None, int] = {name: number for number, name in enumerate(self.label_names(stratum, optional))}
        names = (record.domain if stratum == "domain" else record.strata.get(stratum) for record in self.records)
        return torch.tensor([value.get(name, -1) for name in names], dtype=torch.int64)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        text = self._tokens[index]
        return {
            "text": text,
            "length": text.numel(),
            "prompt_index": self.first_index + index,
            "domain": self._domain[index],
        }


class PromptSubset(torch.utils.data.Subset[dict[str, Any]]):
    """The prompts at `places` of a data set, in that order, with their `prompt_index` unchanged."""

    def __init__(self, prompts: PromptDataset, places: Sequence[int]):
        super().__init__(prompts, places)
        self.records = [prompts.records[place] for place in places]


def collate_prompts(items: Sequence[dict[str, Any]], eos_id: int, generation_length: int) -> dict[str, Tensor]:
    """A batch of b prompts with room to generate, for NeMo-Aligner's actor.

    Returns int64 tensors: text [b, longest prompt + generation_length], padded with eos_id; length, prompt_index and
    domain [b].
    """
    lengths = [item["length"] for item in items]
    text = torch.full((len(items), max(lengths) + generation_length), eos_id, dtype=torch.int64)
    for row, item in zip(text, items, strict=True):
        row[: item["length"]] = item["text"]
    columns = {name: torch.tensor([item[name] for item in items]) for name in ("length", "prompt_index", "domain")}
    return {"text": text} | columns
