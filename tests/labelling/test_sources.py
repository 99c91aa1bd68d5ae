"""Each source of labels, against labels computed character by character and by hand."""

from __future__ import annotations

import random
import re

import pytest

from nemo_fiberpo.labelling.markers import Markers
from nemo_fiberpo.labelling.patterns import Patterns
from nemo_fiberpo.labelling.spelling import Response, Speller
from nemo_fiberpo.labelling.time_bins import TimeBins
from nemo_fiberpo.labelling.turns import Turns
from tests.labelling.tokenizers import Bytes, Pieces, segments

THINK = {"think": ("<t>", "</t>"), "code": ("``", "``"), "tool": ("<t><u>", "</u>")}
PIECES = ["<t>", "</t>", "<", "t>", "</", "t", ">", "<t><u>", "<u>", "</u>", "`", "``", "a", "b ", "><", ">`", "a</t>b"]


def named(source, response: Response) -> list[str]:
    return [source.cells[label] for label in source.label(response)]


@pytest.mark.parametrize("first", [None, "think"])
def test_segments_of_random_texts_in_random_tokens(first):
    random.seed(5)
    tokenizer = Pieces(PIECES, special=["<|end|>"])
    speller, source = Speller(tokenizer), Markers(THINK, "answer", first)
    seen = set()
    for _ in range(400):
        ids = [random.randrange(tokenizer.vocab_size) for _ in range(random.randrange(30))]
        found = named(source, Response(ids, speller))
        assert found == segments([tokenizer.pieces[token] for token in ids], THINK, "answer", first)
        seen |= set(found)
    assert seen == {"think", "code", "tool", "answer"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a<think>b</think>c", "r" + 16 * "t" + "r"),
        ("<think>b", 8 * "t"),
        ("a</think>b", 10 * "r"),
        ("", ""),
    ],
)
def test_segments_by_hand(text, wanted):
    source = Markers({"t": ("<think>", "</think>")}, "r")
    assert "".join(named(source, Response(Bytes().text_to_ids(text), Speller(Bytes())))) == wanted


def test_characters_of_several_tokens_do_not_move_what_follows():
    text = "é\N{GRINNING FACE}<t>ü</t>\N{GRINNING FACE}"
    found = named(Markers({"t": ("<t>", "</t>")}, "r"), Response(Bytes().text_to_ids(text), Speller(Bytes())))
    assert "".join(found) == "r" * 6 + "t" * 9 + "r" * 4


def test_markers_of_token_ids_are_found_only_by_ids():
    tokenizer = Pieces(["<", "t>", "a"], special=["<t>", "</t>"])
    ids = [4, 2, 3, 0, 4, 2, 3, 1, 4]  # a <t> in letters, then the tokens <t> and </t>
    by_id, by_text = (Markers({"t": pair}, "r") for pair in (([0], [1]), ("<t>", "</t>")))
    assert "".join(named(by_id, Response(ids, Speller(tokenizer)))) == "rrrtttttr"
    assert "".join(named(by_text, Response(ids, Speller(tokenizer)))) == "rttttttt" + "t", "two are open, one is closed"
    pair = Markers({"t": ([2, 3], [3, 1])}, "r")
    assert "".join(named(pair, Response(ids, Speller(tokenizer)))) == "rttttttt" + "t", "nested too"


def test_time_is_the_position_in_the_response():
    bins = TimeBins([0, 2, 5])
    assert named(bins, Response(range(7), Speller(Bytes()))) == ["0-1"] * 2 + ["2-4"] * 3 + ["5-end"] * 2


def test_turns_begin_with_their_marker_and_the_last_has_all_later_ones():
    text = "ab<s>c<s>d<s>e"
    turns = Turns("<s>", most=3)
    found = named(turns, Response(Bytes().text_to_ids(text), Speller(Bytes())))
    assert found == ["turn_1"] * 2 + ["turn_2"] * 4 + ["turn_3-end"] * 8


@pytest.mark.parametrize(
    "source",
    [
        Patterns({"long": r"x[ab]+y", "short": r"[ab]"}, rest="no"),
        Patterns(r"x([ab]+)y", names=("a", "ab"), rest="no"),
    ],
)
def test_patterns_have_the_tokens_that_they_match_a_part_of(source):
    random.seed(3)
    tokenizer = Pieces(["x", "a", "b", "y", "xa", "by", "\n"])
    seen = set()
    for _ in range(200):
        ids = [random.randrange(tokenizer.vocab_size) for _ in range(12)]
        text = "".join(tokenizer.pieces[token] for token in ids)
        of_chars = ["no"] * len(text)
        if isinstance(source.regex, str):
            for match in re.finditer(source.regex, text):
                if match[1] in ("a", "ab"):
                    of_chars[slice(*match.span())] = [match[1]] * len(match[0])
        else:
            for name in ("short", "long"):
                for match in re.finditer(source.regex[name], text):
                    of_chars[slice(*match.span())] = [name] * len(match[0])
        wanted, start = [], 0
        for token in ids:
            chars = of_chars[start : start + len(tokenizer.pieces[token])]
            ranks = [source.cells.index(name) for name in chars]
            matched = [name for name in chars if name != "no"]
            wanted.append(source.cells[min(ranks)] if isinstance(source.regex, dict) else (matched or ["no"])[0])
            start += len(chars)
        found = named(source, Response(ids, Speller(tokenizer)))
        assert found == wanted
        seen |= set(found)
    assert seen == set(source.cells)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TimeBins([0, 8, 4]), r"bins: must increase, got \[0, 8, 4\]"),
        (lambda: TimeBins([1, 8]), "bins: must begin with 0"),
        (lambda: TimeBins([0]), "one bin of all tokens"),
        (lambda: TimeBins("0"), "bins: must be a list of positions"),
        (lambda: Turns("", 3), "split: must be a text or a list of token ids"),
        (lambda: Turns([1, True]), "split: must be a text or a list of token ids"),
        (lambda: Turns("a", 1), "most: must be a whole number of at least 2"),
        (lambda: Markers({}), "markers: must be a mapping"),
        (lambda: Markers({"a": "<a>"}), r"markers\.a: must be a pair of markers"),
        (lambda: Markers({"a": [1, 2]}), r"markers\.a: .* of one token each: \[\[1\], \[2\]\]"),
        (lambda: Markers({"a.b": ["<", ">"]}), r"markers: 'a\.b' is no name for a segment"),
        (lambda: Markers({"a": ["<", ">"]}, "a"), "rest: 'a' is a segment with markers"),
        (lambda: Markers({"a": ["<", ">"]}, first="b"), "first: must be one of the segments a, got 'b'"),
        (lambda: Markers({"a": ["<", ">"], "b": ["[", ">"]}), r"markers\.b: '>' is a marker of a already"),
        (lambda: Patterns("("), r"regex: '\(' is not a regular expression"),
        (lambda: Patterns({"a": "x*"}), r"regex\.a: must be a regular expression that matches some text"),
        (lambda: Patterns("(x)"), "names: must list the names that the group may capture"),
        (lambda: Patterns("x"), "regex: 'x' must have one group"),
        (lambda: Patterns({"a": "x"}, rest="a"), "names: must differ"),
        (lambda: Patterns({"a": "x"}, names=("b",)), "names: are the keys of regex"),
    ],
)
def test_what_makes_no_source_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_marker_that_the_tokenizer_cannot_make_is_refused():
    speller = Speller(Pieces(["<", "t", ">"], special=["<|end|>"]))
    with pytest.raises(ValueError, match=r"markers\.think: the tokenizer cannot produce '<think>': .* decode to '<t>'"):
        Markers({"think": ("<think>", "<t>")}).check(speller)
    with pytest.raises(ValueError, match=r"split: token 9 is outside the vocabulary of 4"):
        Turns([1, 9]).check(speller)
    Markers({"t": ("<t>", "<|end|>")}).check(speller)
