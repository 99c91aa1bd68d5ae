"""Special tokens and tokenizers of models that are imported and exported again: where responses end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from omegaconf import OmegaConf

from nemo_fiberpo.conversion import files, tensors
from tests.support.hf_models import make, stored, write_tokenizer


def exported(source: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """config.json and generation_config.json of an import and export, and what was said."""
    files.import_huggingface(source, folder / "policy.nemo")
    said = files.export_huggingface(folder / "policy.nemo", folder / "back")
    written = (folder / "back" / name for name in ("config.json", "generation_config.json"))
    config, generation = (json.loads(file.read_text()) for file in written)
    return config, generation, said


@pytest.mark.parametrize("beside", ["generation_config.json", "no generation_config.json"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
def test_responses_end_where_those_of_the_imported_model_end(name: str, beside: str, tmp_path: Path):
    """Greedy from eight prompts, with a model of several ends that come early; defaults of the family would go on."""
    source = make(name)
    tokens = torch.arange(8, 48).reshape(8, 5)
    free = source.generate(tokens, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    ends = sorted({int(row[5 + place]) for place, row in enumerate(free[:3], start=3)})
    source.config.eos_token_id, source.config.pad_token_id = ends, 0
    source.generation_config = transformers.GenerationConfig(bos_token_id=3, eos_token_id=ends, pad_token_id=0)
    source.save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf", eos=f"<{ends[0]}>")
    if beside != "generation_config.json":
        (tmp_path / "hf" / "generation_config.json").unlink()
    config, generation, said = exported(tmp_path / "hf", tmp_path)
    wanted = {"bos_token_id": 3, "eos_token_id": ends, "pad_token_id": 0}
    assert said == [] and wanted.items() <= config.items() and wanted.items() <= generation.items()
    first, again = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        .eval()
        .generate(tokens, do_sample=False, max_new_tokens=12)
        for folder in (tmp_path / "hf", tmp_path / "back")
    )
    assert torch.equal(first, again) and not torch.equal(first, free)


def test_ids_of_special_tokens_are_the_tokenizers_where_no_model_was_imported(tmp_path: Path):
    source, policy = tmp_path / "hf", tmp_path / "policy.nemo"
    make("llama").save_pretrained(source)
    write_tokenizer(source)
    files.import_huggingface(source, policy)
    config = OmegaConf.load(policy / "model_config.yaml")
    del config["huggingface_tokens"]
    (policy / "tokenizer" / "generation_config.json").unlink()
    OmegaConf.save(config, policy / "model_config.yaml")
    with pytest.raises(ValueError, match=r"policy\.nemo: damaged: model_config\.yaml: .* bytes instead of"):
        files.export_huggingface(policy, tmp_path / "back")
    (policy / "manifest.json").unlink()
    unverified = [f"policy {policy}: unverified, there is no manifest.json"]
    assert files.export_huggingface(policy, tmp_path / "back") == unverified
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "back" / name).read_text())
        assert [found[token] for token in tensors.SPECIAL_TOKENS] == [None, 1, 2], name
    config.tokenizer.type = "a name on a hub"
    OmegaConf.save(config, policy / "model_config.yaml")
    assert files.export_huggingface(policy, tmp_path / "moved") == unverified
    shutil.rmtree(policy / "tokenizer")
    said = files.export_huggingface(policy, tmp_path / "bare")[1:]
    assert "no tokenizer: model.tokenizer = " in said[0] and "are null in config.json" in said[1]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    assert loaded.config.eos_token_id is None and loaded.generation_config.eos_token_id is None


def test_weights_beside_the_tokenizer_do_not_replace_the_policys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`tokenizer.type` may be the folder of a whole model, or be missing, which is not the folder one is in."""
    source, policy, other = tmp_path / "hf", tmp_path / "policy.nemo", tmp_path / "other"
    make("llama").save_pretrained(source)
    files.import_huggingface(source, policy)
    make("qwen2").save_pretrained(other)
    write_tokenizer(other)
    (other / "logs").mkdir()
    config = OmegaConf.load(policy / "model_config.yaml")
    (policy / "manifest.json").unlink()
    for number, given in enumerate([str(other), None]):
        config.tokenizer.type = given
        OmegaConf.save(config, policy / "model_config.yaml")
        monkeypatch.chdir(other)
        files.export_huggingface(policy, tmp_path / f"back{number}")
        before, after = stored(source), stored(tmp_path / f"back{number}")
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        assert (tmp_path / f"back{number}" / "tokenizer.json").exists() == (given is not None)


def test_a_tokenizer_with_an_eos_unknown_to_generation_is_reported(tmp_path: Path):
    make("llama").save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    said = exported(tmp_path / "hf", tmp_path)[2]
    assert len(said) == 1 and "eos_token_id in generation_config.json is 7, but responses of the policy end" in said[0]


def test_a_tokenizer_with_a_token_that_has_no_row_is_refused(tmp_path: Path):
    make("llama").save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf", size=51)
    with pytest.raises(ValueError, match="the tokenizer's token '<50>' has the id 50, but vocab_size .* is 50"):
        files.import_huggingface(tmp_path / "hf", tmp_path / "policy.nemo")
    assert not (tmp_path / "policy.nemo").exists()
    write_tokenizer(tmp_path / "hf", size=50)
    files.import_huggingface(tmp_path / "hf", tmp_path / "policy.nemo")


def test_an_import_warns_of_other_ends_and_beginnings_of_responses(tmp_path: Path):
    """As Llama 3's instruction models: several ends, one of them the tokenizer's, which begins every text."""
    source = tmp_path / "hf"
    model = make("llama")
    model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(source)

    def said(eos: str, bos: bool = False, target: str = "policy.nemo") -> list[str]:
        write_tokenizer(source, eos=eos, bos=bos)
        lines = files.import_huggingface(source, tmp_path / target)
        shutil.rmtree(tmp_path / target)
        return lines

    others, other, begins = said("<1>"), said("<9>"), said("<1>", bos=True)
    assert len(others) == 1 and "also end with 7 ('<7>'), those of the policy only with 1 ('<1>')" in others[0]
    assert "end_strings" in others[0]
    assert len(other) == 1 and "end with 1 ('<1>'), 7 ('<7>'), those of the policy with the tokenizer's 9" in other[0]
    assert begins[:1] == others and "begins every text with 3 ('<3>')" in begins[1] and "add_BOS" in begins[1]
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": 1}))
    assert said("<1>") == []
    for file in source.glob("*token*"):
        file.unlink()
    assert files.import_huggingface(source, tmp_path / "bare.nemo")[0].startswith("no tokenizer found")
