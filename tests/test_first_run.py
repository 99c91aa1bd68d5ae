"""The README's first run on your own data and model: its block passes every check, with a small Llama as the model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nemo_fiberpo.cli import main
from nemo_fiberpo.graders.builtin import math_verify
from nemo_fiberpo.graders.checks import complaint

ROOT = Path(__file__).parent.parent
BLOCK = re.search(r"```bash\n(MODEL=.*?)```", (ROOT / "README.md").read_text(), re.S)
HEREDOC = re.compile(r"^cat > (\S+) <<'END'\n(.*?)^END\n", re.M | re.S)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The block's `fiberpo` commands, in a folder with its files and a model in place of the user's."""
    pytest.importorskip("megatron.core")
    from tests.support.hf_models import make, write_tokenizer

    assert BLOCK is not None
    files = dict(HEREDOC.findall(BLOCK[1]))
    assert set(files) == {"data/train.jsonl", "conf/my_run.yaml"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    make("llama", max_position_embeddings=128).save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    written = re.findall(r"^fiberpo (.*)$", HEREDOC.sub("", BLOCK[1]), re.M)
    split = (shlex.split(line.replace("$MODEL", "hf"), comments=True) for line in written)
    return {command: arguments for command, *arguments in split}


def test_the_block_passes_every_check(commands: dict[str, list[str]], capsys: pytest.CaptureFixture[str]):
    assert list(commands) == ["import-hf", "check", "train", "export-hf"]
    assert commands["train"] == [*commands["check"], "--ranks", "1"], "what is checked is what is trained"
    assert main(["import-hf", *commands["import-hf"]]) == 0
    assert main(["check", *commands["check"]]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "4 prompts in data/train.jsonl" in said and "the config in policy.nemo" in said
    assert main(["plan", *commands["check"]]) == 0


def test_the_grader_scores_the_reference_answers_of_the_block(commands: dict[str, list[str]]):
    from nemo_fiberpo.prompts.records import load_prompts

    for record in load_prompts("data/train.jsonl"):
        assert not complaint(math_verify, record.grader, record.fields, record.prompt, record.response), record
