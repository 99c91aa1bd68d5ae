"""Prompt files: what is read, what is refused and how the refusal is worded; the quickstart's data."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from nemo_fiberpo.aligner.data.prompts import PromptDataset, collate_prompts
from nemo_fiberpo.aligner.rewards.rules import RuleRewards
from nemo_fiberpo.prompts.records import load_prompts


class Letters:
    """Letters are their code points, 0 ends a sequence; "~" is not in the vocabulary."""

    eos_id = 0

    def text_to_ids(self, text: str) -> list[int]:
        return [ord(letter) for letter in text if letter != "~"]

    def ids_to_text(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def line(prompt: str = "2+5=", domain: str = "math", **changes) -> dict:
    """A good record; a change to None takes the field away."""
    record = {"prompt": prompt, "domain": domain, "grader": "math_verify", "answer": "7"} | changes
    return {name: value for name, value in record.items() if value is not None}


@pytest.fixture
def write(tmp_path):
    def write(*lines, name: str = "prompts.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
        return path

    return write


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


def test_items_and_batches_are_what_generation_takes(write):
    data = PromptDataset(write(line("2+5=", "math"), line("ab", "code")), Letters(), 10, first_index=100)
    assert data.domains == ["code", "math"]
    assert data[1]["text"].dtype == torch.int64 and data[1]["text"].tolist() == [97, 98] and data[1]["length"] == 2
    batch = collate_prompts([data[0], data[1]], eos_id=0, generation_length=3)
    assert batch["text"].tolist() == [[50, 43, 53, 61, 0, 0, 0], [97, 98, 0, 0, 0, 0, 0]]
    assert batch["length"].tolist() == [4, 2]
    assert batch["prompt_index"].tolist() == [100, 101] and batch["domain"].tolist() == [1, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    with pytest.raises(IndexError):
        data[-1]  # NeMo's samplers pad with it


def test_a_validation_set_keeps_the_training_sets_domain_ids(write):
    train = PromptDataset(write(line(domain="math"), line(domain="code")), Letters(), 10)
    held = PromptDataset(write(line(domain="math"), name="v.jsonl"), Letters(), 10, domains=train.domains)
    assert held[0]["domain"] == train[0]["domain"] == 1
    path = write(line(), line(domain="maths"), name="v.jsonl")
    with pytest.raises(
        ValueError, match=r"v.jsonl:2: domain: 'maths' is not in the training data; did you mean 'math'"
    ):
        PromptDataset(path, Letters(), 10, domains=train.domains)


def test_a_stratum_of_ones_own_is_labelled_in_the_records(write):
    labels = [{"language": name} for name in ("fr", "en", "fr")]
    path = write(*[line(prompt, strata=label) for prompt, label in zip("abc", labels, strict=True)])
    data = PromptDataset(path, Letters(), 4)
    assert data.label_names("language") == ["en", "fr"] and data.label_names("domain") == ["math"]
    for stratum, expected in (("language", ["fr", "en", "fr"]), ("domain", ["math"] * 3)):
        names, table = data.label_names(stratum), data.label_table(stratum)
        assert [names[number] for number in table.tolist()] == expected
    with pytest.raises(ValueError, match=r"jsonl:1: strata: has no label for the stratum 'langauge'.*'language'"):
        data.label_names("langauge")
    with pytest.raises(ValueError, match=r"jsonl:1: strata: expected an object"):
        load_prompts(write(line(strata={"language": 1})))


def test_a_prompt_that_is_too_long_is_an_error_or_dropped_and_counted(write):
    path = write(line("12345"), line("1234"), line("123456"), line("1"))
    with pytest.raises(
        ValueError, match=r"jsonl:1: prompt: 5 tokens.*max_prompt_length = 4; so are 2 of 4.*too_long: drop"
    ):
        PromptDataset(path, Letters(), 4)
    data = PromptDataset(path, Letters(), 4, too_long="drop")
    assert data.dropped == 2 and [record.prompt for record in data.records] == ["1234", "1"]
    assert [data[index]["length"] for index in range(len(data))] == [4, 1]
    with pytest.raises(ValueError, match="so are 1 of 1"):
        PromptDataset(write(line("12345")), Letters(), 4, too_long="drop")
    with pytest.raises(ValueError, match="too_long: must be error or drop, got 'cut'"):
        PromptDataset(path, Letters(), 4, too_long="cut")


def test_every_prompt_begins_with_the_given_token_which_counts_in_its_length(write):
    prompts = PromptDataset(write(line("ab"), line("a")), Letters(), 3, bos_id=7)
    assert [prompts[i]["text"].tolist() for i in range(2)] == [[7, ord("a"), ord("b")], [7, ord("a")]]
    with pytest.raises(ValueError, match=r"jsonl:1: prompt: 3 tokens, more than max_prompt_length = 2"):
        PromptDataset(write(line("ab"), line("a")), Letters(), 2, bos_id=7)


def test_a_token_outside_the_policys_vocabulary_is_refused(write):
    prompts = PromptDataset(write(line("ab"), line("az")), Letters(), 8)
    prompts.check_tokens(ord("z") + 1)
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: prompt: has the token 122, .* of 122"):
        prompts.check_tokens(ord("z"))


def test_a_prompt_outside_the_vocabulary_is_refused(write):
    with pytest.raises(ValueError, match=r"jsonl:2: prompt: '~~' has no tokens"):
        PromptDataset(write(line(), line("~~")), Letters(), 4)


# the quickstart's data


@pytest.fixture(scope="module")
def quickstart():
    pytest.importorskip("reasoning_gym")
    path = Path(__file__).parents[3] / "examples" / "quickstart_data.py"
    spec = importlib.util.spec_from_file_location("quickstart_data", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart_data"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(quickstart):
    return {seed: quickstart.make_records(seed, heldout_seed=2024) for seed in (0, 1)}


def test_quickstart_files_share_no_prompt_and_hold_out_256_of_each_domain(files):
    for records in files.values():
        prompts = {name: [record["prompt"] for record in part] for name, part in records.items()}
        everything = [prompt for part in prompts.values() for prompt in part]
        assert len(everything) == len(set(everything))
        domains = [record["domain"] for record in records["heldout"]]
        assert {domain: domains.count(domain) for domain in domains} == dict.fromkeys(
            ("arithmetic", "strings", "algorithms"), 256
        )


def test_quickstart_held_out_prompts_do_not_depend_on_the_training_seed(files):
    assert files[0]["heldout"] == files[1]["heldout"]
    train = [{record["prompt"] for record in files[seed]["train"] if record["domain"] == "strings"} for seed in (0, 1)]
    assert len(train[0] & train[1]) < 0.1 * len(train[0])


def test_quickstart_prompts_are_short_and_render_the_entry(files):
    for record in files[0]["train"]:
        assert len(record["prompt"].encode()) <= 9 and len(record["response"].encode()) <= 8
        assert record["prompt"].isascii()
    example = next(record for record in files[0]["train"] if record["domain"] == "arithmetic")
    assert example["prompt"][:-1] == example["entry"]["metadata"]["expression"].replace(" ", "")


def test_quickstart_reference_answers_earn_1_and_the_next_prompts_do_not(files, quickstart, tmp_path):
    quickstart.write_jsonl(tmp_path / "heldout.jsonl", files[0]["heldout"])
    records = load_prompts(tmp_path / "heldout.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["heldout.jsonl"]
    everyone = range(len(records))
    answers = [record.response or "" for record in records]
    with RuleRewards(records) as rewards:
        assert rewards.score(everyone, answers).rewards.min() == 1.0
        assert rewards.score(everyone, answers[1:] + answers[:1]).rewards.mean() < 0.1


def test_quickstart_is_the_same_for_the_same_seed(quickstart, files, tmp_path):
    again = quickstart.make_records(1, heldout_seed=2024)
    assert json.dumps(again) == json.dumps(files[1])


def test_quickstart_reports_a_task_with_too_few_prompts(quickstart):
    small = quickstart.Domain(
        "tiny",
        "chain_sum",
        {"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1},
        quickstart.DOMAINS[0].render,
        train=11,
        warmstart=0,
        fields={},
    )
    with pytest.raises(ValueError, match="tiny: chain_sum has only 10 distinct prompts"):
        quickstart.make_records(0, 1, heldout=0, domains=(small,))
