"""The config.json of the supported model families: completed and normalized, or refused by field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "MixtralForCausalLM": "mixtral"}
LLAMA3_KEYS = {
    "factor": "scale_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "old_context_len",
}
"""What `rope_scaling` of the type llama3 holds, and NeMo's keys for it in the `model` section."""

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "num_local_experts",
    "num_experts_per_tok",
)
_LARGEST = 2**31 - 1


def completed(given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The family of a config.json, and its content with transformers' defaults for the keys that it leaves out.

    `rope_theta` and `rope_scaling` (None, or of the type llama3) are always present, also if the file has the
    `rope_parameters` of transformers 5. ValueError naming a field that NeMo does not support or whose value is invalid.
    """
    names = given.get("architectures") or [None]
    family = FAMILIES.get(names[0])
    if family is None:
        raise ValueError(f"architectures: {names[0]!r} is not supported; valid: {', '.join(FAMILIES)}")
    for name in ("quantization_config", "compression_config"):
        if given.get(name) is not None:
            raise ValueError(f"{name}: the weights are quantized; import the model in bfloat16, float16 or float32")
    _check_numbers(given)
    config = _with_positions(given)
    _check_scaling(config["rope_scaling"])
    try:
        config = _class(family)(**config).to_dict() | {"rope_scaling": config["rope_scaling"]}
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"config.json: transformers cannot read it: {error}") from error
    _refuse(config, family)
    _check_heads(config, given.get("head_dim"))
    return family, config


def _class(family: str) -> Any:
    from transformers import LlamaConfig, MixtralConfig, Qwen2Config

    return {"llama": LlamaConfig, "qwen2": Qwen2Config, "mixtral": MixtralConfig}[family]


def _check_numbers(given: Mapping[str, Any]) -> None:
    for name in _SIZES:
        value = given.get(name)
        if value is not None and not (type(value) is int and 0 < value <= _LARGEST):
            raise ValueError(f"{name}: {value!r}; must be a whole number from 1 to {_LARGEST}")
    for name in ("rms_norm_eps", "rope_theta"):
        if given.get(name) is not None:
            _positive(given[name], name)


def _positive(value: Any, name: str) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}: {value!r}; must be a positive number")


def _with_positions(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with `rope_theta` and `rope_scaling`, which transformers 5 joins in `rope_parameters`."""
    new = dict(given.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in new.values()):
        raise ValueError(f"rope_parameters: {new}; rotary parameters per layer are not supported")
    scaling = given.get("rope_scaling") or {name: value for name, value in new.items() if name != "rope_theta"}
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        scaling = None
    own = {name: new[name] for name in ("rope_theta", "partial_rotary_factor") if name in new}
    left_out = "rope_parameters", "torch_dtype", "dtype"  # each tensor has its own precision
    rest = {name: value for name, value in given.items() if name not in left_out}
    return {**rest, **own, "rope_scaling": scaling}


def _check_scaling(scaling: Mapping[str, Any] | None) -> None:
    if scaling is None:
        return
    if scaling.get("rope_type", scaling.get("type")) != "llama3":
        raise ValueError(f"rope_scaling: {scaling}; this conversion supports only the type llama3, or no scaling")
    for name in LLAMA3_KEYS:
        _positive(scaling.get(name), f"rope_scaling.{name}")
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(f"rope_scaling.high_freq_factor: must be above low_freq_factor, got {scaling}")


def _refuse(config: Mapping[str, Any], family: str) -> None:
    fixed = {"hidden_act": "silu", "mlp_bias": False, "sliding_window": None, "partial_rotary_factor": 1.0}
    if family != "qwen2":
        fixed["attention_bias"] = False
    for name, value in fixed.items():
        found = config.get(name, value)
        windowed = name == "sliding_window" and not config.get("use_sliding_window", True)
        if found != value and not windowed:
            raise ValueError(f"{name}: {found!r}; this conversion supports only {value!r}")
    for kind in config.get("layer_types") or ():
        if kind != "full_attention":
            raise ValueError(f"layer_types: {kind!r}; this conversion supports only 'full_attention'")


def _check_heads(config: Mapping[str, Any], width: int | None) -> None:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % groups:
        raise ValueError(f"num_key_value_heads: {groups} does not divide num_attention_heads = {heads}")
    if width is None and config["hidden_size"] % heads:
        raise ValueError(f"num_attention_heads: {heads} does not divide hidden_size = {config['hidden_size']}")
