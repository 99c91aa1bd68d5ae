"""Prompt files: what is read, what is refused and how the refusal is worded."""

from __future__ import annotations

import json
import os
from functools import partial

import pytest

from nemo_fiberpo.prompts.records import load_prompts
from tests.support.prompt_files import line, write_lines


@pytest.fixture
def write(tmp_path):
    return partial(write_lines, tmp_path)


def test_a_file_with_mark_blank_lines_and_no_last_newline_is_read(tmp_path):
    path = tmp_path / "p.jsonl"
    gym = {"prompt": "é", "domain": "b", "grader": "reasoning_gym", "task": "chain_sum", "entry": {"answer": "1"}}
    text = "\ufeff" + json.dumps(line(id="a", response="7")) + "\r\n\n   \n" + json.dumps(gym, ensure_ascii=False)
    path.write_bytes(text.encode())
    first, second = load_prompts(path)
    assert (first.prompt, first.domain, first.fields, first.id) == ("2+5=", "math", {"answer": "7"}, "a")
    assert first.response == "7" and second.prompt == "é" and second.where == f"{path}:4"
    assert second.fields == {"task": "chain_sum", "entry": {"answer": "1"}}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": ', "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        (line(prompt=None, promt="x"), "prompt: missing; did you mean 'promt'?"),
        (line(domain=None), "domain: missing"),
        (line(prompt="  "), "prompt: is empty"),
        (line(prompt=5), "prompt: expected a string, found int"),
        (line(grader="math_verfy"), "grader: 'math_verfy' is unknown; did you mean 'math_verify'"),
        (line(answer=None, anwser="7"), "answer: missing; did you mean 'anwser'?"),
        (line(answer=7), "answer: expected a string, found int"),
        (line(answr="7"), "answr: unknown field; did you mean 'answer'"),
        (line(grader="reasoning_gym", answer=None, task="gcd"), "entry: missing"),
        (
            line(grader="reasoning_gym", answer=None, task="gcd", entry={"a": 1}, answer_form="digits"),
            "answer_form: 'digits' is unknown; did you mean 'digit_list'",
        ),
        (line(answer_form="text"), "answer_form: 'text' is unknown; known: expression, literal"),
        (line(id="same"), "id: 'same' is also the id of"),
        ('{"prompt": "a", "prompt": "b"}', "not valid JSON: prompt: duplicate name in an object"),
        ('{"prompt": {"a": 1, "a": 2}}', "not valid JSON: a: duplicate name in an object"),
        ('{"prompt": NaN}', "not valid JSON: NaN is not a JSON number"),
        ('{"prompt": ' + "9" * 5000 + "}", "not valid JSON: Exceeds the limit"),
        ("[" * 100_000, "nested too deep"),
        (line(prompt="ab\ud800c"), "half of a surrogate pair ('\\ud800') after"),
        (line(answer=7), 'answer: expected a string, found int; write "7"'),
        (line(answer=" "), "answer: is empty"),
        (line(id=""), "id: is empty; leave it out"),
        (
            line(source="web"),
            "source: unknown field; valid: prompt, messages, domain, grader, id, response, strata, answer, ",
        ),
        (line(grader="reasoning_gym", answer=None, task="gcd", entry={}), "entry: is empty"),
        (line(strata={"domain": "x"}), "strata.domain: 'domain' has its own labels, these would not be read"),
        (line(strata={"trajectory": "x"}), "strata.trajectory: 'trajectory' has its own labels"),
        (line(domain="all"), "domain: 'all' is the name of the mean over all domains"),
        (line(strata={"language": ""}), "strata: '' is no valid name"),
        (line(domain="a\nb"), "domain: 'a\\nb' is no valid name: empty, or with control characters"),
    ],
)
def test_a_refusal_names_file_line_and_field(write, bad, message):
    path = write(line(id="same"), "", bad)
    with pytest.raises(ValueError) as error:
        load_prompts(path)
    assert str(error.value).startswith(f"{path}:3: {message}")


def test_labels_of_strata_are_texts(write):
    with pytest.raises(ValueError, match=r"jsonl:1: strata: expected an object"):
        load_prompts(write(line(strata={"language": 1})))


def test_ten_faulty_lines_are_listed_with_their_total(write):
    path = write(*[line(answer=n) if n != 3 else line() for n in range(13)])
    with pytest.raises(ValueError) as error:
        load_prompts(path)
    told = str(error.value).splitlines()
    assert [one.split(": ")[0] for one in told[:-1]] == [f"{path}:{n}" for n in (1, 2, 3, *range(5, 12))]
    assert told[-1] == "and 2 more of 13 lines"


def test_meta_is_free(write):
    assert load_prompts(write(line(meta={"source": [1, None]})))[0].fields == {"answer": "7"}


@pytest.mark.parametrize("kind", ["none", "folder", "fifo"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, kind):
    path = tmp_path / "p.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(ValueError, match=r"p\.jsonl: cannot be read: "):
        load_prompts(path)


def test_bytes_that_are_not_utf8_and_an_empty_file_are_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(json.dumps(line()).encode() + b"\n\xff\n")
    with pytest.raises(ValueError, match=r"p.jsonl:2: not UTF-8"):
        load_prompts(path)
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="no prompts"):
        load_prompts(path)


def test_an_own_graders_fields_are_free(write):
    path = write({"prompt": "p", "domain": "d", "grader": "mine", "anything": [1, 2]})
    assert load_prompts(path, ["mine"])[0].fields == {"anything": [1, 2]}
