"""Prompts in JSONL files.

One JSON object a line:
    prompt     text, not empty, passed to the policy unchanged
    messages   instead of prompt, a conversation: [{"role": "user", "content": "2+5="}], with the roles system, user,
               assistant and tool. The tokenizer's chat template formats it and adds the generation prompt, as
               transformers' `apply_chat_template` does; `add_BOS` does not apply. A template that writes today's date
               makes another prompt each day
    domain     name of the domain, the label of the stratum `domain`
    grader     "reasoning_gym" (with `task`, `entry`), "math_verify" (with `answer`), both with an optional
               `answer_form`, or a custom one of the config, with any fields
    id         optional, unique in the file
    response   optional reference answer, for a supervised warm start
    strata     optional {stratum: label} for strata other than domain, prompt_group and trajectory, such as
               {"language": "en"}; labels are text
    meta       optional, anything; not read
Blank lines and a byte-order mark are skipped. Errors are ValueErrors that name file, line and field of the first ten
faulty lines.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_fiberpo.graders.builtin import ANSWER_FORMS, GRADER_FIELDS
from nemo_fiberpo.labelling.expert_partitions import COLUMN
from nemo_fiberpo.prompts.chat import check_messages
from nemo_fiberpo.prompts.jsonl import lines_of, parse_line
from nemo_fiberpo.values import at, did_you_mean, short

_PROMPT, _MESSAGES = "prompt", "messages"  # a line has one of the two
_REQUIRED = ("domain", "grader")
_OPTIONAL = ("id", "response")
_STRATA, _META = "strata", "meta"
_OF_ROLLOUT = ("domain", "prompt_group", "trajectory", "state", COLUMN)  # strata whose labels are not for `strata`
_ALL = "all"  # in metrics and tables, the mean over all domains
_TOLD = 10  # faulty lines that a message lists
_JSON_NAMES: dict[type, str] = {str: "a string", dict: "an object"}


@dataclass(frozen=True)
class PromptRecord:
    """One prompt. `fields` is what its grader gets; `where` is "file:line", for error messages.

    `prompt` is the text; with `messages`, the content of the last one.
    """

    prompt: str
    domain: str
    grader: str
    fields: dict[str, Any] = field(repr=False)
    where: str
    id: str | None = None
    response: str | None = None
    strata: dict[str, str] = field(default_factory=dict, repr=False)
    messages: tuple[dict[str, str], ...] | None = field(default=None, repr=False)

    @property
    def line(self) -> int:
        """Its line in the file, from 1."""
        return int(self.where.rpartition(":")[2])

    @property
    def prompt_field(self) -> str:
        """The field of the line with the prompt."""
        return _PROMPT if self.messages is None else _MESSAGES


def load_prompts(path: str | Path, own_graders: Collection[str] = ()) -> list[PromptRecord]:
    """Read and check a JSONL file of prompts (format at the top of this module).

    `own_graders` are the names of the config's custom graders. ValueError naming file, line and field.
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
    messages = _messages(where, data)
    for name in _REQUIRED if messages else (_PROMPT, *_REQUIRED):
        _require(where, data, name, str)
        if not data[name].strip():
            raise ValueError(f"{where}: {name}: is empty")
    grader, graders = data["grader"], [*GRADER_FIELDS, *own_graders]
    if grader not in graders:
        raise ValueError(
            f"{where}: grader: {grader!r} is unknown{did_you_mean(grader, graders)}; known: {', '.join(graders)}"
        )
    for name in _OPTIONAL:
        if name in data:
            _require(where, data, name, str)
            if not data[name].strip():
                raise ValueError(f"{where}: {name}: is empty; leave it out")
    strata = data.get(_STRATA, {})
    _check_names(where, "domain", [data["domain"]])
    if data["domain"] == _ALL:
        raise ValueError(f"{where}: domain: {_ALL!r} is the name of the mean over all domains; use another name")
    _check_strata(where, strata)
    known = (_PROMPT, _MESSAGES, *_REQUIRED, *_OPTIONAL, _STRATA, _META)
    rest = {name: value for name, value in data.items() if name not in known}
    if grader in GRADER_FIELDS and grader not in own_graders:
        _check_fields(where, grader, rest)
    prompt = messages[-1]["content"] if messages else data[_PROMPT]
    identity, response = data.get("id"), data.get("response")
    return PromptRecord(prompt, data["domain"], grader, rest, where, identity, response, strata, messages)


def _messages(where: str, data: dict[str, Any]) -> tuple[dict[str, str], ...] | None:
    """The checked `messages` of a line, None if it has a `prompt` instead."""
    if _MESSAGES not in data:
        if isinstance(data.get(_PROMPT), list):
            raise ValueError(f"{where}: {_PROMPT}: expected a string, found list; chat messages go into {_MESSAGES}")
        if _PROMPT not in data and (hint := did_you_mean(_MESSAGES, data)):
            raise ValueError(f"{where}: {_MESSAGES}: missing{hint}")
        return None
    if _PROMPT in data:
        raise ValueError(f"{where}: {_MESSAGES}: given beside {_PROMPT}; a line has one of the two")
    with at(f"{where}: "):
        check_messages(data[_MESSAGES])
    return tuple(data[_MESSAGES])


def _check_strata(where: str, strata: Any) -> None:
    if not isinstance(strata, dict) or not all(isinstance(label, str) for label in strata.values()):
        raise ValueError(f"{where}: {_STRATA}: expected an object of stratum: label (text), found {short(strata)}")
    for name in strata:
        if name in _OF_ROLLOUT:
            raise ValueError(
                f"{where}: {_STRATA}.{name}: {name!r} has its own labels, these would not be read; use another name"
            )
    _check_names(where, _STRATA, [*strata, *strata.values()])


def _check_names(where: str, field: str, names: Iterable[str]) -> None:
    """They are used in the keys of metrics and in tables."""
    for name in names:
        if not name.strip() or not name.isprintable():
            raise ValueError(f"{where}: {field}: {short(name)} is no valid name: empty, or with control characters")


def _check_fields(where: str, grader: str, fields: dict[str, Any]) -> None:
    required, optional = GRADER_FIELDS[grader]
    known = required | optional
    for name in required:
        _require(where, fields, name, required[name])
    for name in fields:
        if name not in known:
            valid = [_PROMPT, _MESSAGES, *_REQUIRED, *_OPTIONAL, _STRATA, *known, _META]
            raise ValueError(
                f"{where}: {name}: unknown field{did_you_mean(name, valid)}; valid: {', '.join(valid)}. Put other data "
                f"into {_META}"
            )
        _require(where, fields, name, known[name])
        if not fields[name] or (isinstance(fields[name], str) and not fields[name].strip()):
            raise ValueError(f"{where}: {name}: is empty")
    forms = ANSWER_FORMS[grader]
    form = fields.get("answer_form", forms[0])
    if form not in forms:
        raise ValueError(
            f"{where}: answer_form: {form!r} is unknown{did_you_mean(form, forms)}; known: {', '.join(forms)}"
        )


def _require(where: str, data: dict[str, Any], name: str, kind: type) -> None:
    if name not in data:
        raise ValueError(f"{where}: {name}: missing{did_you_mean(name, data)}")
    if not isinstance(data[name], kind):
        number = kind is str and isinstance(data[name], int | float) and not isinstance(data[name], bool)
        hint = f'; write "{json.dumps(data[name])}"' if number else ""
        raise ValueError(f"{where}: {name}: expected {_JSON_NAMES[kind]}, found {type(data[name]).__name__}{hint}")
