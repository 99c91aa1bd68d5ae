"""What a manifest covers, and reads of it and of its files that fail or come late."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from nemo_fiberpo.aligner.checkpoint.candidates import choose
from nemo_fiberpo.storage import manifest, reading
from nemo_fiberpo.storage.manifest import Manifest
from tests.support.damage import DAMAGES, make_unreadable, name_of, state_of


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


@pytest.mark.parametrize("number", ["x", -1, 1.5, True, None, [], 2**63])
@pytest.mark.parametrize("key", ["step", "consumed_samples", "ppo_optimization_step"])
def test_the_state_of_a_manifest_is_counts(key, number):
    """Sealed, so that only its values are odd."""
    state = {"step": 1, "consumed_samples": 8, "ppo_optimization_step": 4} | {key: number}
    with pytest.raises(ValueError, match=rf"^manifest\.json: state\.{key}: must be a whole number"):
        manifest.parse(Manifest({}, state).text().encode())


@pytest.mark.parametrize("name", ["/dev/zero", "../run.json", "a/../../b", "a//b", "./a", ".", "", "a/", "nul\0"])
def test_a_manifest_lists_nothing_outside_its_checkpoint(name):
    sealed = Manifest({name: {"size": 0, "sha256": "0" * 64}}, {}).text()
    with pytest.raises(ValueError, match=r"^manifest\.json: files: .* is no path inside the checkpoint"):
        manifest.parse(sealed.encode())


@pytest.mark.parametrize("entry", [None, [], {}, {"size": 1}, {"size": "1", "sha256": ""}, {"size": -1, "sha256": ""}])
def test_an_entry_of_a_manifest_is_a_size_and_a_digest(entry):
    with pytest.raises(ValueError, match=r"^manifest\.json: files\.a: must have size and sha256"):
        manifest.parse(Manifest({"a": entry}, {}).text().encode())


@pytest.mark.parametrize(
    "raw", [b"[" * 100_000, b"[]", b"7", b"null", b'{"format": 1, "state": {}, "files": 7}', b"9" * 5000]
)
def test_what_is_no_manifest_is_damaged(raw):
    with pytest.raises(ValueError, match=r"^manifest\.json: its own SHA-256 differs"):
        manifest.parse(raw)


@pytest.mark.parametrize("name", ["common.pt", manifest.NAME])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_no_regular_file_is_damaged_and_nothing_waits_for_it(checkpoints, name, kind):
    """Opening a FIFO waits for a writer; /dev/zero, listed with its size of 0, has no end."""
    newest = checkpoints / name_of(4)
    files = manifest.read(newest).files
    (newest / name).unlink()
    if kind == "fifo":
        os.mkfifo(newest / name)
    elif kind == "device":
        (newest / name).symlink_to("/dev/zero")
    else:
        (newest / name).mkdir()
    if name != manifest.NAME and kind == "device":
        manifest.write(newest, Manifest(files | {name: files[name] | {"size": 0}}, state_of(4)))
    choice = choose(checkpoints, None)
    assert choice.checkpoint == checkpoints / name_of(2)
    assert choice.lines == [f"{newest.name}: damaged: {name}: is no regular file"]


def test_a_file_longer_than_its_size_is_not_read_further():
    """A file of the kernel has the size 0 and content all the same."""
    version = Path("/proc/version")
    assert version.stat().st_size == 0 and version.read_bytes()
    empty = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    found = manifest.problems(version.parent, Manifest({version.name: empty}, {}))
    assert found == ["version: its SHA-256 differs, 0 bytes"]


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
    monkeypatch.setattr(reading, "WAITS", (0.0, 0.0))
    make_unreadable(checkpoints / name_of(4), name)
    before = sorted(checkpoints.parent.rglob("*"))
    with pytest.raises(OSError, match="Input/output error") as error:
        choose(checkpoints, None)
    assert error.value.errno == errno.EIO and error.value.filename == str(checkpoints / name_of(4) / name)
    assert sorted(checkpoints.parent.rglob("*")) == before


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES, errno.ETIMEDOUT])
def test_a_read_that_fails_briefly_is_retried(checkpoints, number, monkeypatch):
    failures = dict.fromkeys((manifest.NAME, "common.pt", "__0_1.distcp"), 2)
    really_opened = reading.open_listed

    def opened(path: Path):
        if failures.get(path.name, 0):
            failures[path.name] -= 1
            raise OSError(number, os.strerror(number), str(path))
        return really_opened(path)

    monkeypatch.setattr(reading, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(reading, "open_listed", opened)
    choice = choose(checkpoints, None)
    assert choice.checkpoint == checkpoints / name_of(4) and choice.lines == [] and not any(failures.values())


def test_a_file_is_missing_only_if_its_folder_does_not_list_it(tmp_path, monkeypatch):
    """The late view of an NFS client: for a while it says that there is no such file."""
    (tmp_path / "late").write_bytes(b"here")
    really_open, refused = reading.open_regular, []

    def late(path: Path):
        if path.name == "late" and not refused:
            refused.append(path)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return really_open(path)

    monkeypatch.setattr(reading, "open_regular", late)
    assert reading.read_bytes(tmp_path / "late") == b"here" and refused
    assert reading.read_bytes(tmp_path / "missing") is None
    assert reading.read_bytes(tmp_path / "no folder" / "missing") is None
    assert reading.list_directory(tmp_path / "no folder") == []
