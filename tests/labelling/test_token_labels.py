"""`token_labels` of a hierarchy: what is read, what is refused, and the columns of a batch."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from nemo_fiberpo.config import load_hierarchy, load_token_labels
from nemo_fiberpo.labelling.spelling import Speller
from nemo_fiberpo.labelling.token_labels import IGNORED, PREFIX, TokenLabels, merged, renumbered
from nemo_fiberpo.objective import on_policy_coefficients, token_coefficients
from tests.labelling.tokenizers import Bytes

BUDGET = {"pos": 0.1, "neg": 0.1}
RECORD = SimpleNamespace(prompt="say", response=None, where="train.jsonl:3")
SPELLER = Speller(Bytes())


def vowels(token_ids, text, record):
    """Names that differ from response to response."""
    assert len(text) == len(token_ids) and record is RECORD
    names = sorted(set(text))
    return [names.index(letter) for letter in text], names


def short(token_ids, text, record):
    return [0] * (len(token_ids) - 1), ["a"]


def outside(token_ids, text, record):
    return torch.full((len(token_ids),), 2), ["a", "b"]


def no_pair(token_ids, text, record):
    return [0] * len(token_ids)


def section(**token_labels):
    strata = {"trajectory": {"budget": BUDGET}}
    strata |= {f"of_{name}": {"join": ["trajectory", name], "budget": BUDGET} for name in token_labels}
    return {"token_clip": 0.1, "strata": strata, "token_labels": token_labels}


def batch(*texts: str):
    """Tokens of the texts, a prompt and a response each, divided by |."""
    rows = [text.replace("|", "").encode() for text in texts]
    width = max(map(len, rows)) + 2
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return tokens, torch.tensor([text.index("|") for text in texts]), torch.tensor([len(row) for row in rows])


def columns(labels: TokenLabels, *texts: str):
    return labels.columns(*batch(*texts), SPELLER, [RECORD] * len(texts))


def test_entries_belong_to_the_token_after_them_and_the_prompt_has_no_label():
    labels = load_token_labels(
        section(time={"bins": [0, 2, 3]}, part={"markers": {"a": ["(", ")"]}}) | {"ignore": ["[", "]"]}
    )
    assert labels is not None
    found, names = columns(labels, "(q|x(y)z", "p|[ab]c")
    assert names == {} and all(column.dtype == torch.int32 for column in found.values())
    assert found[PREFIX + "time"].tolist() == [[0, 0, 0, 1, 2, 2, 0, 0], [0, 0, 1, 2, 2, 0, 0, 0]]
    assert found[PREFIX + "part"].tolist() == [[0, 1, 0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert found[IGNORED].tolist() == [[0] * 8, [1, 1, 1, 1, 0, 0, 0, 0]]


def test_names_that_responses_give_are_the_same_on_every_rank():
    labels = load_token_labels(section(letter=f"{__name__}:vowels"))
    assert labels is not None and labels.cells == {"letter": None}
    one, of_one = columns(labels, "p|ca")
    other, of_other = columns(labels, "p|ab", "p|bb")
    assert of_one == {"letter": ["a", "c"]} and of_other == {"letter": ["a", "b"]}
    agreed = merged("letter", [of_one["letter"], of_other["letter"]])
    assert agreed == ["a", "b", "c"]
    assert renumbered(one[PREFIX + "letter"], of_one["letter"], agreed)[0, :2].tolist() == [2, 0]
    assert renumbered(other[PREFIX + "letter"], of_other["letter"], agreed)[0, :2].tolist() == [0, 1]


WRONG = {
    "token_labels.time.bins: must increase": section(time={"bins": [0, 9, 3]}),
    "token_labels.time.bin: unknown key": section(time={"bins": [0, 9], "bin": 3}),
    "token_labels.time: must have one of markers, bins, split, regex, function, got bin": section(time={"bin": [0]}),
    "token_labels.time: must have one of .*, got bins, split": section(time={"bins": [0, 2], "split": "a"}),
    "token_labels.time: must be a source": section(time=3),
    "token_labels.domain: 'domain' has its own labels": section(domain={"bins": [0, 2]}),
    "token_labels.own.function: 'no.such:thing' cannot be imported": section(own="no.such:thing"),
    "token_labels.own.function: must be package.module:function, got 'thing'": section(own="thing"),
    "token_labels.own.names: must be a list of two names": section(own={"function": "json:loads", "names": ["a"]}),
    "token_labels.sgment: no stratum .* did you mean 'segment'": section(segment={"bins": [0, 2]})
    | {"token_labels": {"sgment": {"bins": [0, 2]}}},
    r"ignore\[0\]: must be a pair of markers": section() | {"ignore": ["<a>"]},
    "ignore: must be a pair of markers": section() | {"ignore": []},
    "token_labels: must be a mapping": section() | {"token_labels": [1]},
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_wrong_is_named_by_its_field(said):
    with pytest.raises(ValueError, match=f"^{said}"):
        load_token_labels(WRONG[said])


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("short", r"returned 2 labels for the 3 tokens of a response to train\.jsonl:3; it must return one for each"),
        ("outside", r"returned the label 2 for .*; labels are the places of names, 0 to 1"),
        ("no_pair", r"must return \(labels, names\), got list"),
    ],
)
def test_a_function_that_returns_what_it_must_not_is_refused_before_training(function, said):
    labels = load_token_labels(section(own=f"{__name__}:{function}"))
    assert labels is not None
    with pytest.raises(ValueError, match=rf"^token_labels\.own\.function: '{__name__}:{function}' {said}"):
        labels.check(SPELLER, RECORD)


def test_a_name_that_was_not_declared_is_refused():
    labels = load_token_labels(section(own={"function": f"{__name__}:vowels", "names": ["a", "s"]}))
    assert labels is not None and labels.cells == {"own": ("a", "s")}
    with pytest.raises(ValueError, match="returned the name 'y'; names has"):
        labels.check(SPELLER, RECORD)


def test_markers_are_checked_with_the_tokenizer():
    labels = load_token_labels(section() | {"ignore": [["<a>", "</a>"], [[256], [1]]]})
    assert labels is not None
    with pytest.raises(ValueError, match=r"^ignore: markers\.ignored_1: token 256 is outside the vocabulary of 256"):
        labels.check(SPELLER, RECORD)


def test_what_is_written_is_read_again():
    given = section(
        segment={"markers": {"think": ["<t>", [4, 5]]}, "rest": "answer", "first": "think"},
        time={"bins": [0, 4]},
        turn={"split": "<s>", "most": 3},
        tool={"regex": "<(x|y)>", "names": ["x", "y"]},
        own={"function": f"{__name__}:vowels", "names": ["a", "b"]},
    ) | {"ignore": [["<a>", "</a>"], [[1], [2]]]}
    labels = load_token_labels(given)
    assert labels is not None
    again = load_token_labels(given | json.loads(json.dumps(labels.written())))
    assert again == labels and again.written() == labels.written()
    assert load_token_labels(section() | {"token_labels": None}) is None


def test_on_policy_the_gradient_is_that_without_strata_to_the_bit():
    given = section(part={"markers": {"a": ["(", ")"]}}) | {"ignore": ["[", "]"]}
    hierarchy, labels = load_hierarchy(given), load_token_labels(given)
    assert labels is not None
    tokens, starts, ends = batch("q|x(y)z", "p|[ab]c(d")
    found, _ = labels.columns(tokens, starts, ends, SPELLER, [RECORD] * 2)
    place = torch.arange(1, tokens.shape[1])
    mask = (place >= starts[:, None]) & (place < ends[:, None]) & (found[IGNORED] == 0)
    trajectory = torch.arange(2)[:, None].expand(mask.shape).flatten()
    of = {"trajectory": trajectory, "part": found[PREFIX + "part"].long().flatten()}
    cells = hierarchy.cells(of, mask.flatten(), names={"part": labels.cells["part"] or ()})
    weighted = torch.randn(mask.numel(), dtype=torch.float64)
    log_ratio = torch.zeros(mask.numel(), dtype=torch.float64)
    coefficients = token_coefficients(log_ratio, weighted, cells, hierarchy)
    assert torch.equal(coefficients, torch.where(mask.flatten(), weighted, 0.0))
    assert torch.equal(on_policy_coefficients(weighted, cells), coefficients)
    wild = torch.where(mask.flatten(), 0.3, torch.tensor(float("nan"))).double()
    moved = token_coefficients(wild, weighted, cells, hierarchy)
    assert not moved[~mask.flatten()].any() and moved.isfinite().all(), "masked tokens count in nothing"
