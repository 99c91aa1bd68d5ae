"""The metrics file and the line per step."""

import io
import json
import math

from nemo_fiberpo.aligner.loggers import MetricsFile, Progress


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_know_their_rl_step(tmp_path):
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    file.log_metrics({"train_rollouts/rewards": 0.25, "train_rollouts/table": "text"}, step=3)
    file.log_metrics({"train_optim/loss": math.nan, "train_optim/rl_step": 3}, step=14)
    file.log_metrics({"val_rollouts/rewards": 0.5}, step=4)
    first, second, third = rows(tmp_path / "run" / "metrics.jsonl")
    assert first == {"rl_step": 3, "step": 3, "train_rollouts/rewards": 0.25}
    assert second == {"rl_step": 3, "step": 14, "train_optim/loss": None, "train_optim/rl_step": 3.0}
    assert third == {"rl_step": 3, "step": 4, "val_rollouts/rewards": 0.5}, "evaluated when step 3 had been counted"


def test_rewind_drops_what_came_after_the_checkpoint_and_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(4):
        file.log_metrics({"train_rollouts/rewards": float(step)}, step=step)
    with path.open("a") as stream:
        stream.write('{"rl_step": 1, "st')
    file.rewind(2)
    assert [row["rl_step"] for row in rows(path)] == [0, 1]
    file.log_metrics({"train_rollouts/rewards": 9.0}, step=2)
    assert [row["rl_step"] for row in rows(path)] == [0, 1, 2]


def test_damaged_lines_are_set_aside_and_reported(tmp_path, capsys):
    """A byte that is no text, a key that was flipped, a line that became two, one nested without end."""
    path = tmp_path / "metrics.jsonl"
    good = [f'{{"rl_step": {step}, "step": {step}}}\n'.encode() for step in range(4)]
    bad = [b'{"rl_step": 1, "a": "\xff"}\n', b'{"rl_ste0": 1}\n', b'{"rl_step": 1, \r"b": \n', b"[" * 100_000 + b"\n"]
    bad += [b'{"rl_step": "1"}\n', b"null\n"]
    path.write_bytes(good[0] + b"".join(bad) + b"".join(good[1:]) + b'{"rl_step": 1, "st')
    MetricsFile(path).rewind(2)
    assert path.read_bytes() == b"".join(good[:2])
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"".join(bad)
    assert "metrics.jsonl: 6 damaged lines moved to metrics.jsonl.damaged, the first" in capsys.readouterr().out
    MetricsFile(path).rewind(2)
    assert capsys.readouterr().out == "" and (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"".join(bad)


def test_rewind_of_a_run_that_wrote_nothing(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl").rewind(0)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_progress_prints_one_line_a_step():
    stream = io.StringIO()
    progress = Progress(20, stream)
    progress.log_metrics({"train_rollouts/rewards": 0.5, "train_rollouts/reward/math": 0.75}, step=6)
    progress.log_metrics({"train_optim/gates/domain/pos/budget_used_max": 0.4}, step=30)
    progress.log_metrics({"train_optim/gates/domain/neg/budget_used_max": 1.2}, step=31)
    assert stream.getvalue() == ""
    progress.log_metrics({"timers/train_time": 1.0}, step=6)
    line = stream.getvalue()
    assert line.startswith("step  7/20  reward 0.500 (math 0.75)  most of a budget used: domain 120%  ")
    assert line.count("\n") == 1
    progress.log_metrics({"timers/train_time": 1.0}, step=7)
    assert "reward nan" in stream.getvalue() and "on-policy" in stream.getvalue(), "a step's figures are its own"
