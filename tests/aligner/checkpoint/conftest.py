"""A run whose record and checkpoints the tests of this folder look at."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

CONFIG = {
    "run_dir": "",
    "seed": 3,
    "collective_timeout": 20,
    "resume": {"allow": []},
    "hierarchy": {
        "token_clip": 0.2,
        "strata": {
            "domain": {"budget": {"pos": 0.04, "neg": 0.03}},
            "trajectory": {"budget": {"pos": 0.24, "neg": 0.12}},
        },
    },
    "algorithm": {
        "samples_per_prompt": 4,
        "prompts_per_rollout": 8,
        "rl_steps": 4,
        "save_interval": 2,
        "kl": {"coefficient": 0.0},
    },
    "data": {"train": "", "heldout": None},
    "rewards": {"workers": 1, "score": "threshold"},
    "model": {"micro_batch_size": 4, "optim": {"lr": 1e-3}, "tensor_model_parallel_size": 1},
    "trainer": {"precision": 32, "gradient_clip_val": 1.0, "max_steps": -1},
    "pretrained_checkpoint": {"restore_from_path": "start.nemo"},
    "exp_manager": {"explicit_log_dir": ""},
}


@pytest.fixture
def cfg(tmp_path):
    made = OmegaConf.create(CONFIG)
    made.run_dir = str(tmp_path)
    made.exp_manager.explicit_log_dir = str(tmp_path / "nemo")
    made.data.train = str(tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").write_text('{"prompt": "1"}\n')
    return made
