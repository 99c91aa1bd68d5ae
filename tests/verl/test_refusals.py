"""Where the step cannot be exact, or the config is not what it must be, an error says so: never another objective."""

from __future__ import annotations

from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.verl.host import HIERARCHY, make_batch, save_model
from tests.verl.ranks import steps

FIBERPO = {"loss_mode": "fiberpo", "hierarchy": HIERARCHY}
CONF = Path(__file__).parents[2] / "conf" / "hierarchy"
CASE = {"micro_batch_size": 8, "policy_loss": FIBERPO}


def test_verl_loads_the_plug_in_and_finds_its_engines():
    assert [entry.value for entry in entry_points(group="verl.plugins")].count("nemo_fiberpo.integrations.verl") == 1
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.engine import EngineRegistry

    for backend in ("fsdp", "fsdp2", "megatron"):
        assert EngineRegistry.get_engine_cls("language_model", backend).__name__.startswith("FiberPO")
        kept = EngineRegistry._engines["language_model"][backend]["cuda"]
        assert kept.__module__.startswith("verl."), "verl's own engines stay registered"
    assert get_policy_loss_fn("fiberpo").__module__ == "nemo_fiberpo.integrations.verl"


def test_config_of_verl_takes_a_hierarchy(tmp_path: Path):
    import verl.trainer
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass

    from nemo_fiberpo.integrations.verl import FiberPOConfig

    file = tmp_path / "domain.yaml"
    OmegaConf.save(OmegaConf.create(HIERARCHY), file)
    actor = "actor_rollout_ref.actor"
    overrides = [
        f"{actor}.policy_loss._target_=nemo_fiberpo.integrations.verl.FiberPOConfig",
        f"{actor}.policy_loss.loss_mode=fiberpo",
        f"+{actor}.policy_loss.hierarchy={file}",
        f"{actor}.strategy=fsdp2",
        f"{actor}.ppo_micro_batch_size_per_gpu=1",
    ]
    with initialize_config_dir(str(Path(verl.trainer.__file__).parent / "config"), version_base=None):
        config = omega_conf_to_dataclass(compose("ppo_trainer", overrides).actor_rollout_ref.actor)
    assert isinstance(config.policy_loss, FiberPOConfig)
    assert [stratum.name for stratum in config.policy_loss.parsed[0].strata] == ["domain", "prompt_group", "trajectory"]
    assert config.policy_loss.get("clip_cov_ratio") == 0.0002


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hierarchy": None}, r"policy_loss\.hierarchy: is required"),
        ({"hierarchy": {**HIERARCHY, "token_clip": -1}}, "token_clip: must be"),
        ({"objective": "gsop"}, r"policy_loss\.objective: must be one of fiberpo, ppo"),
        ({"objective": "gspo", "gating": {"low": 0.1}}, r"policy_loss\.gating: of objective gspo: .*high"),
        ({"gating": {"low": 0.1}}, r"policy_loss\.gating: fiberpo has use_min"),
        (
            {
                "hierarchy": {
                    "token_clip": 0.1,
                    "strata": {"expert_partition": {"budget": {"pos": 1, "neg": 1}}},
                    "expert_partitions": {},
                }
            },
            "expert_partition: verl does not",
        ),
        ({"hierarchy": str(CONF / "think_answer.yaml")}, r"policy_loss\.hierarchy: token_labels and ignore are for"),
        ({"hierarchy": {**HIERARCHY, "ignore": ["<t>", "</t>"]}}, "token_labels and ignore are for the NeMo-Aligner"),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str):
    from nemo_fiberpo.integrations.verl import FiberPOConfig

    with pytest.raises(ValueError, match=message):
        FiberPOConfig(**{**FIBERPO, **fields})


def test_loss_outside_these_engines_is_an_error():
    from types import SimpleNamespace

    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    arguments = dict.fromkeys(["old_log_prob", "log_prob", "advantages"], torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match=r"not one of nemo_fiberpo's.*fsdp2 on cpu"):
        get_policy_loss_fn("fiberpo")(
            **arguments, response_mask=torch.ones(1, 2), loss_agg_mode="token-mean", config=SimpleNamespace()
        )


def test_loss_of_verl_must_be_its_own_with_our_config():
    from types import SimpleNamespace

    from verl.workers.config.actor import PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    from nemo_fiberpo.integrations.verl import FiberPOConfig, requested

    def distillation_loss(config: Any) -> None:
        pass

    ours, stock = SimpleNamespace(policy_loss=FiberPOConfig(**FIBERPO)), PolicyLossConfig(loss_mode="fiberpo")
    assert requested(partial(ppo_loss, config=ours)) is ours
    assert requested(partial(ppo_loss, config=SimpleNamespace(policy_loss=PolicyLossConfig()))) is None
    with pytest.raises(ValueError, match=r"policy_loss\._target_: must be nemo_fiberpo.*it is PolicyLossConfig"):
        requested(partial(ppo_loss, config=SimpleNamespace(policy_loss=stock)))
    with pytest.raises(ValueError, match="distillation_loss is another loss"):
        requested(partial(distillation_loss, config=ours))


@pytest.mark.distributed
@pytest.mark.slow
def test_every_rank_refuses_what_one_cannot_label(tmp_path: Path):
    save_model(tmp_path)
    batch = make_batch(tmp_path)
    missing = [{**CASE, "without": column} for column in ("data_source", "extra_info")]
    for column, found in zip(("domain", "language"), steps(2, tmp_path, batch, missing), strict=True):
        for outcome in (found, *found["others"]):
            assert f"rank 1: {column}: the hierarchy needs" in outcome["error"]
            assert "rank 0:" not in outcome["error"]


@pytest.mark.distributed
@pytest.mark.slow
def test_dropout_is_refused(tmp_path: Path):
    save_model(tmp_path, attention_dropout=0.1)
    found = steps(1, tmp_path, make_batch(tmp_path), [CASE])[0]
    assert "override_config.attention_dropout: 0.1 is refused" in found["error"]
