"""Segments of the tiny model's responses: labelled on a layout's ranks, and by the definition, token by token."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nemo_fiberpo.labelling.spelling import Speller
from nemo_fiberpo.labelling.token_labels import IGNORED, PREFIX, TokenLabels
from nemo_fiberpo.megatron.groups import TokenAxes
from tests.labelling.tokenizers import Pieces, segments
from tests.megatron.tiny import VOCAB

SEGMENT = "segment"
SEGMENTS = ("think", "code", "answer")
_TEXTS = {0: "<t>", 1: "`", 3: "</t>", 6: ")"}
_PIECES = ["(" if token == 15 else _TEXTS.get(token % 8, chr(97 + token % 26)) for token in range(VOCAB)]
_MARKERS = {"think": ("<t>", "</t>"), "code": ("`", "`")}


def labels() -> TokenLabels:
    """Half of the tokens or so are markers."""
    source = {"markers": {name: list(pair) for name, pair in _MARKERS.items()}, "rest": "answer"}
    found = TokenLabels.parse({SEGMENT: source}, ["(", ")"])
    assert found is not None
    return found


def add_to(batch: dict[str, torch.Tensor]) -> None:
    """The segment of every token by the definition; and `ignored`, what stands in brackets, which is masked."""
    batch[SEGMENT] = torch.zeros_like(batch["mask"], dtype=torch.int64)
    batch["ignored"] = torch.zeros_like(batch["mask"])
    for row, tokens in enumerate(batch["tokens"].tolist()):
        places = batch["mask"][row].nonzero().flatten().tolist()
        pieces = [_PIECES[tokens[place + 1]] for place in places]
        of_tokens = segments(pieces, _MARKERS, "answer", None)
        in_brackets = segments(pieces, {"ignored": ("(", ")")}, "kept", None)
        for place, segment, bracket in zip(places, of_tokens, in_brackets, strict=True):
            batch[SEGMENT][row, place] = SEGMENTS.index(segment)
            batch["ignored"][row, place] = bracket == "ignored"
    batch["prompt_lengths"] = torch.where(batch["mask"].any(1), batch["mask"].long().argmax(1) + 1, batch["lengths"])
    batch["mask"] = batch["mask"] & ~batch["ignored"]


def label_batch(batch: Mapping[str, torch.Tensor], axes: TokenAxes) -> tuple[dict[str, torch.Tensor], bool]:
    """The global batch with the labels and the mask that this rank makes of its own samples, and whether they are the
    batch's."""
    data = axes.axis("dp")
    number = len(batch["mask"]) // data.size
    own = slice(data.rank * number, (data.rank + 1) * number)
    tokens, starts, lengths = (batch[name][own] for name in ("tokens", "prompt_lengths", "lengths"))
    columns, names = labels().columns(tokens, starts, lengths, Speller(Pieces(_PIECES)), [None] * number)
    assert not names, "all are known"
    found, ignored = columns[PREFIX + SEGMENT].long(), columns[IGNORED] > 0
    real = batch["mask"][own] | batch["ignored"][own]
    same = torch.equal(found[real], batch[SEGMENT][own][real]) and torch.equal(ignored, batch["ignored"][own])
    given = dict(batch)
    given[SEGMENT] = torch.zeros_like(batch[SEGMENT])  # the samples of others are not this rank's to read
    given["mask"] = batch["mask"].clone()
    given[SEGMENT][own], given["mask"][own] = found, real & ~ignored
    return given, same
