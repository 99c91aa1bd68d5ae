"""Prompts from JSONL files, as items and batches that NeMo-Aligner's PPO generation takes.

One JSON object a line:
    prompt     text, not empty
    domain     name of the domain; the strata `domain` and `prompt_group` are made of this and of the prompt's index
    grader     "reasoning_gym" (with `task`, `entry`), "math_verify" (with `answer`), both with an optional
               `answer_form`, or one of the config's own, whose fields are free
    id         optional, unique in the file
    response   optional reference answer, for a supervised warm start
    strata     optional {stratum: label} for strata of the hierarchy's own beside domain, prompt_group and trajectory,
               such as {"language": "en"}; labels are text
    meta       optional, anything: where the rest of a public data set can stay; nothing reads it
Blank lines and a byte-order mark are skipped. Every refusal is a ValueError that names file, line and field, of the
first ten lines that are wrong.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_fiberpo.aligner.data.jsonl import lines_of, parse_line
from nemo_fiberpo.graders.builtin import ANSWER_FORMS, GRADER_FIELDS
from nemo_fiberpo.labelling.expert_partitions import COLUMN
from nemo_fiberpo.values import at, short

_REQUIRED = ("prompt", "domain", "grader")
_OPTIONAL = ("id", "response")
_STRATA, _META = "strata", "meta"
_OF_ROLLOUT = ("domain", "prompt_group", "trajectory", "state", COLUMN)  # strata whose labels are not for `strata`
_ALL = "all"  # in metrics and tables, the mean over all domains
_TOLD = 10  # lines that are wrong of which a message tells
_JSON_NAMES: dict[type, str] = {str: "a string", dict: "an object"}


class Tokenizer(Protocol):
    """What is used of NeMo's tokenizers."""

    @property
    def eos_id(self) -> int: ...
    def text_to_ids(self, text: str) -> list[int]: ...
    def ids_to_text(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class PromptRecord:
    """One prompt. `fields` is what its grader gets; `where` is "file:line", for messages."""

    prompt: str
    domain: str
    grader: str
    fields: dict[str, Any] = field(repr=False)
    where: str
    id: str | None = None
    response: str | None = None
    strata: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def line(self) -> int:
        """Its line in the file, from 1."""
        return int(self.where.rpartition(":")[2])


def load_prompts(path: str | Path, own_graders: Collection[str] = ()) -> list[PromptRecord]:
    """Read and check a JSONL file of prompts (format at the top of this module).

    `own_graders` names the graders that the config adds to the ones that ship. ValueError names file, line and field,
    for a file that cannot be read the file.
    """
    records: list[PromptRecord] = []
    wrong: list[str] = []
    seen: dict[str, str] = {}
    for where, line in lines_of(Path(path)):
        try:
            record = _record(where, line, own_graders)
            if record.id is not None and seen.setdefault(record.id, where) != where:
                raise ValueError(f"{where}: id: {record.id!r} is also the id of {seen[record.id]}")
            records.append(record)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        more = f"\nand {len(wrong) - _TOLD} more of {len(wrong) + len(records)} lines" if len(wrong) > _TOLD else ""
        raise ValueError("\n".join(wrong[:_TOLD]) + more)
    if not records:
        raise ValueError(f"{path}: no prompts in it; expected one JSON object a line")
    return records


def _record(where: str, line: bytes, own_graders: Collection[str]) -> PromptRecord:
    with at(f"{where}: "):
        data = parse_line(line)
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(data).__name__}")
    for name in _REQUIRED:
        _require(where, data, name, str)
        if not data[name].strip():
            raise ValueError(f"{where}: {name}: is empty")
    grader, graders = data["grader"], [*GRADER_FIELDS, *own_graders]
    if grader not in graders:
        raise ValueError(f"{where}: grader: {grader!r} is unknown{_hint(grader, graders)}; known: {', '.join(graders)}")
    for name in _OPTIONAL:
        if name in data:
            _require(where, data, name, str)
            if not data[name].strip():
                raise ValueError(f"{where}: {name}: is empty; leave it out")
    strata = data.get(_STRATA, {})
    _check_names(where, "domain", [data["domain"]])
    if data["domain"] == _ALL:
        raise ValueError(f"{where}: domain: {_ALL!r} is what the mean over all domains is called; take another name")
    _check_strata(where, strata)
    known = (*_REQUIRED, *_OPTIONAL, _STRATA, _META)
    rest = {name: value for name, value in data.items() if name not in known}
    if grader in GRADER_FIELDS and grader not in own_graders:
        _check_fields(where, grader, rest)
    prompt, domain, identity, response = data["prompt"], data["domain"], data.get("id"), data.get("response")
    return PromptRecord(prompt, domain, grader, rest, where, identity, response, strata)


def _check_strata(where: str, strata: Any) -> None:
    if not isinstance(strata, dict) or not all(isinstance(label, str) for label in strata.values()):
        raise ValueError(f"{where}: {_STRATA}: expected an object of stratum: label (text), found {short(strata)}")
    for name in strata:
        if name in _OF_ROLLOUT:
            raise ValueError(
                f"{where}: {_STRATA}.{name}: {name!r} has labels of its own, these would not be read; take another name"
            )
    _check_names(where, _STRATA, [*strata, *strata.values()])


def _check_names(where: str, field: str, names: Iterable[str]) -> None:
    """They stand in the keys of metrics and in tables."""
    for name in names:
        if not name.strip() or not name.isprintable():
            raise ValueError(f"{where}: {field}: {short(name)} is no name: it is empty, or has control characters")


def _check_fields(where: str, grader: str, fields: dict[str, Any]) -> None:
    required, optional = GRADER_FIELDS[grader]
    known = required | optional
    for name in required:
        _require(where, fields, name, required[name])
    for name in fields:
        if name not in known:
            valid = [*_REQUIRED, *_OPTIONAL, _STRATA, *known, _META]
            raise ValueError(
                f"{where}: {name}: unknown field{_hint(name, valid)}; valid: {', '.join(valid)}. What nothing reads "
                f"can stay in {_META}"
            )
        _require(where, fields, name, known[name])
        if not fields[name] or (isinstance(fields[name], str) and not fields[name].strip()):
            raise ValueError(f"{where}: {name}: is empty")
    forms = ANSWER_FORMS[grader]
    form = fields.get("answer_form", forms[0])
    if form not in forms:
        raise ValueError(f"{where}: answer_form: {form!r} is unknown{_hint(form, forms)}; known: {', '.join(forms)}")


def _require(where: str, data: dict[str, Any], name: str, kind: type) -> None:
    if name not in data:
        near = difflib.get_close_matches(name, data, n=1)
        raise ValueError(f"{where}: {name}: missing" + (f"; is {near[0]!r} meant to be it?" if near else ""))
    if not isinstance(data[name], kind):
        number = kind is str and isinstance(data[name], int | float) and not isinstance(data[name], bool)
        hint = f'; write "{json.dumps(data[name])}"' if number else ""
        raise ValueError(f"{where}: {name}: expected {_JSON_NAMES[kind]}, found {type(data[name]).__name__}{hint}")


def _hint(name: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class PromptDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The prompts of one file, tokenized; an item is {text: int64 [length], length, prompt_index, domain}.

    domains        names of the domains in the order of their ids; None: the file's own, sorted. Give a validation set
                   the training set's; a domain outside it is an error.
    first_index    `prompt_index` of the first prompt. A validation set that starts where the training set ends shares
                   one grader with it: `RuleRewards(train.records + validation.records)`.
    too_long       a prompt of more than max_prompt_length tokens: "error", or "drop" it (`dropped` counts them).
    bos_id         a token that every prompt begins with, counted in its length; None: the text's tokens alone

    Every rank reads the same file and holds the same items.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        max_prompt_length: int,
        *,
        domains: Sequence[str] | None = None,
        first_index: int = 0,
        too_long: str = "error",
        own_graders: Collection[str] = (),
        bos_id: int | None = None,
    ):
        if too_long not in ("error", "drop"):
            raise ValueError(f"too_long: {too_long!r}; valid are 'error' and 'drop'")
        records = load_prompts(path, own_graders)
        self.domains = list(domains) if domains is not None else sorted({record.domain for record in records})
        for record in records:
            if record.domain not in self.domains:
                hint = _hint(record.domain, self.domains)
                raise ValueError(
                    f"{record.where}: domain: {record.domain!r} is not in the training data{hint}; "
                    f"its domains are {', '.join(self.domains)}"
                )
        tokens = [tokenizer.text_to_ids(record.prompt) for record in records]
        for record, ids in zip(records, tokens, strict=True):
            if not ids:
                raise ValueError(f"{record.where}: prompt: {record.prompt!r} has no tokens in this vocabulary")
        if bos_id is not None:
            tokens = [[bos_id, *ids] for ids in tokens]
        fits = [len(ids) <= max_prompt_length for ids in tokens]
        self.dropped = fits.count(False)
        if self.dropped and (too_long == "error" or self.dropped == len(records)):
            first = fits.index(False)
            raise ValueError(
                f"{records[first].where}: prompt: {len(tokens[first])} tokens, more than max_prompt_length = "
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
        """ValueError naming the first prompt with a token outside [0, vocab_size), which no policy could have said."""
        for record, tokens in zip(self.records, self._tokens, strict=True):
            outside = tokens[(tokens < 0) | (tokens >= vocab_size)].tolist()
            if outside:
                raise ValueError(
                    f"{record.where}: prompt: the tokenizer makes the token {outside[0]} of it, outside its own "
                    f"vocabulary of {vocab_size}"
                )

    def subset(self, places: Sequence[int]) -> PromptSubset:
        """The prompts at `places`; their `prompt_index` stays what it is here."""
        return PromptSubset(self, places)

    def label_names(self, stratum: str, optional: bool = False) -> list[str]:
        """The names of a stratum's label values, value v at place v: the domains, or the records' own labels, sorted.

        ValueError naming the first record that has no label for the stratum; with `optional` if none has one.
        """
        if stratum == "domain":
            return self.domains
        labels = {record.strata[stratum] for record in self.records if stratum in record.strata}
        without = next((record for record in self.records if stratum not in record.strata), None)
        if without is not None and not (optional and labels):
            known = ["domain", "prompt_group", "trajectory", *without.strata]
            raise ValueError(
                f"{without.where}: strata: has no label for the stratum {stratum!r} of the hierarchy; domain, "
                f"prompt_group and trajectory need none{_hint(stratum, known)}"
            )
        return sorted(labels)

    @functools.cache  # noqa: B019 (a data set lives as long as the process)
    def label_table(self, stratum: str, optional: bool = False) -> Tensor:
        """int64 [prompts]: the label of each prompt at a stratum, by its place in this data set; -1 for none."""
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
    """Some prompts of a data set, in an order of one's own."""

    def __init__(self, prompts: PromptDataset, places: Sequence[int]):
        super().__init__(prompts, places)
        self.records = [prompts.records[place] for place in places]


def collate_prompts(items: Sequence[dict[str, Any]], eos_id: int, generation_length: int) -> dict[str, Tensor]:
    """A batch of b prompts with room to generate, as NeMo-Aligner's actor expects it.

    Returns int64 tensors: text [b, longest prompt + generation_length], padded with eos_id; length, prompt_index and
    domain [b].
    """
    lengths = [item["length"] for item in items]
    text = torch.full((len(items), max(lengths) + generation_length), eos_id, dtype=torch.int64)
    for row, item in zip(text, items, strict=True):
        row[: item["length"]] = item["text"]
    columns = {name: torch.tensor([item[name] for item in items]) for name in ("length", "prompt_index", "domain")}
    return {"text": text} | columns


def make_collate(eos_id: int, generation_length: int) -> Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]:
    """`collate_prompts` with its constants bound, picklable for data-loader workers."""
    return functools.partial(collate_prompts, eos_id=eos_id, generation_length=generation_length)
