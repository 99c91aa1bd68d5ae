"""Hugging Face models into the actor's checkpoint and back: logits, bits, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nemo_fiberpo.conversion import files, gpt
from nemo_fiberpo.conversion.tensors import huggingface_config, model_config, to_huggingface, to_megatron
from nemo_fiberpo.conversion.weights import Weights
from tests.support.hf_models import LLAMA31, MODELS, SIZES, make, stored, write_tokenizer
from tests.support.launching import ROOT, environment

LLAMA31_FACTORS = {name: LLAMA31[name] for name in ("factor", "low_freq_factor", "high_freq_factor")}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str):
    model = make(name)
    config = model_config(model.config.to_dict() | {"architectures": [type(model).__name__]})
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(tokens).logits
    assert wanted.abs().max() > 0.5
    torch.testing.assert_close(logits(config, model, tokens), wanted, rtol=1e-5, atol=1e-5)


def logits(config: dict[str, Any], model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Of Megatron's GPT with the weights of a transformers model."""
    length = tokens.shape[1]
    with gpt.single_process_megatron(), torch.no_grad():
        built = gpt.build_gpt(config, torch.float32).eval()
        gpt.load_into(built, to_megatron(dict(model.state_dict()).__getitem__, config))
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
        return built(tokens, torch.arange(length).expand(len(tokens), -1), causal)


@pytest.mark.parametrize("factors", [{"factor": 32.0}, {"low_freq_factor": 2.0, "high_freq_factor": 8.0}])
def test_every_factor_of_scaled_positions_reaches_the_angles(factors: dict[str, float]):
    """Positions are scaled for 16 tokens here, so that 40 of them differ between Llama 3.1's factors and these."""
    scaling = LLAMA31 | {"original_max_position_embeddings": 16} | factors
    model = make("llama", rope_scaling=scaling, rope_theta=1000.0)
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))
    config = model_config(model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    with torch.no_grad():
        wanted = model(tokens).logits
        others = make("llama", rope_scaling=scaling | LLAMA31_FACTORS, rope_theta=1000.0)(tokens).logits
    assert (wanted - others).abs().max() > 0.01
    torch.testing.assert_close(logits(config, model, tokens), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
def test_keys_that_a_config_leaves_out_have_the_familys_own_defaults(name: str):
    """rope_theta of Mixtral is 1e6 to transformers and 1e4 to NeMo."""
    kind, model_kind, _ = MODELS[name]
    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    bare = sizes | {"architectures": [model_kind.__name__], "model_type": kind.model_type}
    bare |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    whole = kind(**bare).to_dict()
    assert len(whole) > len(bare) and model_config(bare) == model_config(whole)
    model = make(name, **{key: whole[key] for key in whole if key in SIZES and key != "attn_implementation"})
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(tokens).logits
    given = bare | ({"num_local_experts": 4} if name == "mixtral" else {})
    torch.testing.assert_close(logits(model_config(given), model, tokens), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, LLAMA31])
def test_newer_spelling_of_positions_means_the_same(scaling: dict[str, Any]):
    """`rope_parameters`, which transformers writes from version 5 on, in place of `rope_theta` and `rope_scaling`."""
    old = make("llama").config.to_dict() | {"architectures": ["LlamaForCausalLM"], "rope_theta": 500000.0}
    new = {name: value for name, value in old.items() if name not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = scaling | {"rope_theta": 500000.0}
    assert model_config(new) == model_config(old | {"rope_scaling": scaling})
    new["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 4.0}
    with pytest.raises(ValueError, match=r"^rope_scaling: .*yarn"):
        model_config(new)
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match=r"^partial_rotary_factor: 0.5"):
        model_config(new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_files_there_and_back_have_the_same_bits(name: str, dtype: torch.dtype, tmp_path: Path):
    model = make(name, dtype)
    model.save_pretrained(tmp_path / "hf")
    files.import_huggingface(tmp_path / "hf", tmp_path / "policy.nemo")
    files.export_huggingface(tmp_path / "policy.nemo", tmp_path / "back")
    before, after = stored(tmp_path / "hf"), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    what_ends_a_response = [(tmp_path / name / "generation_config.json").read_text() for name in ("hf", "back")]
    assert what_ends_a_response[0] == what_ends_a_response[1]
    tokens = torch.arange(12)[None]
    first, again = (
        transformers.AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype="auto", attn_implementation="eager"
        ).eval()
        for folder in (tmp_path / "hf", tmp_path / "back")
    )
    with torch.no_grad():
        assert torch.equal(first(tokens).logits, again(tokens).logits)


def test_queries_keys_and_values_lie_by_group():
    """Two groups of two queries, heads one wide: by hand."""
    config = {
        "num_layers": 1,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "share_embeddings_and_output_weights": True,
    }
    q, k, v = torch.tensor([[1.0], [2], [3], [4]]), torch.tensor([[5.0], [6]]), torch.tensor([[7.0], [8]])
    source = {
        f"model.layers.0.self_attn.{name}_proj.weight": value for name, value in zip("qkv", (q, k, v), strict=True)
    }
    made = dict(to_megatron(lambda name: source.get(name, torch.zeros(2, 1)), config))
    assert made["decoder.layers.0.self_attention.linear_qkv.weight"].flatten().tolist() == [1, 2, 5, 7, 3, 4, 6, 8]
    back = dict(to_huggingface(made, config))
    assert all(torch.equal(back[name], value) for name, value in source.items())


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_comes_back(name: str):
    before = make(name).config.to_dict() | {"architectures": [MODELS[name][1].__name__]}
    after = MODELS[name][0](**(huggingface_config(model_config(before)) | {"vocab_size": 50})).to_dict()
    skipped = {"torch_dtype", "_attn_implementation_autoset", "transformers_version"}
    skipped |= {"sliding_window", "max_window_layers"} if name.startswith("qwen2") else set()
    assert {k: v for k, v in after.items() if k not in skipped} == {k: v for k, v in before.items() if k not in skipped}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures: 'GPT2LMHeadModel' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"attention_bias": True}, "attention_bias: True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: "),
        ({"rope_scaling": LLAMA31 | {"factor": "8"}}, "rope_scaling.factor: '8'; must be a positive number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor: None"),
        ({"rope_scaling": LLAMA31 | {"low_freq_factor": 4.0}}, "rope_scaling.high_freq_factor: must be above"),
        ({"sliding_window": 4096}, "sliding_window: 4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: 'sliding_attention'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: the weights are quantized"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: 1000000000000; must be a whole number from 1 to"),
        ({"hidden_size": "32"}, "hidden_size: '32'; must be a whole number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide num_attention_heads = 4"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None}, "num_attention_heads: 5 does not"),
    ],
)
def test_what_nemo_cannot_follow_is_refused_by_its_field(change: dict[str, Any], said: str):
    config = make("llama").config.to_dict() | {"architectures": ["LlamaForCausalLM"]} | change
    with pytest.raises(ValueError) as error:
        model_config(config)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"normalization": "layernorm"},
            "model.normalization: 'layernorm'; a model of the Llama families has 'rmsnorm'",
        ),
        ({"seq_len_interpolation_factor": 2.0}, "model.seq_len_interpolation_factor: 2.0"),
        ({"rotary_percentage": 0.5}, "model.rotary_percentage: 0.5"),
        ({"qk_layernorm": True}, "model.qk_layernorm: True"),
        ({"moe_shared_expert_intermediate_size": 8}, "model.moe_shared_expert_intermediate_size: 8"),
        ({"moe_ffn_hidden_size": 24}, "model.moe_ffn_hidden_size: 24; must be ffn_hidden_size"),
        ({"qkv_bias": True}, "model.qkv_bias: true; Mixtral has no biases"),
    ],
)
def test_what_no_family_has_is_not_exported(change: dict[str, Any], said: str):
    model = model_config(make("mixtral").config.to_dict() | {"architectures": ["MixtralForCausalLM"]})
    huggingface_config(model)
    with pytest.raises(ValueError) as error:
        huggingface_config(model | change)
    assert said in str(error.value)


def test_pickles_missing_superfluous_and_misshapen_tensors_are_refused(tmp_path: Path):
    source, target = tmp_path / "hf", tmp_path / "policy.nemo"
    make("llama").save_pretrained(source)
    file = source / "model.safetensors"
    whole = load_file(file)

    def refused(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, file)
        with pytest.raises(ValueError) as error:
            files.import_huggingface(source, target)
        assert not target.exists()
        return str(error.value)

    norm = "model.norm.weight"
    assert f"has no tensor {norm}" in refused({key: value for key, value in whole.items() if key != norm})
    assert "rotary.strange is a tensor that this family does not have" in refused(
        whole | {"rotary.strange": torch.ones(1)}
    )
    assert "has the shape (33,), but config.json implies (32,)" in refused(whole | {norm: torch.ones(33)})
    file.unlink()
    torch.save(whole, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle"):
        files.import_huggingface(source, target)


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "SHARD_BYTES", 20_000)
    model = make("llama")
    files._write_shards(iter(model.state_dict().items()), tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"]) == set(model.state_dict()) == Weights(tmp_path).names


OFF = (
    "transformer_engine",
    "megatron_amp_O2",
    "persist_layer_norm",
    "gradient_accumulation_fusion",
    "apply_rope_fusion",
)
OFF += ("masked_softmax_fusion", "bias_activation_fusion", "bias_dropout_add_fusion")
CPU = ["++model.use_cpu_initialization=true", *(f"++model.{name}=false" for name in OFF)]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["qwen2, tied", "mixtral"])
def test_the_actor_gives_an_imported_policy_the_log_probs_of_transformers(name: str, tmp_path: Path):
    """And what the actor saves is exported with the bits it was imported with."""
    from tests.support.hf_log_probs import TOKENS

    model = make(name)
    model.save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    policy, out = tmp_path / "policy.nemo", tmp_path / "out.pt"
    files.import_huggingface(tmp_path / "hf", policy)
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"),
            str(ROOT / "tests" / "support" / "hf_log_probs.py"),
            *(str(ROOT / "conf"), str(out), f"run_dir={tmp_path}/run", "data.train=none"),
            *(f"pretrained_checkpoint.restore_from_path={policy}", "model=policy", "model.micro_batch_size=2", *CPU),
        ],
        cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    with torch.no_grad():  # the tokenizer has 45 of the 50 rows; responses are sampled from these
        wanted = model(TOKENS).logits[..., :45].log_softmax(-1)[:, :-1].gather(-1, TOKENS[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(torch.load(out, weights_only=True), wanted, rtol=1e-5, atol=1e-5)
    files.export_huggingface(tmp_path / "out" / "again.nemo", tmp_path / "back")
    before, after = stored(tmp_path / "hf"), stored(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "back").vocab_size == 45
    ids = [json.loads((tmp_path / name / "config.json").read_text())["eos_token_id"] for name in ("hf", "back")]
    assert ids == [7, 7]


@pytest.mark.parametrize("wrong", ["above", "link"])
def test_an_archive_that_reaches_outside_itself_is_refused(tmp_path: Path, wrong: str):
    path = tmp_path / "policy.nemo"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("../outside" if wrong == "above" else "model_weights")
        if wrong == "link":
            member.type, member.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(member)
    with pytest.raises(ValueError, match=r"policy\.nemo: .* is no plain file inside the archive"):
        files.export_huggingface(path, tmp_path / "hf")
    assert not (tmp_path / "outside").exists()
