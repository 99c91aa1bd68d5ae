"""Rewards by rules: real graders in real processes, and answers that hang, crash or kill them."""

from __future__ import annotations

import os

import pytest
import torch

from nemo_fiberpo.aligner.rewards.reward_model import RuleRewardModel
from nemo_fiberpo.graders.builtin import UNSAFE_TASKS
from nemo_fiberpo.graders.pool import GraderPool
from nemo_fiberpo.prompts.records import PromptRecord
from nemo_fiberpo.rewards import RuleRewards
from tests.support.bad_records import BAD, Letters, bad, gym, rewards_of, sum_entry

pytestmark = pytest.mark.usefixtures("find_bad_graders")


def math(answer: str) -> PromptRecord:
    return PromptRecord("p", "m", "math_verify", {"answer": answer}, "made.jsonl:9")


# what the shipped graders say


def test_reasoning_gym_grades_by_the_tasks_own_score():
    sort = {"answer": "['1.0', '5.0', '9.0']", "metadata": {"direction": "ascending"}}
    records = [
        gym("chain_sum", sum_entry()),
        gym("spell_backward", {"answer": "tac", "metadata": {}}),
        gym("number_sorting", sort, answer_form="digit_list"),
        gym("number_sorting", sort),
        gym("chain_sum", sum_entry(), answer_form="answer_tag"),
    ]
    cases = [(0, "5", 1), (0, "6", 0), (0, "", 0), (1, "tac", 1), (1, "cat", 0), (2, "159", 1), (2, "951", 0)]
    cases += [(2, "1,5,9", 0), (3, "[1,5,9]", 1), (3, "159", 0), (4, "so <answer>5</answer>", 1), (4, "5", 0)]
    with RuleRewards(records) as rewards:
        scores = rewards.score([case[0] for case in cases], [case[1] for case in cases])
    assert scores.rewards.dtype == torch.float32
    assert scores.rewards.tolist() == [case[2] for case in cases]
    assert scores.failed == [None] * len(cases)


def test_raw_score_is_the_graders_number_and_threshold_wants_a_full_one():
    # spell_backward gives 1/3 for one letter of three in its place
    record = gym("spell_backward", {"answer": "tac", "metadata": {}})
    with RuleRewards([record], score="raw") as rewards:
        assert rewards.score([0], ["txx"]).rewards.item() == pytest.approx(1 / 3)
    with RuleRewards([record]) as rewards:
        assert rewards.score([0], ["txx"]).rewards.item() == 0.0


def test_math_verify_compares_values_not_strings():
    records = [math("\\frac{1}{2}"), math("x^2+2x+1"), math("$\\{1,2\\}$")]
    cases = [
        (0, "$0.5$", 1),
        (0, "The answer is $\\frac{2}{4}$.", 1),
        (0, "\\boxed{1/3}", 0),
        (1, "$(x+1)^2$", 1),
        (1, "nothing here", 0),
        (1, "", 0),
        (2, "$\\{2,1\\}$", 1),
    ]
    with RuleRewards(records, time_limit=10.0) as rewards:
        scores = rewards.score([case[0] for case in cases], [case[1] for case in cases])
    assert scores.failed == [None] * len(cases)
    assert scores.rewards.tolist() == [case[2] for case in cases]


def test_a_reference_answer_that_math_verify_cannot_read_is_a_crash_not_a_zero():
    with RuleRewards([math("")]) as rewards:
        scores = rewards.score([0], ["$1$"])
    assert scores.failed == ["crash"] and "reference answer" in scores.reasons[0]


def test_a_formula_that_makes_sympy_hang_times_out():
    with RuleRewards([math("1")], time_limit=1.0) as rewards:
        scores = rewards.score([0, 0], ["$9^{9^{9^{9}}}$", "$1$"])
    assert scores.rewards.tolist() == [0.0, 1.0]
    assert scores.failed[0] in ("timeout", "crash") and scores.failed[1] is None


# what a bad answer costs


def test_on_failure_error_names_prompt_and_answer():
    with pytest.raises(RuntimeError, match=r"1 of 2 responses.*made.jsonl:1: crash, ZeroDivisionError.*'raise'"):
        rewards_of("7", "raise", on_failure="error")


def test_every_line_is_checked_against_its_grader_before_training():
    good = [math("5"), gym("chain_sum", sum_entry()), gym("graph_color", {"answer": None, "metadata": {}})][:2]
    with RuleRewards(good) as rewards:
        rewards.check_records()
    wrong = [math(""), gym("arc_agi", {"answer": "1", "metadata": {"output": [[1]]}}), math("about 5")] * 5
    with RuleRewards(wrong + good) as rewards, pytest.raises(ValueError) as error:
        rewards.check_records()
    lines = str(error.value).splitlines()
    assert lines[0].startswith("made.jsonl:9: answer: math-verify reads no expression")
    assert lines[1].startswith("made.jsonl:1: entry: the reference answer '1' scores 0.05")
    assert lines[2].startswith("made.jsonl:9: answer: 'about 5'")
    assert len(lines) == 11 and lines[10] == "and 5 more of 17 lines"


def test_a_grader_of_ones_own_is_held_to_its_responses_unless_its_score_is_taken_as_it_is(capsys):
    record = PromptRecord("p", "d", "bad", {"answer": "7"}, "made.jsonl:1", response="half")
    with pytest.raises(ValueError, match=r"^made\.jsonl:1: response: the reference answer 'half' scores 0\.5"):
        RuleRewardModel([record], Letters(), {"graders": BAD}).start()
    assert "isolation in force: " in capsys.readouterr().out
    model = RuleRewardModel([record], Letters(), {"graders": BAD, "score": "raw"})
    model.start()
    model.close()


@pytest.mark.parametrize("task", UNSAFE_TASKS)
def test_a_task_that_evaluates_answers_is_refused_unless_it_is_named(task):
    record = gym(task, {"answer": "1", "metadata": {}})
    message = rf"^made\.jsonl:1: task: '{task}' .* rewards\.unsafe_tasks=\[{task}\]"
    with pytest.raises(ValueError, match=message):
        RuleRewardModel([record], Letters()).start()
    with pytest.raises(ValueError, match=message):
        RuleRewards([record], unsafe_tasks=[name for name in UNSAFE_TASKS if name != task])


def test_a_response_that_a_task_runs_affects_only_itself(tmp_path):
    """`countdown` gives the answer to sympy's parse_expr, which runs it."""
    entry = {"answer": "1 + 2", "metadata": {"numbers": [1, 2], "target": 3}}
    poison = "setattr(__import__('numpy'), 'isclose', __import__('unittest.mock').mock.Mock(return_value=True))"
    write = f"open({str(tmp_path / 'written')!r}, 'w')"
    answers = [poison, "2 + 1 - 1 + 1", "1 * 2", write, "1 * 2", "1 + 2"]
    with RuleRewards([gym("countdown", entry)], unsafe_tasks=["countdown"], time_limit=20.0) as rewards:
        rewards.check_records()
        assert rewards.score([0] * 6, answers).rewards.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
        assert rewards.score([0] * 2, ["1 * 2", "2 + 1"]).rewards.tolist() == [0.0, 1.0]
    assert not (tmp_path / "written").exists()


def test_an_unknown_task_or_grader_is_named():
    with pytest.raises(RuntimeError, match=r"'chain_summ' is not a task of reasoning-gym.*'chain_sum'"):
        with RuleRewards([gym("chain_summ", sum_entry())]) as rewards:
            rewards.wait_until_ready()
    with pytest.raises(RuntimeError, match="no_such_module"):
        with RuleRewards([bad()], graders={"bad": "no_such_module:grade"}) as rewards:
            rewards.score([0], ["7"])
    with pytest.raises(RuntimeError, match="nothing_here"):
        RuleRewardModel([bad()], Letters(), {"graders": {"bad": "bad_graders:nothing_here"}}).start()


@pytest.mark.parametrize(
    ("options", "field"),
    [({"score": "rounded"}, "score"), ({"on_failure": "skip"}, "on_failure"), ({"workers": 0}, "workers")]
    + [({"time_limit": float("inf")}, "time_limit"), ({"time_limit": -1}, "time_limit")],
)
def test_an_option_out_of_range_is_named(options, field):
    with pytest.raises(ValueError, match=field):
        RuleRewards([bad()], graders=BAD, **options)


def test_a_memory_limit_too_small_to_start_is_an_error():
    with pytest.raises(RuntimeError, match="memory_limit_mib"), GraderPool(BAD, [], memory_limit_mib=1) as pool:
        pool.grade([("bad", {"answer": "7"}, "allocate 10")] * 3 + [("bad", {"answer": "7"}, "7")])
        raise RuntimeError("memory_limit_mib: the worker lived")  # a lean worker may; then there is nothing to test


# what a grading process is


def test_a_grading_process_has_no_torch_no_launcher_environment_and_no_open_file(monkeypatch, tmp_path):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    read, write = os.pipe()
    os.set_inheritable(write, True)  # what a C++ library's socket is
    with RuleRewards([bad(), gym("chain_sum", sum_entry())], graders=BAD, score="raw") as rewards:
        scores = rewards.score([0, 0, 0], ["imported torch", "imported nemo_fiberpo", "environment MASTER_ADDR"])
        os.close(write)
        os.set_blocking(read, False)
        assert os.read(read, 1) == b""  # end of file: nobody else holds the other end
    assert scores.rewards.tolist() == [0.0, 0.0, 0.0]
    os.close(read)
