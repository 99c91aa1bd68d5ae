"""Which files of a Hugging Face folder count, the precision of each tensor, and what travels with a model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from nemo_fiberpo.conversion import files
from nemo_fiberpo.conversion.weights import Weights
from tests.support.hf_models import make, stored, write_tokenizer


def back(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of `source`, imported and exported again."""
    files.import_huggingface(source, folder / "policy.nemo")
    files.export_huggingface(folder / "policy.nemo", folder / "back")
    return stored(folder / "back")


def refused(source: Path) -> str:
    target = source.parent / "policy.nemo"
    with pytest.raises(ValueError) as error:
        files.import_huggingface(source, target)
    assert not target.exists() and not target.with_name("policy.nemo.partial").exists()
    return str(error.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model of several shards."""
    source = tmp_path / "hf"
    make("llama").save_pretrained(source, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    return source


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_every_tensor_keeps_its_precision(name: str, tmp_path: Path):
    """Norms and head in float32 beside bfloat16: seven of 41 tensors of the Mixtral."""
    make(name, torch.bfloat16).save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    wide = {key: value for key, value in make(name).state_dict().items() if "norm" in key or key == "lm_head.weight"}
    before = load_file(file) | {key: value.contiguous() for key, value in wide.items()}
    assert len({value.dtype for value in before.values()}) == 2
    save_file(before, file, {"format": "pt"})
    after = back(tmp_path / "hf", tmp_path)
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor), key
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_tensors_that_megatron_joins_are_held_in_the_wider_precision(tmp_path: Path):
    """Queries and keys of one matrix, a float16 and a bfloat16 layer of one stacked tensor: no value is rounded."""
    make("llama").save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    before = load_file(file)
    attention = "model.layers.0.self_attn.{}_proj.weight"
    for key, dtype in {
        attention.format("q"): torch.bfloat16,
        attention.format("v"): torch.float16,
        "model.layers.0.input_layernorm.weight": torch.bfloat16,
        "model.layers.1.input_layernorm.weight": torch.float16,
    }.items():
        before[key] = before[key].to(dtype)
    save_file(before, file, {"format": "pt"})
    after = back(tmp_path / "hf", tmp_path)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == torch.float32 and torch.equal(after[key], tensor.float()), key


def test_the_index_decides_which_file_holds_a_tensor(sharded: Path, tmp_path: Path):
    whole = stored(sharded)
    other = {key: torch.ones_like(value) for key, value in whole.items()}
    for left_over in ("model-00009-of-00009.safetensors", "zz.safetensors"):
        save_file(other, sharded / left_over)
    after = back(sharded, tmp_path)
    assert whole.keys() == after.keys() and all(torch.equal(whole[key], after[key]) for key in whole)


def test_two_models_in_one_folder_are_refused(sharded: Path):
    save_file({"model.norm.weight": torch.ones(32)}, sharded / "model.safetensors")
    assert "model.safetensors and the shards of model.safetensors.index.json are two models" in refused(sharded)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-1]), "is cut short or damaged"),
        (lambda shard: shard.write_bytes(b""), "is cut short or damaged"),
        (lambda shard: shard.unlink(), "there is no such file"),
        (lambda shard: (shard.unlink(), os.mkfifo(shard)), "is not a regular file"),
        (lambda shard: (shard.unlink(), shard.symlink_to("/dev/zero")), "is not a regular file"),
        (lambda shard: save_file({"model.norm.weight": torch.ones(32)}, shard), "has no tensor"),
    ],
    ids=["truncated", "empty", "missing", "fifo", "device", "another"],
)
def test_a_shard_that_is_not_whole_is_named(sharded: Path, damage, said: str):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    damage(shard)
    found = refused(sharded)
    assert found.startswith(f"{shard}: {said}"), found


@pytest.mark.parametrize("name", ["/dev/zero", "../other.safetensors", "x.bin", 7, ""])
def test_an_index_names_files_of_its_folder(sharded: Path, name):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    assert "weight_map.model.norm.weight: " in refused(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(sharded: Path, text: str):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json: " in refused(sharded)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 10**8}, "num_hidden_layers: 100000000, but there are"),
        ({"hidden_size": 10**9, "head_dim": 8}, "but config.json implies (50, 1000000000)"),
        ({"vocab_size": 10**9}, "but config.json implies (1000000000, 32)"),
        ({"intermediate_size": 10**9}, "but config.json implies (1000000000, 32)"),
        ({"num_attention_heads": 2 * 10**8, "head_dim": 8}, "but config.json implies (1600000000, 32)"),
    ],
)
def test_sizes_that_are_not_the_models_allocate_nothing(change: dict, said: str, tmp_path: Path):
    make("llama").save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert said in refused(tmp_path / "hf")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize(
    "key", ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_moe_experts"]
)
def test_a_policy_of_another_size_than_its_configuration_is_refused(name: str, key: str, tmp_path: Path):
    """A hundred million layers would be built before the first weight is read."""
    if name == "llama" and key == "num_moe_experts":
        pytest.skip("a dense model has none")
    make(name).save_pretrained(tmp_path / "hf")
    policy = tmp_path / "policy.nemo"
    files.import_huggingface(tmp_path / "hf", policy)
    (policy / "manifest.json").unlink()
    config = OmegaConf.load(policy / "model_config.yaml")
    changed = {key: 10**8} | ({"moe_ffn_hidden_size": 10**8} if key == "ffn_hidden_size" else {})
    OmegaConf.save(OmegaConf.merge(config, changed), policy / "model_config.yaml")
    with pytest.raises(ValueError, match=r"model_weights: .* has the shape .*, but model_config\.yaml implies .*\d{9}"):
        files.export_huggingface(policy, tmp_path / "back")


def test_angles_that_older_models_hold_are_left_out(tmp_path: Path):
    make("llama").save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    whole = load_file(file)
    save_file(whole | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    after = back(tmp_path / "hf", tmp_path)
    assert after.keys() == whole.keys() and all(torch.equal(after[key], whole[key]) for key in whole)


def test_quantized_tensors_are_refused(tmp_path: Path):
    make("llama").save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {key: tensors[key].to(torch.float8_e4m3fn)}, file)
    assert f"{key} is stored as F8_E4M3" in refused(tmp_path / "hf")


def test_only_a_tokenizers_own_files_travel(tmp_path: Path):
    """A name that begins as theirs, a link out of the folder, a FIFO: none is copied. What a Hugging Face cache links
    to is."""
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "1234", tmp_path / "models--a" / "blobs"
    make("llama").save_pretrained(snapshot)
    write_tokenizer(snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    (tmp_path / "secret").write_text("{}")
    (snapshot / "tokenizer_of_another.txt").write_text("x")
    (snapshot / "added_tokens.json").symlink_to(tmp_path / "secret")
    os.mkfifo(snapshot / "vocab.txt")
    files.import_huggingface(snapshot, tmp_path / "policy.nemo")
    copied = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"}
    assert {file.name for file in (tmp_path / "policy.nemo" / "tokenizer").iterdir()} == copied
    assert not any(file.is_symlink() for file in (tmp_path / "policy.nemo").rglob("*"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "policy.nemo" / "tokenizer")
    assert tokenizer.vocab_size == 45
    assert Weights(snapshot).names == set(make("llama").state_dict())
