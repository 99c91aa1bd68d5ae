"""Whole, damaged and unfinished checkpoints: what is noticed, and which one a run goes on from."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_fiberpo.aligner.checkpoint import candidates
from nemo_fiberpo.aligner.checkpoint.candidates import DAMAGED, choose, clear_away
from nemo_fiberpo.storage import manifest
from nemo_fiberpo.storage.manifest import Manifest
from tests.support import distributed
from tests.support.damage import DAMAGES, FILES, flip_middle, name_of, save, state_of, truncate
from tests.support.launching import ROOT


def test_the_newest_whole_checkpoint_is_chosen_with_the_state_of_its_trainer(checkpoints):
    choice = choose(checkpoints, None)
    assert choice.checkpoint == checkpoints / name_of(4) and choice.lines == []
    assert choice.manifest.state == state_of(4)
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


def test_an_unfinished_checkpoint_is_named_and_removed(checkpoints):
    path = save(checkpoints, 6, finished=False)
    candidates.marker_of(path).touch()
    choice = choose(checkpoints, None)
    assert choice.checkpoint == checkpoints / name_of(4)
    assert path.exists(), "choosing changes nothing"
    assert clear_away(choice) == [f"{path.name}: unfinished: manifest.json: missing", f"{path.name}: removed"]
    assert not path.exists() and not candidates.marker_of(path).exists()


def test_a_half_removed_older_checkpoint_is_removed_to_its_end(checkpoints):
    old = checkpoints / name_of(2)
    candidates.marker_of(old).touch()
    (old / "common.pt").unlink()
    clear_away(choose(checkpoints, None))
    assert [path.name for path in checkpoints.iterdir()] == [name_of(4)]


def test_a_whole_checkpoint_whose_marker_was_left_is_used_and_kept(checkpoints):
    newest = checkpoints / name_of(4)
    candidates.marker_of(newest).touch()
    choice = choose(checkpoints, None)
    clear_away(choice)
    # NeMo removes what has a marker
    assert choice.checkpoint == newest and newest.exists() and not candidates.marker_of(newest).exists()


def test_a_checkpoint_that_was_once_whole_is_never_deleted_unless_a_newer_one_is_whole(checkpoints):
    """It has a manifest and a marker: killed between the two, and then read badly."""
    newest = checkpoints / name_of(4)
    candidates.marker_of(newest).touch()
    truncate(newest / "common.pt")
    choice = choose(checkpoints, None)
    clear_away(choice)
    assert choice.checkpoint == checkpoints / name_of(2) and choice.unfinished == []
    assert (checkpoints.parent / DAMAGED / newest.name / "common.pt").exists()
    assert not candidates.marker_of(newest).exists()


def test_a_newer_checkpoint_that_is_not_there_any_more_is_named(checkpoints):
    choice = choose(checkpoints, {"step": 6, "name": name_of(6)})
    assert choice.checkpoint == checkpoints / name_of(4)
    assert choice.lines == [f"{name_of(6)}: missing, although it was whole"]
    assert choose(checkpoints, {"step": 2, "name": name_of(1)}).lines == []


def test_what_is_damaged_stays_on_the_file_system_of_the_checkpoints(checkpoints, tmp_path):
    real = tmp_path / "scratch" / "checkpoints"
    real.parent.mkdir()
    checkpoints.rename(real)
    checkpoints.symlink_to(real)
    truncate(checkpoints / name_of(4) / "common.pt")
    clear_away(choose(checkpoints, None))
    assert (real.parent / DAMAGED / name_of(4)).is_dir()


def test_a_run_killed_in_its_first_save_starts_over(tmp_path):
    path = save(tmp_path, 2, finished=False)
    candidates.marker_of(path).touch()
    choice = choose(tmp_path, None)
    assert choice.checkpoint is None
    clear_away(choice)
    assert list(tmp_path.iterdir()) == []
    assert choose(tmp_path / "none yet", None).checkpoint is None


@pytest.mark.parametrize("recorded", [None, {"step": 4, "name": name_of(4)}])
def test_a_run_never_starts_over_silently_if_a_checkpoint_was_whole(checkpoints, recorded):
    for path in checkpoints.iterdir():
        truncate(path / "common.pt")
    before = sorted(checkpoints.parent.rglob("*"))
    with pytest.raises(ValueError) as error:
        choose(checkpoints, recorded)
    assert f"{name_of(4)}: damaged: common.pt: 303 bytes instead of 304" in str(error.value)
    assert name_of(2) in str(error.value) and "run_dir" in str(error.value)
    assert sorted(checkpoints.parent.rglob("*")) == before


def test_a_run_whose_checkpoints_are_missing_names_the_last_one(tmp_path):
    with pytest.raises(ValueError, match=r"there is none\); the newest whole one was step-4, of RL step 4"):
        choose(tmp_path, {"step": 4, "name": "step-4"})


def test_a_checkpoint_that_has_neither_manifest_nor_marker_is_not_trusted(tmp_path):
    path = save(tmp_path, 2, finished=False)
    with pytest.raises(ValueError, match="no checkpoint is whole .*manifest.json: missing"):
        choose(tmp_path, None)
    assert path.exists()


def test_the_last_copy_replaces_its_damaged_twin(checkpoints):
    copy = save(checkpoints, 4, last=True)
    assert choose(checkpoints, None).checkpoint == checkpoints / name_of(4)
    flip_middle(checkpoints / name_of(4) / "__0_1.distcp")
    assert choose(checkpoints, None).checkpoint == copy


def test_two_last_copies_of_a_killed_run_are_no_riddle(checkpoints):
    save(checkpoints, 4, last=True)
    newest = save(checkpoints, 5, last=True)
    assert choose(checkpoints, None).checkpoint == newest


def test_a_checkpoint_of_another_run_is_put_aside(checkpoints):
    foreign, own = save(checkpoints, 6, run="b"), save(checkpoints, 5, run="a")
    choice = choose(checkpoints, None, run="a")
    assert choice.checkpoint == own and choice.damaged == [foreign]
    assert choice.lines == [
        f"{foreign.name}: damaged: manifest.json: run: belongs to another run, 'b'; this one is 'a'"
    ]
    assert choose(checkpoints, None).checkpoint == foreign, "a record that has no id yet"
    foreign.rename(checkpoints.parent / "aside")
    own.rename(checkpoints.parent / "aside2")
    assert choose(checkpoints, None, run="a").checkpoint == checkpoints / name_of(4), "of an earlier version"


def test_a_manifest_without_the_trainers_state_is_damaged(checkpoints):
    newest = checkpoints / name_of(4)
    files = manifest.read(newest).files
    manifest.write(newest, Manifest(files, {"step": 4, "consumed_samples": 32}))
    choice = choose(checkpoints, None)
    assert choice.checkpoint == checkpoints / name_of(2)
    assert choice.lines == [f"{newest.name}: damaged: manifest.json: state: ppo_optimization_step is missing"]


def test_links_are_not_taken_for_checkpoints(checkpoints):
    (checkpoints / name_of(9, last=True)).symlink_to(name_of(4))
    (checkpoints / name_of(10, last=True)).symlink_to("gone")
    assert choose(checkpoints, None).checkpoint == checkpoints / name_of(4)


def test_numbers_in_the_path_of_a_run_say_nothing_about_its_checkpoints(tmp_path):
    directory = tmp_path / "lr_step=9-step=7"
    save(directory, 3)
    choice = choose(directory, None)
    assert candidates.step_of(choice.checkpoint) == choice.manifest.state["step"] == 3


def test_a_second_damaged_checkpoint_of_the_same_name_is_kept_too(checkpoints):
    for _ in range(2):
        truncate(save(checkpoints, 4) / "common.pt")
        clear_away(choose(checkpoints, None))
    aside = sorted(path.name for path in (checkpoints.parent / DAMAGED).iterdir())
    assert aside == [name_of(4), name_of(4) + ".1"]


def adopting(rank: int, world: int, directory: str) -> tuple:
    """What a rank counts as the best checkpoints, where only the first sees the directory as it is."""
    from nemo_fiberpo.aligner.checkpoint.callback import WholeCheckpoints

    def broadcast(value):
        held = [value]
        torch.distributed.broadcast_object_list(held, src=0)
        return held[0]

    callback = WholeCheckpoints(dirpath=directory, monitor="step", mode="max", save_top_k=2, filename="fiberpo")
    if rank:
        really = candidates.checkpoints_in
        candidates.checkpoints_in = lambda directory: really(directory)[1:]
        candidates.step_of = lambda checkpoint: -1
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
    """Files that we read are JSON, JSONL, YAML, or tensors only. Megatron unpickles what `pickles.py` lets it."""
    loaders = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {"torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "pd.read_pickle"}
    found = []
    for folder in ("nemo_fiberpo", "examples", "benchmarks", "conf"):
        for path in sorted({*(ROOT / folder).rglob("*.py")} - {ROOT / "nemo_fiberpo" / "storage" / "pickles.py"}):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if any(name.split(".")[0] in loaders for name in names):
                    found.append(f"{path}:{node.lineno}")
                if isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
                    if any(ast.unparse(keyword) == "weights_only=True" for keyword in node.keywords):
                        continue
                    found.append(f"{path}:{node.lineno}")
    assert not found
