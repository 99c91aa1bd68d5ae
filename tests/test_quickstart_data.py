"""The quickstart's data: reproducible, without a prompt in two files, and graded as its answers deserve."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from nemo_fiberpo.prompts.records import load_prompts
from nemo_fiberpo.rewards import RuleRewards


@pytest.fixture(scope="module")
def quickstart():
    pytest.importorskip("reasoning_gym")
    path = Path(__file__).parents[1] / "examples" / "quickstart_data.py"
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
