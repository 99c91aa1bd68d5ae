"""What every script does around its main."""

import json

import pytest
import torch.distributed as dist
from omegaconf import OmegaConf

from nemo_fiberpo.aligner.config.sections import data_settings
from nemo_fiberpo.aligner.lifecycle.ending import run_main
from nemo_fiberpo.hydra_support.command_line import command_line


def test_a_script_that_ends_well_leaves_no_process_group():
    def main():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.new_group([0])

    run_main(main)
    assert not dist.is_initialized()


def test_an_error_about_the_input_is_one_line():
    cfg = OmegaConf.create({"data": {"trian": "x.jsonl"}})
    with pytest.raises(SystemExit, match=r"^error: data.trian: unknown"):
        run_main(lambda: data_settings(cfg))


def test_an_error_from_elsewhere_keeps_its_traceback():
    with pytest.raises(ValueError, match="invalid literal"):
        run_main(lambda: int("x"))


def test_torchrun_reports_an_error_in_the_input(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        run_main(lambda: data_settings(OmegaConf.create({"data": {"trian": "x.jsonl"}})))
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"].startswith("error: data.trian")


def test_ctrl_c_leaves_no_traceback():
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == 130


def test_options_may_stand_after_overrides():
    given = ["run_dir=x", "--config-dir", "D", "hierarchy=tree", "-cn", "mine", "--cfg=job", "algorithm.epochs=2"]
    options = ["--config-dir", "D", "-cn", "mine", "--cfg=job"]
    assert command_line(given) == [*options, "run_dir=x", "hierarchy=tree", "++algorithm.epochs=2"]


@pytest.mark.parametrize("argument", ["algorithm=null", "hierarchy=", "++model=3", "cluster=~"])
def test_a_group_of_files_that_is_overridden_by_nothing_is_refused(argument):
    with pytest.raises(SystemExit, match="^error: (algorithm|hierarchy|model|cluster): .*name a file of conf/"):
        command_line([argument])
