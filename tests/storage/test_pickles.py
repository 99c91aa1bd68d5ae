"""Checkpoints that would run code: nothing of them does, and Megatron's own load as before."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from omegaconf import OmegaConf

from nemo_fiberpo.conversion import files, gpt
from nemo_fiberpo.storage import manifest, pickles
from tests.support.hf_models import make


@pytest.fixture(autouse=True)
def restricted():
    pickles.restrict()
    yield
    pickles.lift()


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    make("llama").save_pretrained(tmp_path / "hf")
    target = tmp_path / "policy.nemo"
    files.import_huggingface(tmp_path / "hf", target)
    (target / manifest.NAME).unlink()
    return target


def export(policy: Path) -> None:
    files.export_huggingface(policy, policy.parent / "back")


def test_what_megatron_writes_is_loaded(policy: Path):
    export(policy)


def test_common_state_runs_nothing(policy: Path, tmp_path: Path):
    torch.save({"a": Touch(tmp_path / "ran")}, policy / "model_weights" / "common.pt")
    with pytest.raises(ValueError, match=r"policy\.nemo: a pickle in it names posix\.system, which is not loaded"):
        export(policy)
    assert not (tmp_path / "ran").exists()


def test_metadata_runs_nothing(policy: Path, tmp_path: Path):
    (policy / "model_weights" / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"policy\.nemo: a pickle in it names posix\.system, which is not loaded"):
        export(policy)
    assert not (tmp_path / "ran").exists()


def test_byte_items_of_shards_run_nothing(policy: Path, tmp_path: Path):
    """`_extra_state` of a layer, which Transformer Engine writes and Megatron's layers leave empty."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    folder = tmp_path / "weights"
    folder.mkdir()
    item = ShardedObject("x", Touch(tmp_path / "ran"), (1,), (0,))
    with gpt.single_process_megatron():
        dist_checkpointing.save({"x": item}, str(folder))
        with pytest.raises(ValueError, match="a: a pickle in it names posix.system"), pickles.named("a"):
            dist_checkpointing.load({"x": ShardedObject("x", None, (1,), (0,))}, str(folder))
    assert not (tmp_path / "ran").exists()


def test_torch_load_is_restricted_whatever_its_arguments(tmp_path: Path):
    file = io.BytesIO()
    torch.save({"weight": torch.ones(2), "bad": Touch(tmp_path / "ran")}, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    code = f"import torch; torch.load({str(tmp_path / 'bad.pt')!r}, weights_only=False)"
    (tmp_path / "bad.pt").write_bytes(file.getvalue())
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0, (
        "in a process started here"
    )
    assert not (tmp_path / "ran").exists()


def test_a_codec_that_unpickles_is_refused(tmp_path: Path):
    from numcodecs import Pickle

    with pytest.raises(pickle.UnpicklingError):
        Pickle().decode(pickle.dumps(numpy.array([Touch(tmp_path / "ran")], dtype=object)))
    assert not (tmp_path / "ran").exists()


def test_configurations_and_counters_of_a_run_are_loaded():
    """As Lightning's part of a checkpoint has them."""
    config = OmegaConf.create({"a": [1, 2.0, "x", None, True], "b": {"c": "${a}"}})
    state = {"hyper_parameters": config, "epoch": 1, "best": torch.tensor(3), "param_groups": [{"lr": 1e-6}]}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    found = torch.load(file, weights_only=False)
    assert found["hyper_parameters"] == config and found["param_groups"] == state["param_groups"]


def test_it_can_be_lifted(tmp_path: Path):
    pickles.lift()
    file = io.BytesIO()
    torch.save(Touch(tmp_path / "ran"), file)
    file.seek(0)
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()
