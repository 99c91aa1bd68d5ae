"""A policy with learned positions trains on prompts and responses that fill them all, and not on one token more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import forked
from tests.support.launching import WARM_START, fresh, metrics

LEARNED = ["model.position_embedding_type=learned_absolute", "model.max_position_embeddings=23"]
BOS = "model.ppo.sampling_params.add_BOS=true"


def first_token_of(tokenizer: Path, token: str) -> None:
    """Give the quickstart's tokenizer, which has none, a token that begins a text."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        held = json.loads((tokenizer / name).read_text())
        (tokenizer / name).write_text(json.dumps(held | {"bos_token": token}))


@pytest.mark.slow
@pytest.mark.distributed
def test_positions_are_used_to_the_last_and_not_beyond(start, tmp_path):
    """Prompts of at most 12 tokens and the token that they begin with, responses of 10: 23 positions."""
    run_dir = fresh(start, tmp_path, "run")
    (run_dir / "warm_start.nemo").unlink()
    first_token_of(run_dir / "data" / "tokenizer", "<unk>")
    lengths = [*WARM_START, *LEARNED, "model.encoder_seq_length=23", "data.max_prompt_length=13", BOS]
    forked.launch("warm_start.py", run_dir, *lengths, processes=1)
    forked.launch(
        "train_gpt_fiberpo.py", run_dir, *lengths, "algorithm.rl_steps=1", "algorithm.save_interval=0", processes=1
    )
    [rollout] = [row for row in metrics(run_dir) if "train_rollouts/prompt_length" in row]
    texts = [json.loads(line)["prompt"] for line in (run_dir / "data" / "train.jsonl").read_text().splitlines()]
    used = json.loads((run_dir / "prompts.jsonl").read_text().splitlines()[0])["lines"]
    # A token a character, and the first one.
    assert rollout["train_rollouts/prompt_length"] == pytest.approx(
        sum(len(texts[i - 1]) + 1 for i in used) / len(used)
    )
    assert rollout["train_rollouts/truncated"] > 0, "no response is as long as may be"
    with pytest.raises(AssertionError, match=r"error: model.encoder_seq_length: 23 is less than .* = 24"):
        forked.launch("train_gpt_fiberpo.py", run_dir, *lengths, "model.ppo.length_params.max_length=11", processes=1)
