"""One cluster of two nodes and one warm-started policy for all tests here; they skip where no SLURM can be started."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job
from tests.support.launching import WARM_START, environment, launch


def pytest_terminal_summary(terminalreporter) -> None:
    """What was measured, for the reader: no time decides a test."""
    for passed in terminalreporter.getreports("passed"):
        for name, value in passed.user_properties:
            shown = f"{value:.1f}" if isinstance(value, float) else value
            terminalreporter.write_line(f"measured: {name}: {shown}  ({passed.nodeid.rpartition('::')[2]})")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With a failure, the state of the cluster at that moment: later the job and its nodes are gone."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.when == "call" and report.failed and cluster is not None:
        report.sections.append(("SLURM", cluster.condition()))
    return report


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if not os.environ.get("FIBERPO_SLURM"):
        pytest.skip("needs a SLURM of its own, which `bash tests/slurm/run.sh` installs")
    # A path of few characters: those of SLURM's and munge's sockets are limited
    folder = Path(os.environ["FIBERPO_SLURM"])
    with Cluster(folder, ("n1", "n2")) as running:
        running.environment |= environment() | {
            "TQDM_DISABLE": "1",
            "PYTHON": sys.executable,
            "STRAGGLER_SECONDS": "15",
        }
        yield running


@pytest.fixture(scope="session")
def start(cluster, tmp_path_factory) -> Path:
    """A run directory with the quickstart's data and a policy of two supervised steps."""
    run_dir = tmp_path_factory.mktemp("start")
    launch("warm_start.py", run_dir, *WARM_START)
    return run_dir


@pytest.fixture(scope="session")
def uninterrupted(cluster, start, tmp_path_factory) -> Job:
    """The shipped script on two nodes, from submission to the end."""
    job = Job(cluster, start, tmp_path_factory.mktemp("uninterrupted"))
    job.submit()
    job.wait_for_rows(1)
    job.ends_as("COMPLETED")
    return job
