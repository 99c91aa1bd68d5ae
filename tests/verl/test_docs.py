"""The run script of docs/verl.md is one that verl's config takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import verl.trainer
from hydra import compose, initialize_config_dir
from verl.utils.config import omega_conf_to_dataclass

from nemo_fiberpo.integrations.verl import FiberPOConfig

ROOT = Path(__file__).parent.parent.parent
CONFIG = Path(verl.trainer.__file__).parent / "config"


def overrides() -> list[str]:
    """The arguments of `main_ppo` in the script, its variables put in."""
    text = (ROOT / "docs/verl.md").read_text(encoding="utf-8")
    script = next(block for block in re.findall(r"```bash\n(.*?)```", text, re.S) if block.startswith("#!"))
    values = {
        "MODEL": "Qwen/Qwen3-30B-A3B",
        "DATA": "/data",
        "HIERARCHY": str(ROOT / "conf/hierarchy/domain.yaml"),
        "ACTOR": "actor_rollout_ref.actor",
        "ROLLOUT": "actor_rollout_ref.rollout",
    }
    command = script[script.index("python -m verl.trainer.main_ppo") :].replace("\\\n", " ")
    command = re.sub(r"\$(\w+)", lambda match: values[match[1]], command)
    return shlex.split(command)[3:]


def test_run_script_composes():
    given = overrides()
    assert len(given) > 30
    with initialize_config_dir(str(CONFIG), version_base=None):
        config = compose("ppo_trainer", given)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(actor.policy_loss, FiberPOConfig) and actor.policy_loss.loss_mode == "fiberpo"
    assert actor.policy_loss.parsed[0].strata[0].name == "domain"
    assert actor.engine.strategy == "fsdp2" and actor.engine.ulysses_sequence_parallel_size == 2
    assert config.actor_rollout_ref.actor.use_dynamic_bsz == config.actor_rollout_ref.rollout.log_prob_use_dynamic_bsz
