"""Whole, damaged and unfinished checkpoints: what is noticed, and which one a run goes on from."""

from __future__ import annotations

import ast
import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_fiberpo.aligner import manifest, storage
from nemo_fiberpo.aligner.manifest import DAMAGED, Manifest, choose, clear_away
from tests import distributed
from tests.aligner.launching import ROOT

# The files of one of Megatron's checkpoints on two ranks, and one of an older format that has folders.
FILES = [".metadata", "__0_0.distcp", "__0_1.distcp", "__1_0.distcp", "common.pt", "metadata.json", "model/shard_0.pt"]


def name_of(step: int, last: bool = False) -> str:
    return f"fiberpo-step={step}-consumed_samples={8 * step}-epoch=0{'-last' if last else ''}"


def save(directory: Path, step: int, last: bool = False, finished: bool = True) -> Path:
    """A checkpoint of a few files with a content of its own."""
    path = directory / name_of(step, last)
    for number, name in enumerate(FILES):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(bytes((step * 37 + number * 11 + at) % 256 for at in range(300 + number)))
    if finished:
        found = manifest.entries(path, manifest.files_of(path))
        manifest.write(path, Manifest(found, {"step": step, "consumed_samples": 8 * step}))
    return path


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    """RL steps 2 and 4, whole."""
    directory = tmp_path / "nemo" / "checkpoints"
    save(directory, 2)
    save(directory, 4)
    return directory


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_first(path: Path) -> None:
    flip(path, 0)


def flip_last(path: Path) -> None:
    flip(path, 8 * path.stat().st_size - 1)


def flip_middle(path: Path) -> None:
    flip(path, 4 * path.stat().st_size)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


DAMAGES = [truncate, empty, flip_first, flip_middle, flip_last, Path.unlink]


def test_the_newest_whole_checkpoint_is_chosen_with_the_state_of_its_trainer(checkpoints):
    choice = choose(checkpoints, None)
    assert choice.checkpoint == checkpoints / name_of(4) and choice.lines == []
    assert choice.manifest.state == {"step": 4, "consumed_samples": 32}
    assert sorted(choice.manifest.files) == sorted(FILES)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", [*FILES, manifest.NAME])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(checkpoints, name, damage):
    damaged = checkpoints / name_of(4)
    damage(damaged / name)
    choice = choose(checkpoints, {"step": 4, "name": damaged.name})
    assert choice.checkpoint == checkpoints / name_of(2)
    assert len(choice.lines) == 1 and choice.lines[0].startswith(f"{damaged.name}: damaged: {name}: ")
    said = clear_away(choice)
    aside = checkpoints.parent / DAMAGED / damaged.name
    assert not damaged.exists() and aside.is_dir() and str(aside) in said[-1]
    assert len(manifest.files_of(aside)) >= len(FILES) - 1, "nothing is deleted"


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


def test_an_unfinished_checkpoint_is_named_and_removed(checkpoints):
    path = save(checkpoints, 6, finished=False)
    manifest.marker_of(path).touch()
    choice = choose(checkpoints, None)
    assert choice.checkpoint == checkpoints / name_of(4)
    assert path.exists(), "choosing changes nothing"
    assert clear_away(choice) == [f"{path.name}: unfinished: manifest.json: missing", f"{path.name}: removed"]
    assert not path.exists() and not manifest.marker_of(path).exists()


def test_a_half_removed_older_checkpoint_is_removed_to_its_end(checkpoints):
    old = checkpoints / name_of(2)
    manifest.marker_of(old).touch()
    (old / "common.pt").unlink()
    clear_away(choose(checkpoints, None))
    assert [path.name for path in checkpoints.iterdir()] == [name_of(4)]


def test_a_whole_checkpoint_whose_marker_was_left_is_used_and_kept(checkpoints):
    newest = checkpoints / name_of(4)
    manifest.marker_of(newest).touch()
    choice = choose(checkpoints, None)
    clear_away(choice)
    # NeMo removes what has a marker
    assert choice.checkpoint == newest and newest.exists() and not manifest.marker_of(newest).exists()


def test_a_checkpoint_that_was_once_whole_is_never_deleted_unless_a_newer_one_is_whole(checkpoints):
    """It has a manifest and a marker: killed between the two, and then read badly."""
    newest = checkpoints / name_of(4)
    manifest.marker_of(newest).touch()
    truncate(newest / "common.pt")
    choice = choose(checkpoints, None)
    clear_away(choice)
    assert choice.checkpoint == checkpoints / name_of(2) and choice.unfinished == []
    assert (checkpoints.parent / DAMAGED / newest.name / "common.pt").exists()
    assert not manifest.marker_of(newest).exists()


def test_a_newer_checkpoint_that_is_not_there_any_more_is_named(checkpoints):
    choice = choose(checkpoints, {"step": 6, "name": name_of(6)})
    assert choice.checkpoint == checkpoints / name_of(4)
    assert choice.lines == [f"{name_of(6)}: gone, although it was whole"]
    assert choose(checkpoints, {"step": 2, "name": name_of(1)}).lines == []


def test_what_is_damaged_stays_on_the_file_system_of_the_checkpoints(checkpoints, tmp_path):
    real = tmp_path / "scratch" / "checkpoints"
    real.parent.mkdir()
    checkpoints.rename(real)
    checkpoints.symlink_to(real)
    truncate(checkpoints / name_of(4) / "common.pt")
    clear_away(choose(checkpoints, None))
    assert (real.parent / DAMAGED / name_of(4)).is_dir()


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


def test_a_run_that_was_killed_in_its_first_save_begins_again(tmp_path):
    path = save(tmp_path, 2, finished=False)
    manifest.marker_of(path).touch()
    choice = choose(tmp_path, None)
    assert choice.checkpoint is None
    clear_away(choice)
    assert list(tmp_path.iterdir()) == []
    assert choose(tmp_path / "none yet", None).checkpoint is None


@pytest.mark.parametrize("recorded", [None, {"step": 4, "name": name_of(4)}])
def test_a_run_never_begins_again_silently_where_a_checkpoint_was_whole(checkpoints, recorded):
    for path in checkpoints.iterdir():
        truncate(path / "common.pt")
    before = sorted(checkpoints.parent.rglob("*"))
    with pytest.raises(ValueError) as error:
        choose(checkpoints, recorded)
    assert f"{name_of(4)}: damaged: common.pt: 303 bytes instead of 304" in str(error.value)
    assert name_of(2) in str(error.value) and "run_dir" in str(error.value)
    assert sorted(checkpoints.parent.rglob("*")) == before


def test_a_run_whose_checkpoints_are_gone_says_which_it_had(tmp_path):
    with pytest.raises(ValueError, match=r"there is none\); the newest that was whole is step-4, of RL step 4"):
        choose(tmp_path, {"step": 4, "name": "step-4"})


def test_a_checkpoint_that_has_neither_manifest_nor_marker_is_not_trusted(tmp_path):
    path = save(tmp_path, 2, finished=False)
    with pytest.raises(ValueError, match="no checkpoint is whole .*manifest.json: missing"):
        choose(tmp_path, None)
    assert path.exists()


def test_the_last_copy_of_nemo_stands_in_for_its_damaged_twin(checkpoints):
    copy = save(checkpoints, 4, last=True)
    assert choose(checkpoints, None).checkpoint == checkpoints / name_of(4)
    flip_middle(checkpoints / name_of(4) / "__0_1.distcp")
    assert choose(checkpoints, None).checkpoint == copy


def test_two_last_copies_of_a_killed_run_are_no_riddle(checkpoints):
    save(checkpoints, 4, last=True)
    newest = save(checkpoints, 5, last=True)
    assert choose(checkpoints, None).checkpoint == newest


def test_links_are_not_taken_for_checkpoints(checkpoints):
    (checkpoints / name_of(9, last=True)).symlink_to(name_of(4))
    (checkpoints / name_of(10, last=True)).symlink_to("gone")
    assert choose(checkpoints, None).checkpoint == checkpoints / name_of(4)


def test_numbers_in_the_path_of_a_run_say_nothing_about_its_checkpoints(tmp_path):
    directory = tmp_path / "lr_step=9-step=7"
    save(directory, 3)
    choice = choose(directory, None)
    assert manifest.step_of(choice.checkpoint) == choice.manifest.state["step"] == 3


def test_a_second_damaged_checkpoint_of_the_same_name_is_kept_too(checkpoints):
    for _ in range(2):
        truncate(save(checkpoints, 4) / "common.pt")
        clear_away(choose(checkpoints, None))
    aside = sorted(path.name for path in (checkpoints.parent / DAMAGED).iterdir())
    assert aside == [name_of(4), name_of(4) + ".1"]


UNREADABLE = Path("/proc/self/mem")  # every read at its beginning is EIO


def make_unreadable(checkpoint: Path, name: str) -> None:
    """A file of a checkpoint that is there, of the size in the manifest, and whose every read fails."""
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to(UNREADABLE)
    if name != manifest.NAME:
        found = manifest.read(checkpoint)
        files = {**found.files, name: {**found.files[name], "size": UNREADABLE.stat().st_size}}
        manifest.write(checkpoint, Manifest(files, found.state))


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


def adopting(rank: int, world: int, directory: str) -> tuple:
    """What a rank counts as the best checkpoints, where only the first sees the directory as it is."""
    from nemo_fiberpo.aligner.checkpoints import WholeCheckpoints

    def broadcast(value):
        held = [value]
        torch.distributed.broadcast_object_list(held, src=0)
        return held[0]

    callback = WholeCheckpoints(dirpath=directory, monitor="step", mode="max", save_top_k=2, filename="fiberpo")
    if rank:
        really = manifest.checkpoints_in
        manifest.checkpoints_in = lambda directory: really(directory)[1:]
        manifest.step_of = lambda checkpoint: -1
    trainer = SimpleNamespace(is_global_zero=rank == 0, strategy=SimpleNamespace(broadcast=broadcast))
    callback.adopt(trainer)
    best = {Path(path).stem: int(step) for path, step in callback.best_k_models.items()}
    return best, Path(callback.kth_best_model_path).stem, Path(callback.best_model_path).stem, int(callback.kth_value)


@pytest.mark.slow
@pytest.mark.distributed
def test_every_rank_counts_the_checkpoints_that_the_first_one_sees(checkpoints):
    expected = {name_of(4): 4, name_of(2): 2}, name_of(2), name_of(4), 2
    assert distributed.run(adopting, 2, str(checkpoints), timeout=180.0) == [expected, expected]


def test_nothing_of_ours_unpickles():
    """Files that we read are JSON, JSONL or YAML. What Megatron loads of a checkpoint is verified before."""
    loaders = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {"torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "pd.read_pickle"}
    found = []
    for folder in ("nemo_fiberpo", "examples", "benchmarks", "conf"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if any(name.split(".")[0] in loaders for name in names):
                    found.append(f"{path}:{node.lineno}")
                if isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
                    found.append(f"{path}:{node.lineno}")
    assert not found
