"""Every refusal of the config names the field, and for an unknown key the nearest valid one."""

import json
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from nemo_fiberpo.aligner.config.checks import check_batches, check_sections, check_shape
from nemo_fiberpo.aligner.config.model_checks import check_all_forward, recompute_warnings
from nemo_fiberpo.aligner.config.precision import check_precision
from nemo_fiberpo.aligner.config.sections import algorithm_settings, data_settings, reward_settings
from nemo_fiberpo.hydra_support.command_line import overrides
from nemo_fiberpo.objective import Budget, Stratum
from nemo_fiberpo.storage import run_lock
from tests.support.launching import arguments, check_each, environment

ALGORITHM = {"samples_per_prompt": 8, "prompts_per_rollout": 96, "optimizer_steps": 4}
STRATA = {"domain": {"budget": {"pos": 0.02, "neg": 0.015}}, "trajectory": {"budget": {"pos": 1, "neg": 0.5}}}
HIERARCHY = {"token_clip": 0.04, "strata": STRATA}


def settings(**changes):
    return algorithm_settings(OmegaConf.create({"algorithm": ALGORITHM | changes}))


@pytest.mark.parametrize(
    ("changes", "strata", "size", "words"),
    [
        ({"passes": 1, "packing": True}, ["prompt_group", "trajectory"], 8, ["algorithm.passes", "by length"]),
        ({"passes": 1}, ["prompt_group", "trajectory"], 12, ["model.micro_batch_size: 12", "samples_per_prompt = 8"]),
    ],
)
def test_one_pass_that_cannot_be_exact_is_refused_at_once(changes, strata, size, words):
    chain = [Stratum(name, Budget(0.1, 0.1)) for name in strata]
    with pytest.raises(ValueError) as error:
        settings(**changes).check_passes(chain, size)
    for word in words:
        assert word in str(error.value)
    settings(**changes | {"passes": 2}).check_passes(chain, size)
    inside = Stratum("trajectory_expert", Budget(0.1, 0.1), join=("trajectory", "expert_partition"))
    settings(**changes).check_passes([chain[-1], inside], size)


def test_whole_groups_fit_into_micro_batches_or_are_refused():
    chain = [Stratum(name, Budget(0.1, 0.1)) for name in ("domain", "prompt_group", "trajectory")]
    whole = settings(micro_batches="whole_groups")
    assert whole.whole_groups and not settings().whole_groups
    whole.check_passes(chain, 24)
    with pytest.raises(ValueError, match=r"algorithm.micro_batches: whole_groups, .* = 12 is not a multiple"):
        whole.check_passes(chain, 12)
    settings(micro_batches="whole_groups", packing=True, passes=1).check_passes(chain[1:], 8)
    with pytest.raises(ValueError, match="micro_batches: must be any or whole_groups"):
        settings(micro_batches="groups")


@pytest.mark.parametrize("passes", [0, 3, True, "two"])
def test_passes_are_one_two_auto_or_all_forward(passes):
    assert settings(passes="auto").passes == "auto" and not settings(passes="auto").all_forward
    assert settings(passes="all_forward").all_forward
    with pytest.raises(ValueError, match="passes: must be 1, 2, auto or all_forward"):
        settings(passes=passes)


def test_what_is_kept_on_the_host_is_kept_by_all_forward():
    assert settings(passes="all_forward", kept_on="host").kept_on == "host"
    with pytest.raises(ValueError, match=r"kept_on: host goes with passes: all_forward, got passes: 2; leave it out"):
        settings(kept_on="host")


def test_all_forward_refuses_by_the_name_of_the_key_and_warns_without_recomputation():
    model = OmegaConf.create({"cpu_offloading": True})
    with pytest.raises(ValueError, match=r"^algorithm.passes: all_forward, but model.cpu_offloading: True is refused"):
        check_all_forward(model)
    model.cpu_offloading = False
    check_all_forward(model)
    [line] = recompute_warnings(model)
    assert (
        line.startswith("algorithm.passes: all_forward holds") and "activations_checkpoint_granularity to full" in line
    )
    assert recompute_warnings(OmegaConf.create({"activations_checkpoint_granularity": "full"})) == []


def test_sizes_follow():
    assert settings().samples_per_step == 192


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples_per_promt": 8}, ["algorithm.samples_per_promt", "did you mean 'samples_per_prompt'"]),
        ({"samples_per_prompt": None}, ["algorithm.samples_per_prompt", "required"]),
        ({"samples_per_prompt": 1}, ["algorithm.samples_per_prompt", "baseline", "given"]),
        ({"samples_per_prompt": 2.5}, ["algorithm.samples_per_prompt", "whole number"]),
        ({"optimizer_steps": 5}, ["algorithm.optimizer_steps", "divide", "96"]),
        ({"epochs": 0}, ["algorithm.epochs", "at least 1"]),
        ({"rl_steps": -2}, ["algorithm.rl_steps", "at least -1"]),
        ({"advantage": "group_normalised"}, ["algorithm.advantage", "did you mean 'group_normalized'"]),
        ({"weights": "token"}, ["algorithm.weights", "token_mean"]),
        ({"weights": "fixed_length_mean"}, ["algorithm.fixed_length"]),
        ({"fixed_length": 100}, ["algorithm.fixed_length", "only there"]),
        ({"truncated": "drop"}, ["algorithm.truncated", "keep", "mask"]),
        ({"packing": 1}, ["algorithm.packing", "true or false"]),
        ({"passes": 3}, ["algorithm.passes", "1, 2, auto or all_forward"]),
        ({"kl": {"coefficient": -1}}, ["algorithm.kl.coefficient", "at least 0"]),
        ({"kl": {"coeficient": 1}}, ["algorithm.kl.coeficient", "did you mean 'coefficient'"]),
        ({"kl": 3}, ["algorithm.kl", "mapping"]),
        ({"val_check_interval": 3, "save_interval": 4}, ["algorithm.save_interval", "multiple", "3"]),
    ],
)
def test_algorithm_refusals(changes, words):
    with pytest.raises(ValueError) as error:
        settings(**changes)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("reader", "section", "values", "words"),
    [
        (data_settings, "data", {"trian": "x"}, ["data.trian", "did you mean 'train'"]),
        (data_settings, "data", {"train": "x", "too_long": "cut"}, ["data.too_long", "error", "drop"]),
        (data_settings, "data", {"heldout": "x"}, ["data.train", "required"]),
        (reward_settings, "rewards", {"kind": "rule"}, ["rewards.kind", "did you mean 'rules'"]),
        (reward_settings, "rewards", {"kind": "server"}, ["rewards.server", "address"]),
        (
            reward_settings,
            "rewards",
            {"kind": "server", "server": {"ip": "h"}, "score": "raw"},
            ["rewards.score: 'raw'", "only to kind: rules"],
        ),
        (reward_settings, "rewards", {"max_failed": 1.5}, ["rewards.max_failed", "from 0 to 1", "1.5"]),
        (reward_settings, "rewards", {"max_failed": "half"}, ["rewards.max_failed", "a number", "'half'"]),
        (reward_settings, "rewards", {"unsafe_tasks": "countdown"}, ["rewards.unsafe_tasks", "[countdown]"]),
        (reward_settings, "rewards", {"unsafe_tasks": ["cuontdown"]}, ["rewards.unsafe_tasks", "mean 'countdown'"]),
        (reward_settings, "rewards", {"timelimit": 2}, ["rewards.timelimit", "did you mean 'time_limit'"]),
    ],
)
def test_section_refusals(reader, section, values, words):
    with pytest.raises(ValueError) as error:
        reader(OmegaConf.create({section: values}))
    for word in words:
        assert word in str(error.value)


def test_evaluations_without_held_out_prompts_are_refused():
    data = data_settings(OmegaConf.create({"data": {"train": "not made yet"}}))
    with pytest.raises(ValueError, match=r"^algorithm\.val_check_interval: 2 evaluates data\.heldout.* set it to 0"):
        settings(val_check_interval=2, save_interval=2).check_data(data)
    settings(val_check_interval=0, save_interval=2).check_data(data)


def test_fewer_prompts_than_a_rollout_takes_are_refused(tmp_path):
    path = tmp_path / "train.jsonl"
    data = data_settings(OmegaConf.create({"data": {"train": str(path)}}))
    settings().check_data(data)  # there is no such file yet
    path.write_text('{"prompt": "1"}\n\n' * 95)
    with pytest.raises(
        ValueError, match=rf"^algorithm\.prompts_per_rollout: 96, but data\.train = {path} has 95 prompts"
    ):
        settings().check_data(data)
    path.write_text('{"prompt": "1"}\n' * 95 + '{"prompt": "2"}')
    settings().check_data(data)


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ("bf61", "did you mean 'bf16'"),
        ("fp8", "valid: 32, 32-true, bf16, bf16-mixed"),
        (16, "16: float16 needs a loss scale"),
        ("16", "'16': float16"),
        ("16-mixed", "use bf16, or 32"),
        ("16-true", "use bf16, or 32"),
        ("fp16", "use bf16, or 32"),
        (64, "64 is unknown"),
        (True, "True is unknown"),
        (None, "None is unknown"),
    ],
)
def test_a_precision_that_is_not_trained_in_is_refused(precision, words):
    with pytest.raises(ValueError, match=r"^trainer\.precision: ") as error:
        check_precision(precision)
    assert words in str(error.value)


CHECKED = {
    "algorithm.val_check_interval=2 algorithm.save_interval=2 data.heldout=null": "error: algorithm.val_check_interval",
    "algorithm.prompts_per_rollout=96": "error: algorithm.prompts_per_rollout: 96, but data.train",
    "resume.allow=[hierarchie]": "error: resume.allow: 'hierarchie'",
    "resume.allow=[algorithm.optimizer_step]": "error: resume.allow: 'algorithm.optimizer_step'",
    "trainer.precision=bf61": "error: trainer.precision: 'bf61'",
    "model.ppo.length_params.max_length=53": "error: model.encoder_seq_length: 64 is less than data.max",
    "model.ppo.length_params.max_length=0": "error: model.ppo.length_params.max_length: must be a whole number",
    "trainer.max_time=00:04:00:00": "error: trainer.max_time: '00:04:00:00'",
    "trainer.precision=16": "error: trainer.precision: 16: float16",
    "trainer.precision=16-mixed": "error: trainer.precision: '16-mixed': float16",
    "": "fine",
}


def test_check_refuses_by_the_name_of_the_field(tmp_path):
    (tmp_path / "data").mkdir()
    line = {"prompt": "1", "domain": "d", "grader": "math_verify", "answer": "1"}
    (tmp_path / "data" / "train.jsonl").write_text(8 * f"{json.dumps(line)}\n")
    found, _ = check_each([arguments(tmp_path, *wrong.split()) for wrong in CHECKED])
    assert [line[: len(words)] for line, words in zip(found, CHECKED.values(), strict=True)] == list(CHECKED.values())
    assert not (tmp_path / run_lock.NAME).exists(), "looking at a config takes no lock"


NEMO = """
import sys
from nemo.collections.nlp.parts.utils_funcs import torch_dtype_from_precision
from nemo_fiberpo.aligner.config.precision import PRECISIONS
print(*{torch_dtype_from_precision(precision) for precision in PRECISIONS})
"""


@pytest.mark.slow
def test_every_precision_of_the_list_is_one_of_nemos():
    said = subprocess.check_output([sys.executable, "-c", NEMO], env=environment(), text=True)
    assert sorted(said.splitlines()[-1].split()) == ["torch.bfloat16", "torch.float32"]


def test_unknown_keys_of_checked_sections_reach_the_check_past_hydra():
    arguments = ["hierarchy=trajectory", "hierarchy.strata.domain.slope=3", "algorithm.epochs=2", "model.optim.lr=1"]
    arguments += ["+x=1", "~hierarchy.strata.domain", "+hierarchy.strata.x={budget: {pos: 1, neg: 1}}"]
    forced = ["hierarchy.strata.domain.slope=3", "algorithm.epochs=2"]
    assert overrides(arguments) == [f"++{argument}" if argument in forced else argument for argument in arguments]


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (
            {"hierarchy": {"token_clip": 1, "strata": STRATA | {"domian": {"slope": 3}}}},
            ["hierarchy.strata.domian.budget", "did you mean the stratum 'domain'"],
        ),
        ({"hierarchy": HIERARCHY | {"token_clip": 0}}, ["hierarchy.token_clip", "greater than 0"]),
        (
            {"hierarchy": {"token_clip": 1, "strata": STRATA | {"domain": {"budget": {"po": 3}}}}},
            ["hierarchy.strata.domain.budget.po", "did you mean 'pos'"],
        ),
    ],
)
def test_section_and_hierarchy_refusals(cfg, words):
    with pytest.raises(ValueError) as error:
        check_sections(OmegaConf.create(cfg))
    for word in words:
        assert word in str(error.value)


def test_an_unknown_section_is_refused():
    with pytest.raises(ValueError, match=r"^algoritm: unknown key; did you mean 'algorithm'"):
        check_shape(OmegaConf.create({"hierarchy": HIERARCHY, "algoritm": {}}))


def batches(**model):
    ppo = {"rollout_micro_batch_size": 32, "forward_micro_batch_size": 16} | model.pop("ppo", {})
    return OmegaConf.create({"algorithm": ALGORITHM, "model": {"micro_batch_size": 16, "ppo": ppo} | model})


@pytest.mark.parametrize(
    ("cfg", "field"),
    [
        (batches(ppo={"rollout_micro_batch_size": 12}), "model.ppo.rollout_micro_batch_size"),
        (batches(ppo={"rollout_micro_batch_size": 512}), "algorithm.prompts_per_rollout"),
        (batches(micro_batch_size=36), "samples per optimizer step"),
        (batches(ppo={"forward_micro_batch_size": 100}), "model.ppo.forward_micro_batch_size"),
    ],
)
def test_batch_sizes_that_do_not_fit(cfg, field):
    with pytest.raises(ValueError, match="multiple") as error:
        check_batches(cfg, data_parallel_size=2)
    assert field in str(error.value)


def test_batch_sizes_that_fit():
    check_batches(batches(), data_parallel_size=2)


def test_context_parallel_ranks_generate_responses_of_their_own():
    with pytest.raises(ValueError, match="x 16 data- and context-parallel ranks = 512"):
        check_batches(batches(), data_parallel_size=2, context_parallel_size=8)
    check_batches(batches(), data_parallel_size=2, context_parallel_size=2)
