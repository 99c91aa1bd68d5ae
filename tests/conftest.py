"""Run directories that several files begin from, made once also where pytest runs several processes (`-n`), and a
directory of checkpoints."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import forked
from tests.support.damage import save
from tests.support.launching import DENSE, TWO_EPOCHS, WARM_START, fresh, launch


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The directory of that name of this test session, filled by the first process that asks; the others wait."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    made, run_dir = base / f"{name}-made", base / name
    with (base / f"{name}-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            assert not run_dir.exists(), f"{name}: another process failed to make it"
            make(run_dir)
            made.touch()
    return run_dir


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """A run directory with the quickstart's data and a policy of two supervised steps."""

    def make(run_dir: Path) -> None:
        run_dir.mkdir()
        launch("warm_start.py", run_dir, *WARM_START)
        assert (run_dir / "warm_start.nemo").exists()

    return once(tmp_path_factory, "start", make)


@pytest.fixture(scope="session")
def dense_start(tmp_path_factory) -> Path:
    """The same with a dense policy, made on two tensor-parallel ranks."""

    def make(run_dir: Path) -> None:
        run_dir.mkdir()
        forked.launch("warm_start.py", run_dir, *WARM_START, *DENSE, "model.tensor_model_parallel_size=2")

    return once(tmp_path_factory, "dense", make)


@pytest.fixture(scope="session")
def uninterrupted(start, tmp_path_factory) -> Path:
    """A run of four RL steps on two ranks that nothing interrupted."""

    def make(run_dir: Path) -> None:
        forked.launch("train_gpt_fiberpo.py", fresh(start, run_dir.parent, run_dir.name), *TWO_EPOCHS)

    return once(tmp_path_factory, "uninterrupted", make)


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    """RL steps 2 and 4, whole."""
    directory = tmp_path / "nemo" / "checkpoints"
    save(directory, 2)
    save(directory, 4)
    return directory


@pytest.fixture
def find_bad_graders(monkeypatch) -> None:
    """bad_graders.py can be imported by its name, as a user's own graders can."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "support"))
