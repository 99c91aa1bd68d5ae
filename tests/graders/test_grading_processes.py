"""Grading processes under answers that break them: each costs only itself, and nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nemo_fiberpo.graders.pool import GraderPool
from nemo_fiberpo.rewards import RuleRewards
from tests.support.bad_records import BAD, HERE, LIMIT, bad, gym, rewards_of, sum_entry
from tests.support.launching import wait_for

pytestmark = pytest.mark.usefixtures("find_bad_graders")


@pytest.mark.parametrize(
    ("response", "failure", "reason"),
    [
        ("sleep 60", "timeout", f"within {LIMIT} s"),
        ("hold_gil", "timeout", f"within {LIMIT} s"),
        ("spawn 60", "timeout", f"within {LIMIT} s"),
        ("exit 0", "crash", "exit code 0"),
        ("exit 3", "crash", "exit code 3"),
        ("segfault", "crash", "SIGSEGV"),
        ("allocate 100000000000", "memory", "out of memory"),
        ("raise", "crash", "ZeroDivisionError: asked for"),
        ("sys_exit 0", "crash", "SystemExit"),
        ("nan", "crash", "not a finite number"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_answer_that_breaks_the_grader_costs_only_itself(response, failure, reason, workers):
    rewards, failed, reasons = rewards_of("7", "7", response, "7", "8", "7", workers=workers)
    assert rewards == [1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    assert failed == [None, None, failure, None, None, None]
    assert reason in reasons[2]


def test_a_copy_of_a_grading_process_answers_for_nobody():
    """Twenty pools, since what a copy did depended on which of the two was faster."""
    texts = ["run import os; os.fork(); score = 0", "8", "7"] * 2
    with GraderPool(BAD, [], workers=2, time_limit=LIMIT) as pool:
        for _ in range(20):
            outcomes = pool.grade([("bad", {"answer": "7"}, text) for text in texts])
            assert [(one.score, one.failure) for one in outcomes] == [(0.0, None), (0.0, None), (1.0, None)] * 2


def test_many_bad_answers_in_a_row_and_at_both_ends():
    answers = ["exit 1", "exit 1", "7", "sleep 9", "raise", "exit 1", "7", "sleep 9"] * 2
    rewards, failed, _ = rewards_of(*answers, workers=2)
    assert rewards == [float(answer == "7") for answer in answers]
    expected = {"exit 1": "crash", "raise": "crash", "sleep 9": "timeout", "7": None}
    assert failed == [expected[answer] for answer in answers]


def test_slow_answers_have_a_limit_each_not_together():
    with RuleRewards([bad()], graders=BAD, time_limit=4.0, workers=1) as rewards:
        assert rewards.score([0] * 6, ["sleep 0.8"] * 6).failed == [None] * 6  # 4.8 s together


def test_a_kill_leaves_nothing_that_the_grader_started():
    marker = "61.375"
    rewards_of(f"spawn {marker}")
    wait_for(lambda: marker not in subprocess.check_output(["ps", "-eo", "args"], text=True), 60, "the end of sleep")


def test_a_replaced_worker_has_the_graders_libraries_already():
    """Importing reasoning-gym takes seconds, which an answer that crashes its worker must not cost the others."""
    with RuleRewards([gym("chain_sum", sum_entry()), bad()], graders=BAD, workers=1) as rewards:
        scores = rewards.score([0, 1, 1, 1], ["5", "exit 1", "imported reasoning_gym", "imported no_such_library"])
    assert scores.rewards.tolist() == [1.0, 0.0, 1.0, 0.0] and scores.failed == [None, "crash", None, None]


def test_noise_on_stdout_and_long_answers_do_no_harm():
    rewards, failed, _ = rewards_of("print", "x" * 500_000, "\ud800 \0 \n", "7")
    assert rewards == [0.0, 0.0, 0.0, 1.0] and failed == [None] * 4


def test_a_worker_that_dies_between_batches_is_replaced_without_blame():
    with RuleRewards([bad()], graders=BAD) as rewards:
        rewards.score([0], ["7"])
        for victim in ("worker", "supervisor"):
            slot = rewards._pool._slots[0]
            os.kill(slot.pid if victim == "worker" else slot.process.pid, signal.SIGKILL)
            time.sleep(0.1)
            assert rewards.score([0, 0], ["7", "8"]).rewards.tolist() == [1.0, 0.0]


def test_a_worker_that_reads_nothing_blocks_nobody(monkeypatch):
    """A chunk that is longer than the pipe is wide, and no process that empties it."""
    monkeypatch.setattr("nemo_fiberpo.graders.pool._PATIENCE", 1.0)
    monkeypatch.setattr("nemo_fiberpo.graders.pool._CLOSING", 0.1)
    with GraderPool(BAD, [], time_limit=LIMIT) as pool:
        pool.wait_until_ready()
        for pid in (pool._slots[0].pid, pool._slots[0].process.pid):
            os.kill(pid, signal.SIGSTOP)
        outcomes = pool.grade([("bad", {"answer": "7"}, text) for text in ("x" * 300_000, "7")])
    assert [(one.score, one.failure) for one in outcomes] == [(0.0, None), (1.0, None)]


def test_deaths_of_idle_workers_are_not_added_up():
    with GraderPool(BAD, [], time_limit=LIMIT) as pool:
        for _ in range(5):
            pool.wait_until_ready()
            slot = pool._slots[0]
            os.kill(slot.pid, signal.SIGKILL)
            wait_for(lambda slot=slot: slot.process.poll() is not None, 60, "the end of the supervisor")
            assert pool.grade([("bad", {"answer": "7"}, "7")])[0].score == 1.0


def test_a_message_that_is_not_the_workers_own_is_ignored():
    with GraderPool(BAD, [], time_limit=LIMIT) as pool:
        pool.wait_until_ready()
        slot = pool._slots[0]
        slot.chunk.append(0)
        outcomes = [None]
        pool._answer(slot, outcomes, item=0, score=1.0)
        assert outcomes[0].score == 1.0 and not slot.chunk
        with pytest.raises(RuntimeError, match="a score of response 0, which it was not given"):
            pool._answer(slot, outcomes, item=0, score=1.0)


def alive(pids: list[int]) -> list[int]:
    stats = {pid: Path(f"/proc/{pid}/stat") for pid in pids}
    return [pid for pid, stat in stats.items() if stat.exists() and " Z " not in stat.read_text()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_close_and_kill_minus_9_leave_no_process():
    with RuleRewards([bad()], graders=BAD, workers=2) as rewards:
        rewards.wait_until_ready()
        pids = [pid for slot in rewards._pool._slots for pid in (slot.pid, slot.process.pid)]
        assert len(alive(pids)) == 4
    wait_for(lambda: not alive(pids), 60, "the end of the workers")

    script = f"""
        import sys, threading, time
        sys.path.insert(0, {HERE!r})
        from nemo_fiberpo.graders.pool import GraderPool
        pool = GraderPool({BAD!r}, [], workers=2, time_limit=99.0)
        pool.wait_until_ready()
        print(*[pid for slot in pool._slots for pid in (slot.pid, slot.process.pid)], flush=True)
        pool.grade([("bad", {{"answer": "7"}}, "hold_gil"), ("bad", {{"answer": "7"}}, "sleep 99")])
    """
    root = str(Path(__file__).parents[3])
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert trainer.stdout is not None
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    time.sleep(0.5)
    assert len(alive(pids)) == 4
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not alive(pids), 60, "the end of the workers")
    trainer.stdout.close()


def test_a_closed_pool_refuses_and_closes_again():
    rewards = RuleRewards([bad()], graders=BAD)
    rewards.close()
    rewards.close()
    with pytest.raises(RuntimeError, match="closed"):
        rewards.score([0], ["7"])
