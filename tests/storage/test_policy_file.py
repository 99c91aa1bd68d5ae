"""A `.nemo` before it is loaded: whole by its manifest, plain files, and a configuration that runs no code."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_fiberpo.storage import manifest, policy_file
from nemo_fiberpo.storage.manifest import Manifest
from tests.support.damage import DAMAGES

CONFIG = {
    "target": "nemo_fiberpo.aligner.actor.FiberPOActor",
    "nemo_version": "2.2.1",
    "num_layers": 2,
    "tokenizer": {"library": "huggingface", "type": "gpt2", "trust_remote_code": False},
    "optim": {"name": "mcore_distributed_optim", "sched": {"name": "CosineAnnealing"}},
}
FILES = ["model_config.yaml", "model_weights/__0_0.distcp", "model_weights/.metadata", "model_weights/common.pt"]


def write(folder: Path, config: object = CONFIG) -> Path:
    for number, name in enumerate(FILES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes((number + at) % 256 for at in range(300)))
    (folder / FILES[0]).write_text(config if isinstance(config, str) else OmegaConf.to_yaml(OmegaConf.create(config)))
    return folder


def seal(policy: Path) -> Path:
    """With a manifest, as an import or a run writes it."""
    if policy.is_dir():
        manifest.write(policy, Manifest(manifest.entries(policy, manifest.files_of(policy)), {}))
    else:
        found = Manifest(manifest.entries(policy.parent, [policy.name]), {"step": 4})
        manifest.write_atomically(policy_file.seal_of(policy), found.text())
    return policy


def packed(folder: Path, mode: str = "w:") -> Path:
    policy = folder.with_name("packed.nemo")
    with tarfile.open(policy, mode) as archive:
        archive.add(folder, arcname=".")
    return policy


def refused(policy: Path) -> str:
    with pytest.raises(ValueError) as error:
        policy_file.check(policy)
    assert str(error.value).startswith(str(policy)), error.value
    return str(error.value)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", [*FILES, manifest.NAME])
def test_a_folder_matches_its_manifest(tmp_path, name, damage):
    policy = seal(write(tmp_path / "p.nemo"))
    assert policy_file.check(policy) == f"policy {policy}: whole by its manifest"
    damage(policy / name)
    if damage is Path.unlink and name == manifest.NAME:
        assert "unverified" in policy_file.check(policy)
    else:
        found = refused(policy)
        assert (
            f"damaged: {name}: " in found and f"remove {policy / manifest.NAME}, if it was changed on purpose" in found
        )


@pytest.mark.parametrize("damage", DAMAGES[:-1], ids=lambda damage: damage.__name__)
def test_a_file_matches_the_manifest_beside_it(tmp_path, damage):
    policy = packed(write(tmp_path / "p.nemo"))
    assert policy_file.check(policy) == f"policy {policy}: unverified, there is no packed.nemo.manifest.json"
    seal(policy)
    assert policy_file.check(policy) == f"policy {policy}: whole by its manifest"
    moved = policy.rename(tmp_path / "moved.nemo")
    policy_file.seal_of(policy).rename(policy_file.seal_of(moved))
    assert policy_file.check(moved) == f"policy {moved}: whole by its manifest"
    damage(moved)
    assert "damaged: moved.nemo: " in refused(moved)


def test_what_is_added_to_a_sealed_folder_is_refused(tmp_path):
    policy = seal(write(tmp_path / "p.nemo"))
    (policy / "model_weights" / "__9_0.distcp").write_bytes(b"x")
    assert "model_weights/__9_0.distcp is not in the manifest" in refused(policy)


@pytest.mark.parametrize("where", ["folder", "file"])
@pytest.mark.parametrize("name", ["model_weights.ckpt", "mp_rank_00/model_weights.ckpt"])
def test_pickled_weights_are_refused_beside_whole_ones_too(tmp_path, name, where):
    policy = write(tmp_path / "p.nemo")
    (policy / name).parent.mkdir(exist_ok=True)
    (policy / name).write_bytes(b"")
    assert f"{name} is a pickle of weights, which is not loaded" in refused(
        policy if where == "folder" else packed(policy)
    )


def test_a_checkpoint_of_nemo_2_is_refused(tmp_path):
    policy = write(tmp_path / "p")
    (policy / "context").mkdir()
    (policy / "context" / "io.json").write_text("{}")
    assert "is a checkpoint of NeMo 2, whose context/io.json names functions to call" in refused(policy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer": {"trust_remote_code": True}}, "tokenizer.trust_remote_code: True"),
        ({"tokenizer": {"special_tokens": {"trust_remote_code": 1}}}, "tokenizer.special_tokens.trust_remote_code: 1"),
        ({"tokenizer": {"library": "tabular", "vocab_file": "v.pkl"}}, "tokenizer.library: 'tabular' is not one of"),
        ({"optim": {"_target_": "os.system"}}, "optim._target_: 'os.system' names code to run"),
        ({"optim": {"sched": {"_target_": "os.system"}}}, "optim.sched._target_: 'os.system'"),
        ({"optim": {"params": [{"a": {"target": "os.system"}}]}}, "optim.params[0].a.target: 'os.system'"),
        ({"_target_": "os.system"}, "_target_: 'os.system'"),
        ({"cls": "os.system", "params": {}}, "cls: 'os.system'"),
        ({"target": {"_target_": "os.system"}}, "target: {'_target_': 'os.system'}"),
        ({"num_layers": "${oc.env:HOME}"}, "num_layers: '${oc.env:HOME}' calls a resolver"),
    ],
)
@pytest.mark.parametrize("where", ["folder", "file"])
def test_a_configuration_that_runs_code_is_refused(tmp_path, change, said, where):
    policy = write(tmp_path / "p.nemo", {**CONFIG, **change})
    policy = policy if where == "folder" else packed(policy)
    assert f"{policy}/model_config.yaml: {said}" in refused(seal(policy))
    with pytest.raises(ValueError):
        policy_file.read_config(policy)


def test_class_version_and_optimizer_are_the_runs(tmp_path):
    found = policy_file.read_config(write(tmp_path / "p.nemo"))
    assert OmegaConf.to_container(found) == {"num_layers": 2, "tokenizer": CONFIG["tokenizer"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [1, 2]\nb: [*a, *a]\n", "has YAML aliases"),
        ("!!python/object/apply:os.system ['true']\n", "cannot be read"),
        ("a: !!python/name:os.system\n", "cannot be read"),
        ("- 1\n", "must be a mapping"),
        ("a: [\n", "cannot be read"),
        ("#" * 2**20 + "\n", "has more than"),
    ],
)
def test_a_configuration_is_a_plain_mapping(tmp_path, text, said):
    assert said in refused(write(tmp_path / "p.nemo", text))


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_nothing_waits_for_what_is_no_regular_file(tmp_path, kind):
    policy = write(tmp_path / "p.nemo")
    name = policy / "model_config.yaml"
    name.unlink()
    os.mkfifo(name) if kind == "fifo" else name.symlink_to("/dev/zero")
    assert "is no regular file" in refused(policy)
    other = tmp_path / "other.nemo"
    os.mkfifo(other) if kind == "fifo" else other.symlink_to("/dev/zero")
    assert "is no .nemo file or folder" in refused(other)


def archive_of(path: Path, *added: tarfile.TarInfo, mode: str = "w:") -> Path:
    with tarfile.open(path, mode) as archive:
        for member in added:
            archive.addfile(member, io.BytesIO(b"\0" * member.size) if member.isreg() else None)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.size, made.linkname = kind, size, link
    return made


@pytest.mark.parametrize(
    "entry",
    [
        member("../outside"),
        member("/etc/passwd"),
        member("a", tarfile.SYMTYPE, link="/etc"),
        member("a", tarfile.LNKTYPE, link="b"),
        member("a", tarfile.FIFOTYPE),
        member("a", tarfile.CHRTYPE),
    ],
    ids=lambda entry: f"{entry.name} {entry.type!r}",
)
def test_an_archive_holds_plain_files_inside_it(tmp_path, entry):
    assert "is no plain file inside the archive" in refused(archive_of(tmp_path / "p.nemo", entry))


def test_an_archive_has_a_name_once(tmp_path):
    """NeMo would read the last of them."""
    policy = archive_of(tmp_path / "p.nemo", member("model_config.yaml"), member("./model_config.yaml"))
    assert "'./model_config.yaml' is twice in the archive" in refused(policy)


def test_an_archive_that_grows_is_refused_before_it_is_unpacked(tmp_path):
    policy = archive_of(tmp_path / "p.nemo", member("zeros", size=2**24), mode="w:gz")
    assert policy.stat().st_size < 2**15
    assert "holds more than 16 times its own size" in refused(policy)


def test_an_archive_that_is_cut_short_is_refused(tmp_path):
    policy = packed(write(tmp_path / "p.nemo"))
    whole = policy.read_bytes()
    for content in (b"", whole[:700], whole[:2000], gzip.compress(whole)[:200]):
        policy.write_bytes(content)
        with pytest.raises(ValueError, match=r"is no \.nemo file or folder|is cut short or damaged|holds no"):
            policy_file.check(policy)
