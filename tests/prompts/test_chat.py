"""Chat messages in place of a prompt: the tokens are transformers' own, and what is refused names file and line."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from nemo_fiberpo.aligner.data.prompts import PromptDataset
from nemo_fiberpo.prompts.records import load_prompts
from nemo_fiberpo.rewards import RuleRewards
from tests.support.hf_models import write_tokenizer
from tests.support.prompt_files import write_lines

# <10> system, <11> user, <12> assistant; <1> ends a message. One of the two begins with BOS, which is <3>.
TURNS = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ {'system': '<10>', 'user': '<11>', 'assistant': '<12>'}[message.role] }} {{ message.content }} <1> "
    "{% endfor %}{% if add_generation_prompt %}<12>{% endif %}"
)
TEMPLATES = {"BOS in the template": "{{ bos_token }}" + TURNS, "no BOS in the template": TURNS}
CHAT = [
    {"role": "system", "content": "<20>"},
    {"role": "user", "content": "<21> <22>"},
    {"role": "assistant", "content": "<23>"},
    {"role": "user", "content": "<24>"},
]
CHAT_IDS = [10, 20, 1, 11, 21, 22, 1, 12, 23, 1, 11, 24, 1, 12]


def line(messages: Any, **more: Any) -> dict[str, Any]:
    record = {"messages": messages, "domain": "math", "grader": "math_verify", "answer": "7"} | more
    return {name: value for name, value in record.items() if value is not None}


def nemo_tokenizer(folder: Path) -> Any:
    """As the actor has it."""
    module = pytest.importorskip("nemo.collections.common.tokenizers.huggingface.auto_tokenizer")
    return module.AutoTokenizer(str(folder), use_fast=True)


@pytest.fixture
def write(tmp_path):
    return partial(write_lines, tmp_path, name="chat.jsonl")


@pytest.mark.parametrize("bos_id", [None, 3])
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_tokens_are_those_of_transformers_whatever_add_bos_is(write, tmp_path, template: str, bos_id: int | None):
    write_tokenizer(tmp_path / "hf", bos=True, chat_template=TEMPLATES[template])
    path = write(line(CHAT), line(None, prompt="<21> <22>"), line(CHAT[1:2]))
    prompts = PromptDataset(load_prompts(path), nemo_tokenizer(tmp_path / "hf"), 20, bos_id=bos_id)
    untouched = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for place, messages in ((0, CHAT), (2, CHAT[1:2])):
        wanted = untouched.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        assert prompts[place]["text"].tolist() == wanted and prompts[place]["length"] == len(wanted)
    first = [3] if template == "BOS in the template" else []
    assert prompts[0]["text"].tolist() == first + CHAT_IDS, "by hand"
    assert prompts[1]["text"].tolist() == ([] if bos_id is None else [3]) + [21, 22], "a text beside conversations"


def test_lengths_count_the_template(write, tmp_path):
    write_tokenizer(tmp_path / "hf", chat_template=TURNS)
    with pytest.raises(ValueError, match=r"chat.jsonl:1: messages: 14 tokens, more than max_prompt_length = 13"):
        PromptDataset(load_prompts(write(line(CHAT))), nemo_tokenizer(tmp_path / "hf"), 13)


def test_a_warm_start_learns_to_answer_conversations(write, tmp_path, monkeypatch):
    pytest.importorskip("nemo_aligner")
    path = Path(__file__).parents[2] / "examples" / "warm_start.py"
    spec = importlib.util.spec_from_file_location("warm_start", path)
    assert spec is not None and spec.loader is not None
    warm_start = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "warm_start", warm_start)
    spec.loader.exec_module(warm_start)
    write_tokenizer(tmp_path / "hf", bos=True, chat_template=TURNS)
    records = load_prompts(write(line(CHAT, response="<25>"), line(None, prompt="<21>", response="<26>")))
    examples = warm_start.tokenize(records, nemo_tokenizer(tmp_path / "hf"), 3)
    assert examples == {"math": [(CHAT_IDS, [25, 1]), ([3, 21], [26, 1])]}


def test_the_last_message_is_checked_against_the_grader(write):
    (record,) = load_prompts(write(line([{"role": "system", "content": "Add."}, {"role": "user", "content": "7"}])))
    assert record.prompt == "7" and record.fields == {"answer": "7"}
    with RuleRewards([record]) as rewards, pytest.raises(ValueError, match=r"jsonl:1: prompt: the text of the prompt"):
        rewards.check_records()


USER = {"role": "user", "content": "2+5="}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (line([USER], prompt="2+5="), "messages: given beside prompt; a line has one of the two"),
        (line(None), "prompt: missing"),
        (line(None, mesages=[USER]), "messages: missing; did you mean 'mesages'?"),
        (line(None, prompt=[USER]), "prompt: expected a string, found list; chat messages go into messages"),
        (line("2+5="), "messages: expected a list of"),
        (line([]), "messages: expected a list of"),
        (line(["2+5="]), "messages[0]: expected {"),
        (line([{"role": "user"}]), "messages[0].content: missing"),
        (line([USER, {"content": "a"}]), "messages[1].role: missing"),
        (line([USER | {"name": "me"}]), "messages[0].name: unknown key; a message has role and content"),
        (line([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content: expected a string, found list"),
        (line([{"role": "user", "content": " "}]), "messages[0].content: is empty"),
        (line([{"role": "usr", "content": "a"}]), "messages[0].role: 'usr' is unknown; did you mean 'user'?"),
        (line([{"role": "human", "content": "a"}]), "messages[0].role: 'human' is unknown; valid: assistant, "),
        (line(CHAT[:3]), "messages[2].role: the last message has the role 'assistant', but "),
        (line(CHAT[:1]), "messages[0].role: the last message has the role 'system', but "),
    ],
)
def test_a_refusal_names_file_line_and_message(write, bad, message: str):
    path = write(line([{"role": "system", "content": ""}, USER]), bad)
    with pytest.raises(ValueError) as error:
        load_prompts(path)
    assert str(error.value).startswith(f"{path}:2: {message}")


def test_a_tokenizer_without_a_template_is_refused(write, tmp_path):
    path = write(line(None, prompt="<21>"), line(CHAT))
    write_tokenizer(tmp_path / "hf")
    sentencepiece = SimpleNamespace(tokenizer=SimpleNamespace(), text_to_ids=lambda text: [21])  # as NeMo's wraps it
    characters = SimpleNamespace(text_to_ids=lambda text: [21])
    for tokenizer in (nemo_tokenizer(tmp_path / "hf"), sentencepiece, characters):
        with pytest.raises(
            ValueError, match=r"chat.jsonl:2: messages: the policy's tokenizer has no chat template; add"
        ):
            PromptDataset(load_prompts(path), tokenizer, 20)


def test_a_template_that_refuses_a_conversation_is_reported(write, tmp_path):
    write_tokenizer(tmp_path / "hf", chat_template=TURNS)
    path = write(line(CHAT), line([*CHAT, {"role": "tool", "content": "<20>"}]))
    with pytest.raises(
        ValueError, match=r"chat.jsonl:2: messages: the tokenizer's chat template fails: .*no tools here"
    ):
        PromptDataset(load_prompts(path), nemo_tokenizer(tmp_path / "hf"), 20)
