"""The keys of NeMo's sections `model`, `trainer` and `exp_manager` that a run reads, each with its kind of value.

keys.json lists what two-step runs read, plus the fields of the classes that NeMo builds from these sections;
`python -m tests.faults keys` writes it. A key that nothing reads is refused: it would silently have no effect.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_fiberpo.plain import as_plain
from nemo_fiberpo.values import did_you_mean, is_finite, short

FILE = Path(__file__).with_name("keys.json")
SECTIONS = ("model", "trainer", "exp_manager")
BY_HAND: dict[str, str] = {
    # Read by Lightning, NeMo's optimizer and this package without going through the config object.
    **dict.fromkeys(("trainer.num_nodes", "model.optim.lr", "model.optim.weight_decay"), "number!"),
    **dict.fromkeys(("trainer.gradient_clip_val", "trainer.max_epochs", "trainer.max_steps"), "number"),
    **dict.fromkeys(("trainer.benchmark", "trainer.deterministic", "trainer.enable_model_summary"), "any"),
    **dict.fromkeys(("trainer.use_distributed_sampler", "trainer.enable_progress_bar"), "bool"),
    **dict.fromkeys(("trainer.devices", "trainer.precision", "trainer.logger", "model.precision"), "any"),
    **dict.fromkeys(("model.mcore_gpt", "model.transformer_engine", "model.megatron_amp_O2"), "bool"),
    **dict.fromkeys(("model.ppo.trt_llm.enable", "trainer.ppo.trt_llm.enable", "trainer.ppo.trt_llm.reshard"), "bool"),
    **dict.fromkeys(("trainer.ppo.gradient_clip_val", "model.optim.sched.min_lr"), "number"),
    "model.logprobs": "text",
    "model.optim.betas": "list!",
    "model.optim.sched.name": "text!",
    **dict.fromkeys(("model.seed", "model.ppo.rollout_micro_batch_size"), "number!"),
    **dict.fromkeys(("model.data.data_prefix", "model.data.num_workers", "trainer.ppo.trt_llm"), "any"),
    "model.moe_layer_freq": "any",
    "model.overwrite_base_config": "mapping",
    **dict.fromkeys(("trainer.ppo", "model.ppo", "model.optim", "model.optim.sched"), "mapping!"),
}
OPEN = (
    *("model.ppo.trt_llm", "model.ppo.sampling_params", "model.ppo.length_params", "model.peft.lora_tuning"),
    *("model.tokenizer", "model.mcore_customization_config", "model.nsys_profile", "model.memory_profile"),
    *("model.overwrite_base_config", "exp_manager.ema", "model.chakra_profile"),
    *(f"exp_manager.{name}_logger_kwargs" for name in ("wandb", "mlflow", "dllogger", "clearml", "neptune")),
    *("exp_manager.summary_writer_kwargs", "exp_manager.early_stopping_callback_params", "exp_manager.fault_tolerance"),
    "exp_manager.straggler_detection_params",
)
"""Mappings that NeMo passes on unchanged, or whose keys are checked elsewhere: any key is accepted."""
WITHOUT_EFFECT: dict[str, str] = {
    **dict.fromkeys(
        (
            *("trainer.accumulate_grad_batches", "trainer.val_check_interval", "trainer.check_val_every_n_epoch"),
            *("trainer.limit_train_batches", "trainer.limit_val_batches", "trainer.limit_test_batches"),
            *("trainer.log_every_n_steps", "trainer.num_sanity_val_steps", "trainer.min_steps", "trainer.min_epochs"),
            *("trainer.fast_dev_run", "trainer.overfit_batches", "trainer.gradient_clip_algorithm"),
        ),
        "belongs to Lightning's own loop, which does not run here; `algorithm` sets the length of a run and when it is "
        "evaluated and saved",
    ),
    **dict.fromkeys(
        ("trainer.strategy", "trainer.plugins", "trainer.callbacks"),
        "is built by NeMo from the keys of `model`",
    ),
    **dict.fromkeys(
        ("model.optim.eps", "model.optim.adam_beta1", "model.optim.adam_beta2"),
        "is not passed to Megatron's optimizer: NeMo passes lr, weight_decay and betas",
    ),
    **dict.fromkeys(
        ("model.optim.params", "model.optim.args", "model.optim._target_"),
        "belongs to NeMo's other optimizers; this one is mcore_distributed_optim",
    ),
    "model.train_ds": "belongs to NeMo's pre-training; prompts are data.train",
    "model.validation_ds": "belongs to NeMo's pre-training; held-out prompts are data.heldout",
}
"""Keys of NeMo that have no effect here, and why."""


def check_nemo_keys(cfg: DictConfig) -> None:
    """ValueError naming the first key of NeMo's sections that nothing reads, that has the wrong kind of value, or that
    is required and absent. Null is the same as absent."""
    read: dict[str, str] = json.loads(FILE.read_text())
    for section in SECTIONS:
        values = dict(_keys(section, as_plain(cfg[section])))
        for key, value in values.items():
            _check(key, value, read)
        for key, kind in read.items():
            if kind.endswith("!") and key.startswith(f"{section}.") and key not in values:
                raise ValueError(f"{key}: is required: {_WORDS[kind.rstrip('!')]}")


def _keys(where: str, values: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{where}.{name}"
        yield key, value
        if isinstance(value, Mapping) and key not in OPEN:
            yield from _keys(key, value)


def _check(key: str, value: Any, read: Mapping[str, str]) -> None:
    if key in WITHOUT_EFFECT:
        raise ValueError(f"{key}: has no effect: it {WITHOUT_EFFECT[key]}; leave it out")
    kind = read.get(key, "any" if key in OPEN else None)
    if kind is None:
        where = key.rpartition(".")[0]
        beside = [other.rpartition(".")[2] for other in read if other.rpartition(".")[0] == where]
        hint = did_you_mean(key.rpartition(".")[2], beside) or ", so it would have no effect; leave it out"
        raise ValueError(f"{key}: nothing reads this key{hint}")
    required = kind.endswith("!")
    if (value is None and required) or (value is not None and not _is_of_kind(value, kind.rstrip("!"))):
        raise ValueError(f"{key}: must be {_WORDS[kind.rstrip('!')]}, got {short(value)}")


_WORDS = {
    "bool": "true or false", "number": "a finite number", "text": "a text", "list": "a list", "mapping": "a mapping"
}  # fmt: skip


def _is_of_kind(value: Any, kind: str) -> bool:
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)
    kinds: dict[str, type] = {"bool": bool, "text": str, "list": list, "mapping": dict, "any": object}
    return isinstance(value, kinds[kind])
