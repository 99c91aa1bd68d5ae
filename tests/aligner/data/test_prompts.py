"""Data sets of prompts: items and batches, domains, labels of strata, and prompts that do not fit."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from nemo_fiberpo.aligner.data.prompts import PromptDataset, collate_prompts
from nemo_fiberpo.prompts.records import load_prompts
from tests.support.prompt_files import line, write_lines


class Letters:
    """Letters are their code points, 0 ends a sequence; "~" is not in the vocabulary."""

    eos_id = 0

    def text_to_ids(self, text: str) -> list[int]:
        return [ord(letter) for letter in text if letter != "~"]

    def ids_to_text(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.fixture
def write(tmp_path):
    return partial(write_lines, tmp_path)


def test_items_and_batches_are_what_generation_takes(write):
    data = PromptDataset(load_prompts(write(line("2+5=", "math"), line("ab", "code"))), Letters(), 10, first_index=100)
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
    train = PromptDataset(load_prompts(write(line(domain="math"), line(domain="code"))), Letters(), 10)
    held = PromptDataset(load_prompts(write(line(domain="math"), name="v.jsonl")), Letters(), 10, domains=train.domains)
    assert held[0]["domain"] == train[0]["domain"] == 1
    path = write(line(), line(domain="maths"), name="v.jsonl")
    with pytest.raises(
        ValueError, match=r"v.jsonl:2: domain: 'maths' is not in the training data; did you mean 'math'"
    ):
        PromptDataset(load_prompts(path), Letters(), 10, domains=train.domains)


def test_a_stratum_of_ones_own_is_labelled_in_the_records(write):
    labels = [{"language": name} for name in ("fr", "en", "fr")]
    path = write(*[line(prompt, strata=label) for prompt, label in zip("abc", labels, strict=True)])
    data = PromptDataset(load_prompts(path), Letters(), 4)
    assert data.label_names("language") == ["en", "fr"] and data.label_names("domain") == ["math"]
    for stratum, expected in (("language", ["fr", "en", "fr"]), ("domain", ["math"] * 3)):
        names, table = data.label_names(stratum), data.label_table(stratum)
        assert [names[number] for number in table.tolist()] == expected
    with pytest.raises(ValueError, match=r"jsonl:1: strata: has no label for the stratum 'langauge'.*'language'"):
        data.label_names("langauge")


def test_a_prompt_that_is_too_long_is_an_error_or_dropped_and_counted(write):
    path = write(line("12345"), line("1234"), line("123456"), line("1"))
    with pytest.raises(
        ValueError, match=r"jsonl:1: prompt: 5 tokens.*max_prompt_length = 4; so are 2 of 4.*too_long: drop"
    ):
        PromptDataset(load_prompts(path), Letters(), 4)
    data = PromptDataset(load_prompts(path), Letters(), 4, too_long="drop")
    assert data.dropped == 2 and [record.prompt for record in data.records] == ["1234", "1"]
    assert [data[index]["length"] for index in range(len(data))] == [4, 1]
    with pytest.raises(ValueError, match="so are 1 of 1"):
        PromptDataset(load_prompts(write(line("12345"))), Letters(), 4, too_long="drop")
    with pytest.raises(ValueError, match="too_long: must be error or drop, got 'cut'"):
        PromptDataset(load_prompts(path), Letters(), 4, too_long="cut")


def test_every_prompt_begins_with_the_given_token_which_counts_in_its_length(write):
    prompts = PromptDataset(load_prompts(write(line("ab"), line("a"))), Letters(), 3, bos_id=7)
    assert [prompts[i]["text"].tolist() for i in range(2)] == [[7, ord("a"), ord("b")], [7, ord("a")]]
    with pytest.raises(ValueError, match=r"jsonl:1: prompt: 3 tokens, more than max_prompt_length = 2"):
        PromptDataset(load_prompts(write(line("ab"), line("a"))), Letters(), 2, bos_id=7)


def test_a_token_outside_the_policys_vocabulary_is_refused(write):
    prompts = PromptDataset(load_prompts(write(line("ab"), line("az"))), Letters(), 8)
    prompts.check_tokens(ord("z") + 1)
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: prompt: has the token 122, .* of 122"):
        prompts.check_tokens(ord("z"))


def test_a_prompt_outside_the_vocabulary_is_refused(write):
    with pytest.raises(ValueError, match=r"jsonl:2: prompt: '~~' has no tokens"):
        PromptDataset(load_prompts(write(line(), line("~~"))), Letters(), 4)
