"""Run directories that several files begin from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.aligner.launching import DENSE, TWO_EPOCHS, WARM_START, fresh, launch


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """A run directory with the quickstart's data and a policy of two supervised steps."""
    run_dir = tmp_path_factory.mktemp("start")
    launch("warm_start.py", run_dir, *WARM_START)
    assert (run_dir / "warm_start.nemo").exists()
    return run_dir


@pytest.fixture(scope="session")
def dense_start(tmp_path_factory) -> Path:
    """The same with a dense policy, made on two tensor-parallel ranks."""
    run_dir = tmp_path_factory.mktemp("dense")
    launch("warm_start.py", run_dir, *WARM_START, *DENSE, "model.tensor_model_parallel_size=2")
    return run_dir


@pytest.fixture(scope="session")
def uninterrupted(start, tmp_path_factory) -> Path:
    """A run of four RL steps on two ranks that nothing interrupted."""
    run_dir = fresh(start, tmp_path_factory.mktemp("uninterrupted"), "run")
    launch("train_gpt_fiberpo.py", run_dir, *TWO_EPOCHS)
    return run_dir
