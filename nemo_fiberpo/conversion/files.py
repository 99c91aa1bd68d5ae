"""Converts the folder of a Hugging Face model to a `.nemo` folder that the actor loads, and a `.nemo` file or folder
back.

This takes one process on the CPU. The model is in memory once, every tensor in its own precision. Hugging Face weights
are read and written only as safetensors. Those of a `.nemo` are a distributed checkpoint of Megatron, whose pickles
`storage.pickles` restricts; `storage.policy_file` checks everything else first.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from nemo_fiberpo.config import mapping
from nemo_fiberpo.conversion import tokenizer
from nemo_fiberpo.conversion.gpt import build_gpt, load, load_into, save, single_process_megatron, stored
from nemo_fiberpo.conversion.tensors import (
    huggingface_config,
    model_config,
    precisions_of,
    shapes,
    to_huggingface,
    to_megatron,
)
from nemo_fiberpo.conversion.weights import Weights, read_json
from nemo_fiberpo.storage import manifest, pickles, policy_file
from nemo_fiberpo.storage.manifest import Manifest

SHARD_BYTES = 5 * 2**30


def import_huggingface(source: Path, target: Path) -> list[str]:
    """Write the model in the folder `source` (config.json, *.safetensors, tokenizer) as the `.nemo` folder `target`.

    Returns warnings for the user. ValueError for another model family, a field that NeMo does not support, a tensor
    that is missing, unexpected or of the wrong shape, weights that are not safetensors, a tokenizer larger than the
    embedding, and an existing `target`.
    """
    if target.exists():
        raise ValueError(f"{target}: exists already")
    model, weights = model_config(read_json(source / "config.json")), Weights(source)
    _check_tensors(source, model, weights)
    end = model["huggingface_tokens"]["eos_token_id"]
    warnings = tokenizer.check(source, model["override_vocab_size"], end)
    precisions = precisions_of(weights.precision, model)
    scratch = target.with_name(target.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with single_process_megatron():
        gpt = build_gpt(model, weights.precision("model.embed_tokens.weight"))
        load_into(gpt, ((name, tensor.to(precisions[name])) for name, tensor in to_megatron(weights.read, model)))
        save(gpt, scratch / policy_file.WEIGHTS)
    tokenizer.copy_files(source, scratch / "tokenizer")
    chosen = {"library": "huggingface", "type": str(target.resolve() / "tokenizer"), "model": None, "use_fast": True}
    OmegaConf.save(OmegaConf.create(model | {"tokenizer": chosen}), scratch / policy_file.CONFIG)
    manifest.write(scratch, Manifest(manifest.entries(scratch, manifest.files_of(scratch)), {}))
    os.replace(scratch, target)
    return warnings


def _prevailing(gpt: Any) -> torch.dtype:
    """The precision of most parameters, which transformers uses for the whole model."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in gpt.parameters():
        sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0]


def _check_tensors(source: Path, model: Mapping[str, Any], weights: Weights) -> None:
    """ValueError for a tensor that is missing, unexpected or not of the shape that follows from config.json. Only
    headers are read, so wrong sizes allocate nothing."""
    if model["num_layers"] * (model["num_moe_experts"] or 1) > len(weights.names):
        raise ValueError(
            f"{source}: num_hidden_layers: {model['num_layers']}, but there are {len(weights.names)} tensors"
        )
    wanted = shapes(model)
    # Redundant tensors: the head of tied embeddings, and rotary frequencies, which older Llamas store too.
    known = {"lm_head.weight", *(name for name in weights.names if name.endswith(".self_attn.rotary_emb.inv_freq"))}
    strange = sorted(weights.names - wanted.keys() - known)
    if strange:
        raise ValueError(f"{source}: {strange[0]} is a tensor that this family does not have ({len(strange)} of them)")
    for name, shape in wanted.items():
        if weights.shape(name) != shape:
            raise ValueError(f"{source}: {name} has the shape {weights.shape(name)}, but config.json implies {shape}")


def export_huggingface(source: Path, target: Path) -> list[str]:
    """Write the policy in the `.nemo` file or folder `source` as a Hugging Face model in the folder `target`.

    Returns messages for the user about the result. ValueError for a policy that fits none of the families, for an
    existing `target`, and as `policy_file.check`.
    """
    if target.exists():
        raise ValueError(f"{target}: exists already")
    if not source.exists():
        raise ValueError(f"{source}: there is no such .nemo file or folder")
    warnings = policy_file.check(source)
    with _unpacked(source) as folder, single_process_megatron(), pickles.named(source):
        model = mapping(OmegaConf.to_container(policy_file.read_config(folder)), policy_file.CONFIG)
        config = huggingface_config(model)
        dtype, vocabulary = stored(folder / policy_file.WEIGHTS, model)
        gpt = build_gpt(model | {"override_vocab_size": vocabulary}, dtype)
        load(gpt, folder / policy_file.WEIGHTS)
        scratch = target.with_name(target.name + ".partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        _write_shards(to_huggingface(dict(gpt.state_dict()), model), scratch)
        config |= {"vocab_size": vocabulary, "torch_dtype": str(_prevailing(gpt)).removeprefix("torch.")}
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        lacking = tokenizer.complete(scratch, model, tokenizer.folder_of(model, folder))
        os.replace(scratch, target)
    return lacking if policy_file.seal_of(source).exists() else [warnings, *lacking]


@contextlib.contextmanager
def _unpacked(source: Path) -> Iterator[Path]:
    if source.is_dir():
        yield source
        return
    with tempfile.TemporaryDirectory(dir=source.parent) as folder, policy_file.open_archive(source) as archive:
        for member, name in policy_file.members(archive, source):
            target = Path(folder) / name
            (target if member.isdir() else target.parent).mkdir(parents=True, exist_ok=True)
            if (content := archive.extractfile(member)) is not None:
                with content, open(target, "wb") as file:
                    shutil.copyfileobj(content, file)
        yield Path(folder)


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Write safetensors files of at most SHARD_BYTES each, and their index."""
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors:
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # Parts of a joined tensor share memory, which safetensors does not accept.
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in shard.items()}, folder / file, {"format": "pt"}
        )
        where |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
