"""What a manifest covers, and reads of it and of its files that fail or come late."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from nemo_fiberpo.aligner import manifest, storage
from nemo_fiberpo.aligner.checkpoint_choice import choose
from nemo_fiberpo.aligner.manifest import Manifest
from tests.aligner.damage import DAMAGES, make_unreadable, name_of


def test_every_bit_of_a_manifest_is_covered_by_its_own_digest(checkpoints):
    raw = (checkpoints / name_of(2) / manifest.NAME).read_bytes()
    assert manifest.parse(raw).state["step"] == 2
    for bit in range(8 * len(raw)):
        content = bytearray(raw)
        content[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="manifest.json"):
            manifest.parse(bytes(content))
    for length in range(len(raw)):
        with pytest.raises(ValueError, match="manifest.json"):
            manifest.parse(raw[:length])


def test_a_manifest_of_another_format_is_refused_by_number(checkpoints):
    values = json.loads((checkpoints / name_of(2) / manifest.NAME).read_text())
    with pytest.raises(ValueError, match=r"format 9, this version reads 1"):
        manifest.parse(json.dumps(values | {"format": 9}).encode())


@pytest.mark.parametrize("damage", [None, *DAMAGES])
@pytest.mark.parametrize("file", ["policy.nemo", "policy.nemo.manifest.json"])
def test_a_sealed_file_holds_only_while_neither_it_nor_its_seal_changes(tmp_path, file, damage):
    state = {"step": 4, "consumed_samples": 32}
    policy, seal = tmp_path / "policy.nemo", tmp_path / "policy.nemo.manifest.json"
    policy.write_bytes(bytes(range(200)))
    seal.write_text(Manifest(manifest.entries(tmp_path, [policy.name]), state).text())
    if damage is not None:
        damage(tmp_path / file)
    assert manifest.holds(seal, state) == (damage is None)
    assert not manifest.holds(seal, state | {"step": 5})


@pytest.mark.parametrize("name", ["common.pt", "__1_0.distcp", manifest.NAME])
def test_a_file_that_cannot_be_read_is_an_error_and_no_reason_to_go_back(checkpoints, name, monkeypatch):
    monkeypatch.setattr(storage, "WAITS", (0.0, 0.0))
    make_unreadable(checkpoints / name_of(4), name)
    before = sorted(checkpoints.parent.rglob("*"))
    with pytest.raises(OSError, match="Input/output error") as error:
        choose(checkpoints, None)
    assert error.value.errno == errno.EIO and error.value.filename == str(checkpoints / name_of(4) / name)
    assert sorted(checkpoints.parent.rglob("*")) == before


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES, errno.ETIMEDOUT])
def test_a_read_that_fails_for_a_moment_is_made_again(checkpoints, number, monkeypatch):
    failures = dict.fromkeys((manifest.NAME, "common.pt", "__0_1.distcp"), 2)
    really_opened = storage.opened

    def opened(path: Path):
        if failures.get(path.name, 0):
            failures[path.name] -= 1
            raise OSError(number, os.strerror(number), str(path))
        return really_opened(path)

    monkeypatch.setattr(storage, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(storage, "opened", opened)
    choice = choose(checkpoints, None)
    assert choice.checkpoint == checkpoints / name_of(4) and choice.lines == [] and not any(failures.values())


def test_a_file_is_missing_only_if_its_folder_does_not_list_it(tmp_path, monkeypatch):
    """The late view of an NFS client: for a while it says that there is no such file."""
    (tmp_path / "late").write_bytes(b"here")
    really_open, refused = Path.open, []

    def late(path: Path, *mode: str):
        if path.name == "late" and not refused:
            refused.append(path)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return really_open(path, *mode)

    monkeypatch.setattr(Path, "open", late)
    assert storage.content(tmp_path / "late") == b"here" and refused
    assert storage.content(tmp_path / "missing") is None
    assert storage.content(tmp_path / "no folder" / "missing") is None
    assert storage.entries(tmp_path / "no folder") == []
