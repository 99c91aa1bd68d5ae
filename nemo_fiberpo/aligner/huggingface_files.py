"""A folder of a Hugging Face model as a `.nemo` folder that the actor loads, and a `.nemo` file or folder back.

One process on the CPU; the model is in memory once, in the checkpoint's own precision. Weights of a Hugging Face model
are read from and written to safetensors alone. Those of a `.nemo` are Megatron's distributed checkpoint, whose metadata
is a pickle that megatron-core loads: export what you trust.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from nemo_fiberpo.aligner import huggingface_tokenizer
from nemo_fiberpo.aligner.huggingface import huggingface_config, model_config, names_used, to_huggingface, to_megatron
from nemo_fiberpo.config import mapping

SHARD_BYTES = 5 * 2**30
_NORM_BESIDE_EXPERTS = "decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"
"""Names of the norm before experts in a checkpoint: with Transformer Engine's layer spec, and with the local one."""


def import_huggingface(source: Path, target: Path) -> None:
    """Write the model in the folder `source` (config.json, *.safetensors, tokenizer) as the `.nemo` folder `target`.

    ValueError for a model of another family, a field that NeMo cannot follow, a missing or superfluous tensor, one of
    another shape, weights that are no safetensors, and a `target` that exists.
    """
    if target.exists():
        raise ValueError(f"{target}: exists already")
    config = json.loads(_needed(source / "config.json").read_text())
    model, weights = model_config(config), _Weights(source)
    strange = sorted(weights.names - names_used(model) - {"lm_head.weight"})
    if strange:
        raise ValueError(f"{source}: {strange[0]} is a tensor that this family does not have ({len(strange)} of them)")
    scratch = target.with_name(target.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    dtype = weights.read("model.embed_tokens.weight").dtype
    with megatron_alone():
        gpt = build_gpt(model, dtype)
        load_into(gpt, to_megatron(weights.read, model))
        _save(gpt, scratch / "model_weights")
    huggingface_tokenizer.copy_files(source, scratch / "tokenizer")
    tokenizer = {"library": "huggingface", "type": str(target.resolve() / "tokenizer"), "model": None, "use_fast": True}
    OmegaConf.save(OmegaConf.create(model | {"tokenizer": tokenizer}), scratch / "model_config.yaml")
    os.replace(scratch, target)


def export_huggingface(source: Path, target: Path) -> list[str]:
    """Write the policy in the `.nemo` file or folder `source` as a Hugging Face model in the folder `target`.

    Returns a line for all that the result lacks. ValueError for a policy that no family has, and for a `target` that
    exists.
    """
    if target.exists():
        raise ValueError(f"{target}: exists already")
    with _unpacked(source) as folder, megatron_alone():
        plain = OmegaConf.to_container(OmegaConf.load(_needed(folder / "model_config.yaml")))
        model = mapping(plain, "model_config.yaml")
        config = huggingface_config(model)
        dtype, vocabulary = _stored(folder / "model_weights")
        gpt = build_gpt(model | {"override_vocab_size": vocabulary}, dtype)
        _load(gpt, folder / "model_weights")
        scratch = target.with_name(target.name + ".partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        _write_shards(to_huggingface(dict(gpt.state_dict()), model), scratch)
        config |= {"vocab_size": vocabulary, "torch_dtype": str(dtype).removeprefix("torch.")}
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        lacking = huggingface_tokenizer.complete(scratch, model, huggingface_tokenizer.folder_of(model, folder))
        os.replace(scratch, target)
    return lacking


class _Weights:
    """The tensors of a folder of safetensors, read one by one."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        files = sorted(folder.glob("*.safetensors"))
        if not files:
            other = next(iter([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]), None)
            why = f"; {other.name} is a pickle, save the model as safetensors" if other is not None else ""
            raise ValueError(f"{folder}: no *.safetensors there{why}")
        self._folder = folder
        self._open = [safe_open(file, framework="pt") for file in files]
        self._of = {name: file for file in self._open for name in file.keys()}  # noqa: SIM118 (no mapping)

    @property
    def names(self) -> set[str]:
        return set(self._of)

    def read(self, name: str) -> Tensor:
        if name not in self._of:
            raise ValueError(f"{self._folder}: has no tensor {name}")
        return self._of[name].get_tensor(name)


def _needed(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    return path


@contextlib.contextmanager
def megatron_alone() -> Iterator[None]:
    """Megatron-core on the CPU in this process alone, in the CPU mode of the actor."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from nemo_fiberpo.aligner import cpu

    cpu.install()
    own = not dist.is_initialized()
    if own:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(minutes=30))
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if own:
            dist.destroy_process_group()


def build_gpt(model: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The Megatron GPT of NeMo's `model` section on one rank, with the local layer spec. Its parameters are not set."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    experts = model.get("num_moe_experts")
    moe = {}
    if experts:
        moe = {"num_moe_experts": experts, "moe_router_topk": model["moe_router_topk"]}
        moe |= {"moe_router_pre_softmax": bool(model.get("moe_router_pre_softmax")), "moe_aux_loss_coeff": 0.0}
        moe |= {"moe_token_dispatcher_type": "allgather", "moe_router_load_balancing_type": "none"}
    config = TransformerConfig(
        num_layers=model["num_layers"],
        hidden_size=model["hidden_size"],
        num_attention_heads=model["num_attention_heads"],
        num_query_groups=model.get("num_query_groups"),
        kv_channels=model.get("kv_channels"),
        ffn_hidden_size=model["ffn_hidden_size"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=bool(model.get("qkv_bias")),
        normalization="RMSNorm",
        layernorm_epsilon=model["layernorm_epsilon"],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        **moe,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(experts, False),
        vocab_size=model["override_vocab_size"],
        max_sequence_length=model["max_position_embeddings"],
        position_embedding_type="rope",
        rotary_base=model.get("rotary_base", 10000),
        rope_scaling=bool(model.get("scale_positional_embedding")),
        share_embeddings_and_output_weights=bool(model.get("share_embeddings_and_output_weights", True)),
    ).to(dtype)


@torch.no_grad()
def load_into(gpt: Any, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Copy tensors into the parameters of the same names: all of them, each once. ValueError for another shape."""
    left = dict(gpt.named_parameters())
    for name, tensor in tensors:
        parameter = left.pop(name)
        if parameter.shape != tensor.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, but config.json says {tuple(parameter.shape)}")
        parameter.copy_(tensor)
    assert not left, f"no tensor for {sorted(left)}"


def _save(gpt: Any, folder: Path) -> None:
    """A distributed checkpoint that models of either layer spec can load."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    state = gpt.sharded_state_dict(prefix="model.")
    engine, local = (f"model.{name}" for name in _NORM_BESIDE_EXPERTS)
    if gpt.config.num_moe_experts:
        for name, entry in list(state.items()):
            if isinstance(entry, ShardedTensor) and entry.key == local:
                state[f"{name} of the other spec"] = dataclasses.replace(entry, key=engine)
    folder.mkdir()
    dist_checkpointing.save(state, str(folder))


def _load(gpt: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    state = gpt.sharded_state_dict(prefix="model.")
    engine, local = (f"model.{name}" for name in _NORM_BESIDE_EXPERTS)
    if engine in dist_checkpointing.load_tensors_metadata(str(folder)):
        for entry in state.values():
            if isinstance(entry, ShardedTensor) and entry.key == local:
                entry.key = engine
    loaded = dist_checkpointing.load(state, str(folder))
    gpt.load_state_dict({name.removeprefix("model."): value for name, value in loaded.items()}, strict=False)
    missing = {name for name, _ in gpt.named_parameters()} - {name.removeprefix("model.") for name in loaded}
    assert not missing, f"{folder}: no tensor for {sorted(missing)}"


def _stored(folder: Path) -> tuple[torch.dtype, int]:
    """Precision and rows of the embedding in a checkpoint."""
    from megatron.core import dist_checkpointing

    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; a .nemo of Megatron-core holds its weights there")
    metadata = dist_checkpointing.load_tensors_metadata(str(folder))
    embedding = metadata["model.embedding.word_embeddings.weight"]
    return embedding.dtype, int(embedding.global_shape[0])


@contextlib.contextmanager
def _unpacked(source: Path) -> Iterator[Path]:
    if source.is_dir():
        yield source
        return
    if not source.is_file() or not tarfile.is_tarfile(source):
        raise ValueError(f"{source}: is no .nemo file or folder")
    with tempfile.TemporaryDirectory(dir=source.parent) as folder, tarfile.open(source) as archive:
        _extract(archive, Path(folder).resolve())
        yield Path(folder)


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    """Files and folders that lie inside `folder`; ValueError for anything else. The standard library's own filter came
    with Python 3.11.4."""
    for member in archive:
        target = (folder / member.name).resolve()
        if (target != folder and folder not in target.parents) or not (member.isfile() or member.isdir()):
            raise ValueError(f"{archive.name!s}: {member.name!r} is no plain file inside the archive")
        (target if member.isdir() else target.parent).mkdir(parents=True, exist_ok=True)
        if (content := archive.extractfile(member)) is not None:
            with content, open(target, "wb") as file:
                shutil.copyfileobj(content, file)


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Safetensors of at most SHARD_BYTES each, and their index."""
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
        # Parts of a joined tensor share its memory, which the format does not take.
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in shard.items()}, folder / file, {"format": "pt"}
        )
        where |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
