"""The figures and the report of `run.sh`: every row is there, and a failed check is not lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import logprobs
from tests.gpu import measure, report
from tests.gpu.device import ON_GPU

JUNIT = """<testsuites><testsuite>
<testcase classname="a" name="good"/>
<testcase classname="a" name="bad"><failure message="1 != 2">trace</failure></testcase>
<testcase classname="a" name="left out"><skipped message="no apex"/></testcase>
</testsuite></testsuites>"""


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
    found = report.make_report(tmp_path, {"checks": (0 if good else 1, 3)})
    text = report.as_markdown(found)
    assert found["ok"] == good and ("a::bad: 1 != 2" in text) == (not good)
    assert "1 x no apex" in text and logprobs.markdown(of_log_probs) in text and "not asked for" in text


def test_the_report_fails_where_a_stage_left_nothing(tmp_path: Path):
    found = report.make_report(tmp_path, {"checks": (124, 240)})
    assert not found["ok"] and len(found["problems"]) == 4
    assert "checks ended by its time limit" in report.as_markdown(found)
