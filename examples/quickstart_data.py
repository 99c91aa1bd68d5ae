"""Write the quickstart's data: three domains made by reasoning-gym's own generators and graded by its own score_answer.

    python examples/quickstart_data.py --out data/quickstart --stats

    domain      task of reasoning-gym   prompt      answer
    arithmetic  chain_sum               2-4+7=      5           3 terms of 1 digit
    strings     spell_backward          garden:     nedrag      6 to 8 letters
    algorithms  number_sorting          50931<      01359       5 to 7 digits; < ascending, > descending

The generators make whole questions ("State the final answer to the following arithmetic problem: 2 - 4 + 7 ="). A
policy of a few hundred thousand parameters reads characters, so a prompt here is what distinguishes one question of its
task from another, rendered from the generated entry's metadata. The entry itself goes into the file and to the grader;
number_sorting wants a list, and the record's `answer_form: digit_list` says that `01359` is read as `[0,1,3,5,9]`.

reasoning-gym accepts a sorted list whose numbers are each off by at most 1. With digits that is lenient: a fixed answer
for each length and direction of prompt earns about 0.23 without reading it. --stats measures such blind answers.

Writes a tokenizer of characters, train.jsonl, warmstart.jsonl (for the supervised warm start) and heldout.jsonl; every
record has a reference answer. No prompt text is in two files. The held-out prompts depend on --heldout-seed alone, the
others on --seed too.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import string
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reasoning_gym

Entry = dict[str, Any]
Record = dict[str, Any]
FILES = ("train", "heldout", "warmstart")


def _chain_sum(entry: Entry) -> tuple[str, str]:
    return entry["metadata"]["expression"].replace(" ", "") + "=", entry["answer"]


def _spell_backward(entry: Entry) -> tuple[str, str]:
    # the grader ignores case, and lower case alone is easier on a small policy
    return entry["metadata"]["word"].lower() + ":", entry["answer"].lower()


def _number_sorting(entry: Entry) -> tuple[str, str]:
    meta = entry["metadata"]
    digits = "".join(str(int(float(number))) for number in meta["original_numbers"])
    answer = "".join(str(int(float(number))) for number in meta["sorted_numbers"])
    return digits + ("<" if meta["direction"] == "ascending" else ">"), answer


@dataclass(frozen=True)
class Domain:
    """One domain: a task, the generator's parameters, how an entry is rendered, and how many prompts a file gets."""

    name: str
    task: str
    parameters: dict[str, Any]
    render: Callable[[Entry], tuple[str, str]]
    train: int
    warmstart: int
    fields: dict[str, str]


# There are 4000 sums of three one-digit terms in all: 256 held out, the others shared by training and warm start.
DOMAINS = (
    Domain(
        "arithmetic",
        "chain_sum",
        {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        _chain_sum,
        train=2100,
        warmstart=1500,
        fields={},
    ),
    Domain(
        "strings",
        "spell_backward",
        {"min_word_len": 6, "max_word_len": 8},
        _spell_backward,
        train=700,
        warmstart=6000,
        fields={},
    ),
    Domain(
        "algorithms",
        "number_sorting",
        {"min_numbers": 5, "max_numbers": 7, "min_decimals": 0, "max_decimals": 0, "min_value": 0, "max_value": 9},
        _number_sorting,
        train=700,
        warmstart=6000,
        fields={"answer_form": "digit_list"},
    ),
)


def generate(domain: Domain, seed: int, taken: set[str]) -> Iterator[Record]:
    """Records of new prompts, for as long as they are asked for; each prompt is added to `taken`.

    ValueError if 50 000 entries in a row bring no new prompt: the task has no more.
    """
    # the generators seed entry i with seed + i: spread the seeds, or seed 1 repeats seed 0 shifted by one
    dataset = reasoning_gym.create_dataset(domain.task, **domain.parameters, seed=seed * 10**7, size=10**7)
    fruitless = 0
    for entry in dataset:
        prompt, response = domain.render(entry)
        if prompt in taken:
            fruitless += 1
            if fruitless > 50_000:
                raise ValueError(f"{domain.name}: {domain.task} has only {len(taken)} distinct prompts; ask for fewer")
            continue
        fruitless = 0
        taken.add(prompt)
        yield {
            "id": f"{domain.task}-{prompt}",
            "prompt": prompt,
            "domain": domain.name,
            "grader": "reasoning_gym",
            "task": domain.task,
            "entry": entry,
            "response": response,
            **domain.fields,
        }


def make_records(
    seed: int, heldout_seed: int, heldout: int = 256, domains: tuple[Domain, ...] = DOMAINS
) -> dict[str, list[Record]]:
    """The records of each file, domain after domain (the trainer shuffles)."""
    files: dict[str, list[Record]] = {name: [] for name in FILES}
    for domain in domains:
        taken: set[str] = set()
        fixed = generate(domain, 2 * heldout_seed + 1, taken)
        files["heldout"] += [next(fixed) for _ in range(heldout)]
        rest = generate(domain, 2 * seed, taken)  # even: a training seed is never the held-out seed
        files["warmstart"] += [next(rest) for _ in range(domain.warmstart)]
        files["train"] += [next(rest) for _ in range(domain.train)]
    return files


def write_jsonl(path: Path, records: list[Record]) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    path.chmod(0o644)


def write_tokenizer(folder: Path) -> None:
    """A Hugging Face tokenizer with one token per character of the prompts and answers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    vocabulary = [*special.values(), *string.ascii_lowercase, *string.digits, *"+-=:<>"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write_quickstart_data(out: Path, seed: int = 0, heldout_seed: int = 2024, heldout: int = 256) -> dict[str, Path]:
    """Write the tokenizer and the three files into `out`; returns the files' paths. Same arguments, same bytes."""
    paths = {name: Path(out) / f"{name}.jsonl" for name in FILES}
    write_tokenizer(Path(out) / "tokenizer")
    for name, records in make_records(seed, heldout_seed, heldout).items():
        write_jsonl(paths[name], records)
    return paths


def blind_baselines(fit: list[Record], graded_on: list[Record]) -> dict[str, tuple[float, float]]:
    """Per domain, what answers earn on `graded_on` that do not read the prompt: (the same answer to every prompt, one
    answer to each kind of prompt, a kind being its length and last character).

    The answer is the one, of the 100 most frequent reference answers, that earns most on `fit`.
    """
    fit_domains, baselines = _by_domain(fit), {}
    for domain, records in _by_domain(graded_on).items():
        means = []
        for kind in (lambda record: None, lambda record: (len(record["prompt"]), record["prompt"][-1])):
            chosen = {key: _best_answer(group) for key, group in _groups(fit_domains[domain], kind).items()}
            means.append(sum(_grade(chosen.get(kind(record), ""), record) for record in records) / len(records))
        baselines[domain] = (means[0], means[1])
    return baselines


def _best_answer(records: list[Record]) -> str:
    candidates = [answer for answer, _ in Counter(record["response"] for record in records).most_common(100)]
    return max(candidates, key=lambda answer: sum(_grade(answer, record) for record in records))


def _grade(response: str, record: Record) -> bool:
    answer = "[" + ",".join(response) + "]" if record.get("answer_form") == "digit_list" else response
    return _scorer(record["task"])(answer, record["entry"]) >= 1.0


@functools.cache
def _scorer(task: str) -> Callable[[str, Entry], float]:
    return reasoning_gym.get_score_answer_fn(task)


def _groups(records: list[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return groups


def _by_domain(records: list[Record]) -> dict[str, list[Record]]:
    return _groups(records, lambda record: record["domain"])


def print_stats(paths: dict[str, Path]) -> None:
    """Prompts per file, the longest prompt and answer in bytes, and what answers earn that do not read the prompt."""
    files = {name: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for name, path in paths.items()}
    print("                      prompts        longest (bytes)    held-out reward of a blind answer")
    print("domain        train   warm   held    prompt   answer    one for all   one per kind of prompt")
    for domain, (constant, per_kind) in blind_baselines(files["train"], files["heldout"]).items():
        records = {name: _by_domain(files[name])[domain] for name in FILES}
        everything = [record for part in records.values() for record in part]
        prompt, response = (max(len(r[key].encode()) for r in everything) for key in ("prompt", "response"))
        sizes = "".join(f"{len(records[name]):>7}" for name in ("train", "warmstart", "heldout"))
        print(f"{domain:<12}{sizes}{prompt:>10}{response:>9}{constant:>15.3f}{per_kind:>25.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's data.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training and warm-start prompts")
    parser.add_argument("--heldout-seed", type=int, default=2024, help="seed of the held-out prompts")
    parser.add_argument("--heldout", type=int, default=256, help="held-out prompts per domain")
    parser.add_argument("--stats", action="store_true", help="print sizes and what blind answers earn")
    args = parser.parse_args()
    paths = write_quickstart_data(args.out, args.seed, args.heldout_seed, args.heldout)
    print("wrote " + ", ".join(str(path) for path in paths.values()))
    if args.stats:
        print_stats(paths)


if __name__ == "__main__":
    main()
