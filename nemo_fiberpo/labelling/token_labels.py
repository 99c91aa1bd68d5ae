"""`token_labels` of a hierarchy: columns of labels that depend on the sampled tokens of a response, and spans of tokens
that the policy did not write.

Labels are data of the rollout, like the tokens. Entry t of a column, [b, s - 1], belongs to the token at position
t + 1, as its log-prob.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..values import at, cell_name, nearest
from .expert_partitions import COLUMN
from .markers import Markers, check_pair
from .own_function import MOST_CELLS, OwnFunction
from .patterns import Patterns
from .spelling import Response, Speller
from .time_bins import TimeBins
from .turns import Turns

PREFIX = "token_labels."
"""In a rollout, the name of a column of labels begins with this."""

IGNORED = "ignored_tokens"
"""The column of a rollout that is 1 at tokens which the policy did not write."""

TAKEN = ("domain", "prompt_group", "trajectory", "state", COLUMN)
"""Names of columns whose labels come from elsewhere."""


class Source(Protocol):
    """Where the labels of a column come from."""

    @property
    def cells(self) -> tuple[str, ...] | None:
        """Names of the labels; None if they depend on the rollout."""

    def check(self, speller: Speller) -> None: ...

    def label(self, response: Response) -> Sequence[int] | Sequence[str]:
        """The label of each token, as an index into `cells` or by name; by name if `cells` is None."""


KINDS: dict[str, Any] = {
    "markers": Markers, "bins": TimeBins, "split": Turns, "regex": Patterns, "function": OwnFunction
}  # fmt: skip
"""The key by which a source is recognized -> its class."""


@dataclass(frozen=True)
class TokenLabels:
    """Columns by name, and the spans of tokens that the policy did not write (None: it wrote all)."""

    sources: Mapping[str, Source]
    ignore: Markers | None = None

    @classmethod
    def parse(cls, sources: Any, ignore: Any) -> TokenLabels | None:
        """From the values of `token_labels` and `ignore` in a hierarchy, None if it has neither. ValueError naming the
        field."""
        if sources is None and ignore is None:
            return None
        if not isinstance(sources, Mapping | None):
            raise ValueError(f"token_labels: must be a mapping from names of columns to sources, got {sources!r}")
        made = {str(name): _source(name, given) for name, given in (sources or {}).items()}
        return cls(made, None if ignore is None else _ignored(ignore))

    def written(self) -> dict[str, Any]:
        """`token_labels` and `ignore` as plain values, the inverse of `parse`."""
        out: dict[str, Any] = {}
        if self.sources:
            out["token_labels"] = {name: _fields(source) for name, source in self.sources.items()}
        if self.ignore is not None:
            out["ignore"] = [list(pair) for pair in self.ignore.markers.values()]
        return out

    @property
    def cells(self) -> dict[str, tuple[str, ...] | None]:
        """Names of the labels by column."""
        return {name: source.cells for name, source in self.sources.items()}

    def check_columns(self, columns: Collection[str]) -> None:
        """ValueError for a column that no stratum of the hierarchy uses, enabled or not."""
        for name in self.sources:
            if name not in columns:
                raise ValueError(
                    f"token_labels.{name}: no stratum is called {name!r} or joins it, so nothing would use the labels"
                    f"{nearest(name, columns)}; add one, or remove the source"
                )

    def check(self, speller: Speller, record: Any) -> None:
        """ValueError naming the field for a marker that the tokenizer cannot produce, or a function that fails or
        returns something invalid for the reference answer of a prompt's record, or for the prompt if there is none."""
        ids = speller.tokenizer.text_to_ids(record.response or record.prompt)
        for name, source in self.sources.items():
            with at(f"token_labels.{name}."):
                source.check(speller)
                source.label(Response(ids, speller, record))
        if self.ignore is not None:
            with at("ignore: "):
                self.ignore.check(speller)

    def columns(
        self, tokens: Tensor, prompt_lengths: Tensor, lengths: Tensor, speller: Speller, records: Sequence[Any]
    ) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
        """Columns of b samples, int32 [b, s - 1], 0 outside the responses; and the names of the labels of those columns
        whose names are not known before.

        tokens int64 [b, s]; prompt_lengths and lengths (prompt included) [b]; `records` of the samples' prompts
        """
        found: dict[str, list[Sequence[Any]]] = {name: [] for name in self.sources}
        ignored: list[Sequence[int]] = []
        starts, ends = prompt_lengths.tolist(), lengths.tolist()
        for row, start, end, record in zip(tokens.tolist(), starts, ends, records, strict=True):
            response = Response(row[start:end], speller, record)
            for name, source in self.sources.items():
                with at(f"token_labels.{name}."):
                    found[name].append(source.label(response))
            if self.ignore is not None:
                kept = len(self.ignore.cells) - 1
                ignored.append([int(label != kept) for label in self.ignore.label(response)])
        columns, names = {}, {}
        for name, labels in found.items():
            known = self.sources[name].cells
            if known is None:
                names[name] = sorted({label for of in labels for label in of})
                check_number_of_cells(name, names[name])
            number = {called: place for place, called in enumerate(names.get(name, known or ()))}
            numbers = [[number.get(label, label) for label in of] for of in labels]
            columns[PREFIX + name] = _placed(numbers, starts, tokens)
        if self.ignore is not None:
            columns[IGNORED] = _placed(ignored, starts, tokens)
        return columns, names


def check_number_of_cells(column: str, names: Collection[str]) -> None:
    """ValueError for more cells than metrics and reductions are designed for."""
    if len(names) > MOST_CELLS:
        raise ValueError(
            f"token_labels.{column}: the responses of a rollout name {len(names)} cells, more than {MOST_CELLS}; name "
            "cells by what responses have in common"
        )


def merged(column: str, names: Sequence[Sequence[str]]) -> list[str]:
    """The names of a column over all ranks, in an order that is independent of the ranks."""
    out = sorted({name for of in names for name in of})
    check_number_of_cells(column, out)
    return out


def renumbered(labels: Tensor, names: Sequence[str], into: Sequence[str]) -> Tensor:
    """Labels that index `names` as labels that index `into`, which contains all of `names`."""
    if not names:
        return labels
    place = {name: number for number, name in enumerate(into)}
    return torch.tensor([place[name] for name in names], dtype=labels.dtype, device=labels.device)[labels.long()]


def _source(name: Any, given: Any) -> Source:
    where = f"token_labels.{cell_name(name, 'token_labels', 'a column')}"
    if name in TAKEN:
        raise ValueError(f"{where}: {name!r} has its own labels; use another name")
    block = {"function": given} if isinstance(given, str) else given
    if not isinstance(block, Mapping):
        raise ValueError(f"{where}: must be a source, such as {{bins: [0, 64]}}, or package.module:function")
    block = {str(key): value for key, value in block.items() if value is not None}
    kinds = [kind for kind in KINDS if kind in block]
    if len(kinds) != 1:
        raise ValueError(f"{where}: must have one of {', '.join(KINDS)}, got {', '.join(block) or 'nothing'}")
    kind = KINDS[kinds[0]]
    valid = [entry.name for entry in dataclasses.fields(kind) if entry.init]
    for key in block:
        if key not in valid:
            raise ValueError(f"{where}.{key}: unknown key of a source with {kinds[0]}{nearest(key, valid)}")
    with at(f"{where}."):
        made: Source = kind(**block)
    return made


def _ignored(given: Any) -> Markers:
    """One pair of markers, or a list of pairs."""
    pairs = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if len(pairs) == 2 and all(_like_a_marker(entry) for entry in pairs):
        pairs = [pairs]
    checked = {f"ignored_{number}": check_pair(pair, f"ignore[{number}]") for number, pair in enumerate(pairs)}
    if not checked:
        raise ValueError("ignore: must be a pair of markers, or a list of pairs; leave it out to train on all tokens")
    with at("ignore: "):
        return Markers(checked)


def _like_a_marker(value: Any) -> bool:
    ids = isinstance(value, Sequence) and all(isinstance(token, int) for token in value)
    return isinstance(value, str) or ids


def _fields(source: Any) -> dict[str, Any]:
    values = {entry.name: getattr(source, entry.name) for entry in dataclasses.fields(source) if entry.init}
    return {key: value for key, value in values.items() if value not in (None, ())}


def _placed(labels: Sequence[Sequence[int]], starts: Sequence[int], tokens: Tensor) -> Tensor:
    out = torch.zeros(tokens.shape[0], tokens.shape[1] - 1, dtype=torch.int32)
    for row, of, start in zip(out, labels, starts, strict=True):
        row[start - 1 : start - 1 + len(of)] = torch.tensor(of, dtype=torch.int32)
    return out.to(tokens.device)
