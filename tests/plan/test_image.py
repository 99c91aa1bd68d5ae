"""The check of the container that the Dockerfile's gpu target stands on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests.plan.configs import ROOT


def check_image() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_image", ROOT / "requirements" / "check_image.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VERSIONS = {
    "nemo_toolkit": "2.2.0",
    "nemo_aligner": "0.7.0rc0",
    "megatron_core": "0.11.0",
    "transformer_engine": "2.1.0+abc",
    "apex": "0.1",
    "torch": "2.7.0a0",
    "hydra-core": "1.3.2",
}


def problems_of(versions: dict[str, str]) -> list[str]:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    return check_image().problems(version)


def test_the_versions_of_release_25_02_belong_together():
    assert problems_of(VERSIONS) == []


def test_another_release_and_a_missing_package_are_named():
    changed = {name: version for name, version in VERSIONS.items() if name != "apex"} | {"megatron_core": "0.12.0"}
    assert problems_of(changed) == [
        "megatron_core: is 0.12.0 in this image, but 0.11 is needed",
        "apex: is not in this image",
    ]
    # 0.1 is not the beginning of 0.11.
    assert len(problems_of(VERSIONS | {"nemo_toolkit": "2.20.0"})) == 1


IN_IMAGE = {
    *("antlr4-python3-runtime", "matplotlib", "numpy", "pytz", "pyyaml", "rich", "setuptools", "six", "sympy"),
    "tabulate",
}
"""Of what graders need: packages that NeMo needs too."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_image_gets_everything_that_graders_need_and_nothing_that_it_has():
    found = re.search(r"for name in (.*?); do", (ROOT / "Dockerfile").read_text(), re.DOTALL)
    assert found is not None
    added = {normal(name) for name in found[1].replace("\\", " ").split()}
    pinned = {line.split("==")[0] for line in (ROOT / "requirements" / "cpu.lock").read_text().splitlines()}
    assert added <= {normal(name) for name in pinned} and not added & IN_IMAGE
    for name in added:
        for needed in importlib.metadata.requires(name) or ():
            if "extra ==" not in needed:
                assert normal(re.split(r"[<>=!~; \[]", needed)[0]) in added | IN_IMAGE, f"{name} needs {needed}"


TARGETS = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]


def test_neither_target_runs_as_root():
    for target in TARGETS:
        assert re.findall(r"^USER (.*)$", target, re.MULTILINE)[-1] == "$UID", target


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("target", TARGETS, ids=["cpu", "gpu"])
def test_both_targets_make_their_user_alike_and_refuse_root(target: str, shell: str, tmp_path: Path):
    """With stand-ins for the commands that write."""
    found = re.search(r"^RUN (if .*\n(?:    .*\n)+)", target, re.MULTILINE)
    assert found is not None and "ARG UID\nARG USER_ID=$UID\n" in target
    for name in ("useradd", "install"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$(basename "$0")" "$@"\n')
        (tmp_path / name).chmod(0o755)

    def made(user: str) -> subprocess.CompletedProcess[str]:
        given = {"USER_ID": user, "PATH": f"{tmp_path}:/usr/bin:/bin"}
        return subprocess.run([shell, "-c", found[1]], env=given, text=True, capture_output=True, timeout=60)

    root, other = made("0"), made("1234")
    assert root.returncode == 1 and root.stdout == "" and root.stderr.startswith("error: UID: 0 is root")
    said = other.stdout.splitlines()
    assert other.returncode == 0 and said[0] == "useradd --create-home --non-unique --uid 1234 fiberpo"
    assert said[1].startswith("install -d -o fiberpo -g fiberpo ") and len(said) == 2
