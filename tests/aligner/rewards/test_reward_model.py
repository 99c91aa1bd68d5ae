"""Reward models in the shape that PPOTrainer expects, and the metrics of rewards."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from nemo_fiberpo.aligner.rewards.reward_model import (
    RuleRewardModel,
    check_failures,
    decode_responses,
    reward_metrics,
    zero_failures,
)
from tests.support.bad_records import BAD, HERE, Letters, bad

pytestmark = pytest.mark.usefixtures("find_bad_graders")


def rollout(*pairs: tuple[str, str]) -> dict[str, torch.Tensor]:
    """Prompts and responses, each response ended by one end-of-sequence token, padded with more of them."""
    rows = [torch.tensor(Letters().text_to_ids(prompt + response) + [0]) for prompt, response in pairs]
    return {
        "response_tokens": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "response_lengths": torch.tensor([len(row) for row in rows]),
        "prompt_lengths": torch.tensor([len(prompt) for prompt, _ in pairs]),
        "prompt_index": torch.zeros(len(rows), dtype=torch.int64),
    }


def test_decode_takes_the_response_up_to_its_end():
    batch = rollout(("2+5=", "7"), ("1+1+5=", " 7 "), ("p", ""))
    batch["response_lengths"][0] += 2  # padding counted in
    assert decode_responses(batch, Letters()) == ["7", "7", ""]
    truncated = rollout(("2+5=", "77"))
    truncated["response_lengths"][0] = 5  # cut by the length limit before any end
    assert decode_responses(truncated, Letters()) == ["7"]


def test_reward_model_gives_rewards_zero_values_and_flags():
    batch = rollout(("2+5=", "7"), ("2+5=", "8"), ("p", "sleep 9"), ("p", "raise"))
    model = RuleRewardModel([bad()], Letters(), {"graders": BAD, "time_limit": 0.5})
    rewards, values = model.infer_rm_critic(batch)
    model.close()
    assert rewards.tolist() == [1.0, 0.0, 0.0, 0.0] and rewards.dtype == torch.float32
    assert values.shape == (4, batch["response_tokens"].size(1) - 1) and not values.any()
    assert batch["grader_failed"].tolist() == [0, 0, 1, 2]
    assert model.reasons == ["made.jsonl:1: no score within 0.5 s", "made.jsonl:1: ZeroDivisionError: asked for"]
    assert (
        model.max_failed == 0.5 and model.drops_failures and model.train({}) is None and model.save().result() is None
    )


RANKS = """
    import sys, torch
    sys.path[:0] = [{here!r}]
    import tests.aligner.rewards.test_reward_model as t
    rank, port, case = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{{port}}", rank=rank, world_size=2)
    model = t.RuleRewardModel(
        [t.bad()],
        t.Letters(),
        {{"graders": t.BAD, "time_limit": 0.5, "on_failure": case}},
        group=torch.distributed.group.WORLD,
    )
    batch = t.rollout(("2+5=", "7"), ("2+5=", "8"), ("p", "sleep 9"))
    try:
        rewards, _ = model.infer_rm_critic(batch)
        print(rewards.tolist(), batch["grader_failed"].tolist(), model._rewards is not None)
    except RuntimeError as error:
        print("refused:", error)
    model.close()
"""


@pytest.mark.parametrize("case", ["drop", "error"])
def test_two_ranks_get_the_first_ones_grades(case):
    root, port = str(Path(__file__).parents[3]), str(20000 + os.getpid() % 20000 + (case == "drop"))
    code = textwrap.dedent(RANKS.format(here=HERE))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), port, case],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": root},
        )
        for rank in range(2)
    ]
    first, second = (rank.communicate(timeout=120)[0].strip() for rank in ranks)
    if case == "drop":
        assert first == "[1.0, 0.0, 0.0] [0, 0, 1] True"
        assert second == "[1.0, 0.0, 0.0] [0, 0, 1] False"
    else:
        assert first.startswith("refused: 1 of 3 responses") and second.startswith("refused: grading failed on rank 0")


def test_reward_metrics_leave_failures_out_of_the_mean_and_count_them():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    domain, failed = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 2])
    dropped = reward_metrics(rewards, domain, failed, ["math", "code", "none"], drops_failures=True)
    # the answer that ran out of time counts with 0: a policy must not gain by hanging its grader
    assert dropped["reward/math"] == pytest.approx(1 / 3)
    assert "reward/code" not in dropped and "reward/none" not in dropped
    assert (dropped["grader_timeouts/math"], dropped["grader_crashes/math"]) == (1, 0)
    assert (dropped["grader_timeouts/code"], dropped["grader_crashes/code"]) == (0, 1)
    assert reward_metrics(rewards, domain, failed, ["math", "code"], False)["reward/math"] == pytest.approx(1 / 3)


def test_remote_reward_model_adapts_the_servers_answer():
    pytest.importorskip("nemo_aligner")
    from nemo_aligner.utils.server_utils import FutureResult

    from nemo_fiberpo.aligner.rewards.server import RemoteRewardModel

    class Answer(FutureResult):
        def __init__(self, rewards):
            self.rewards = rewards

        def result(self):
            return self.rewards

    class Client:  # in place of the connection to a server, which needs a GPU machine
        rewards = torch.tensor([[0.25], [-1.0]])

        def infer_rm(self, rollout_batch):
            return Answer(self.rewards)

    batch = rollout(("2+5=", "7"), ("1+1=", "2"))
    model = RemoteRewardModel(cfg=None, client=Client())
    future = model.infer_rm_critic(batch)
    assert isinstance(future, FutureResult) and batch["grader_failed"].tolist() == [0, 0]
    rewards, values = future.result()
    assert rewards.tolist() == [0.25, -1.0] and values.shape == (2, 5)
    Client.rewards = torch.tensor([[float("nan")], [1.0]])
    with pytest.raises(RuntimeError, match="not finite"):
        model.infer_rm_critic(batch).result()


def test_more_failures_than_allowed_stop_the_run_with_the_first_reasons():
    check_failures(4, 8, 0.5, ["a"])
    with pytest.raises(RuntimeError, match=r"^5 of 8 responses .* rewards\.max_failed = 0\.5: a; b; c$"):
        check_failures(5, 8, 0.5, ["a", "b", "c", "d"])
    with pytest.raises(RuntimeError, match="output of the other ranks"):
        check_failures(1, 8, 0.0, [])
    check_failures(0, 0, 0.0, [])
    check_failures(8, 8, 1.0, [])


def test_an_answer_that_hangs_the_grader_is_not_left_out_of_the_loss():
    """Else a policy would learn to hang the grader where it knows no answer."""
    given, failed = torch.tensor([1.0, 0.5, 0.5]), torch.tensor([0, 1, 2])
    assert [column.tolist() for column in zero_failures(given, failed, True)] == [[1.0, 0.0, 0.0], [1, 1, 0]]
    assert [column.tolist() for column in zero_failures(given, failed, False)] == [[1.0, 0.0, 0.0], [1, 1, 1]]
