"""The figures and the report of `run.sh`: every row is there, and a failed check is not lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import logprobs, step
from tests.gpu import measure, report
from tests.gpu.device import ON_GPU

JUNIT = """<testsuites><testsuite>
<testcase classname="a" name="good"/>
<testcase classname="a" name="bad"><failure message="1 != 2">trace</failure></testcase>
<testcase classname="a" name="left out"><skipped message="no apex"/></testcase>
</testsuite></testsuites>"""
STEP = {
    "model": "dense", "layers": 1, "hidden": 64, "experts": 0, "vocab": 128, "length": 16, "samples": 1,
    "microbatches": 8, "parameters": 65920, "held MiB": 0.5, "dtype": "float32", "recompute": False, "torch": "2",
    "megatron-core": "0", "device": "none",
    "table": {step.PLAIN: {"ms": 10.0, "x plain": 1.0, "peak MiB": 0.25}},
}  # fmt: skip
"""A result of `benchmarks.step` with one row."""
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def figures() -> dict:
    return {**measure.measure(8, 256, ["eager"]), "not compiled": "not asked for"}


def test_every_figure_is_there(figures: dict):
    table = figures["table"]
    assert len(table) == 8 and figures["floor"]["GB/s"] > 0
    for name, row in table.items():
        assert row["ms"] > 0 and row["launches"] > 0 and row["bytes/token"] > 0, name
        assert (row["x floor"] is None) == (row["GB/s"] is None)
        assert (row["waits"] is not None) == ON_GPU
    # One of the three passes is a part of the whole, and the coefficients are what is left of its memory: 4 bytes.
    assert table["pass measure, eager"]["launches"] < table["token_coefficients, eager"]["launches"]
    assert table["token_coefficients, eager"]["launches"] < table["surrogate with report, eager"]["launches"]
    assert table["token_coefficients, eager"]["bytes/token"] >= 4
    assert all(name in measure.markdown(figures) for name in table)


@pytest.mark.parametrize("good", [True, False])
def test_the_report_fails_where_a_check_did(tmp_path: Path, figures: dict, good: bool):
    (tmp_path / "junit.xml").write_text(JUNIT.replace("failure", "system-out") if good else JUNIT)
    (tmp_path / "measure.json").write_text(json.dumps(figures))
    of_log_probs = logprobs.measure(8, 4, 64, torch.float32, 1, with_aligner=False)
    (tmp_path / "logprobs.json").write_text(json.dumps(of_log_probs))
    (tmp_path / "step.json").write_text(json.dumps([STEP]))
    found = report.make_report(tmp_path, {"checks": (0 if good else 1, 3)})
    text = report.as_markdown(found)
    assert found["ok"] == good and ("a::bad: 1 != 2" in text) == (not good)
    assert "1 x no apex" in text and logprobs.markdown(of_log_probs) in text and "not asked for" in text
    assert "| plain | 10 | 1.00 | 0.25 |" in text


def test_the_report_fails_where_a_stage_left_nothing(tmp_path: Path):
    found = report.make_report(tmp_path, {"checks": (124, 240)})
    assert not found["ok"] and len(found["problems"]) == 5
    assert "checks ended by its time limit" in report.as_markdown(found)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(ON_GPU, reason="run.sh runs the benchmark of a step on the GPU itself")
def test_the_benchmark_of_a_step_has_every_row(tmp_path: Path):
    sizes = {name: STEP[name] for name in ("model", "layers", "hidden", "vocab", "length", "samples")}
    out = tmp_path / "step.json"
    options = [f"--{name}={value}" for name, value in (sizes | {"repeats": 1, "out": out}).items()]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.step", *options, "--memory"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(out.read_text())
    table = result["table"]
    assert result.keys() == STEP.keys() and result["parameters"] == STEP["parameters"]
    names = {"plain", "two passes", "all forward passes first", "one pass"}
    assert table.keys() == names | {f"optimistic, f = {acting:g}" for acting in (0, 0.25, 0.5, 1)}
    assert all(figures[column] > 0 for figures in table.values() for column in step.COLUMNS)
    assert table["all forward passes first"]["peak MiB"] > 2 * table["plain"]["peak MiB"]  # graphs of 8 micro-batches
    assert step.markdown(result) in done.stdout
