"""What every script does around its main."""

import pytest
import torch.distributed as dist
from omegaconf import OmegaConf

from nemo_fiberpo.aligner.config.sections import data_settings
from nemo_fiberpo.aligner.lifecycle.ending import explain


def test_a_script_that_ends_well_leaves_no_process_group():
    def main():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.new_group([0])

    explain(main)
    assert not dist.is_initialized()


def test_an_error_about_the_input_is_one_line():
    cfg = OmegaConf.create({"data": {"trian": "x.jsonl"}})
    with pytest.raises(SystemExit, match=r"^error: data.trian: unknown"):
        explain(lambda: data_settings(cfg))


def test_an_error_from_elsewhere_keeps_its_traceback():
    with pytest.raises(ValueError, match="invalid literal"):
        explain(lambda: int("x"))
