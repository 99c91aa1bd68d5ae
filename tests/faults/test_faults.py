"""A short part of each attack; docs/faults.md has the figures of the whole."""

from __future__ import annotations

import pytest

from nemo_fiberpo.storage import pickles
from tests.faults.damage import damages
from tests.faults.fuzz import fuzz
from tests.faults.payloads import payloads


@pytest.fixture
def unrestricted():
    yield
    pickles.lift()


def test_no_payload_runs(tmp_path, unrestricted):
    out = payloads(tmp_path, most=2)
    assert not out.faults, str(out)
    assert out.counts["resume, common.pt", "refused"] == 2 and out.counts["export-hf", "refused"] == 4


def test_all_damage_is_named(tmp_path):
    out = damages(tmp_path, seed=1, rounds=1)
    assert not out.faults, str(out)
    assert sum(out.counts.values()) > 300


def test_what_is_made_up_has_a_meaning_or_is_refused_by_name():
    out = fuzz(configs=100, data=200, seed=1)
    assert not out.faults, str(out)
    assert {became for _, became in out.counts} == {"accepted", "refused by name"}
