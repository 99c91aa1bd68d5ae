"""`fiberpo plan` in the process of the test."""

from __future__ import annotations

import pytest

from nemo_fiberpo.cli import main
from tests.plan.configs import ROOT, Run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`fiberpo plan` from the repository's folder: exit status, stdout, stderr."""
    monkeypatch.chdir(ROOT)

    def of(*arguments: str) -> tuple[int, str, str]:
        status = main(["plan", *arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return of
