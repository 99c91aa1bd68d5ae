"""One process of `conversion.test_tensors`: the log-probs that the actor gives an imported policy, to a file.

torchrun --nproc_per_node 1 hf_log_probs.py CONFIG_DIR OUT.pt [overrides]
"""

from __future__ import annotations

import sys

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_fiberpo.aligner import build
from nemo_fiberpo.aligner.config import checks
from nemo_fiberpo.aligner.lifecycle import ending
from nemo_fiberpo.hydra_support import command_line as hydra_config

TOKENS = torch.arange(20).reshape(2, 10) % 45


def main() -> None:
    folder, out, *overrides = sys.argv[1:]
    hydra_config.register_resolvers()
    with initialize_config_dir(config_dir=folder, version_base=None):
        cfg = compose("quickstart", overrides=hydra_config.overrides(overrides))
    OmegaConf.set_struct(cfg, False)
    checks.check_sections(cfg)
    build.start(cfg)
    from nemo_aligner.utils.train_script_utils import init_distributed

    trainer = build.create_trainer(cfg)
    actor = build.load_actor(cfg, trainer)
    init_distributed(trainer, actor)
    build.initialise(cfg, trainer, actor, list(range(cfg.model.global_batch_size)), 1)
    torch.save(actor.log_probs_of(TOKENS, torch.full((2,), 10)), out)
    actor.save_to(out.removesuffix(".pt") + "/again.nemo")
    ending.destroy_process_groups()


if __name__ == "__main__":
    main()
