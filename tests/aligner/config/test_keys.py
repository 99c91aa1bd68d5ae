"""No key is without effect and without a word: a second value of ours changes what is parsed, and something reads that;
of NeMo's sections, what nothing reads is refused."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_fiberpo import config
from nemo_fiberpo.aligner.config import checks, sections
from nemo_fiberpo.aligner.config.algorithm import AlgorithmSettings, HierarchyGating, KlSettings
from nemo_fiberpo.aligner.config.checks import read_training_config
from nemo_fiberpo.aligner.config.data import DataSettings
from nemo_fiberpo.aligner.config.rewards import RewardSettings
from nemo_fiberpo.aligner.config.run import PretrainedCheckpoint, RunSettings
from nemo_fiberpo.aligner.config.warm_start import WarmStartSettings
from nemo_fiberpo.cli.compose import compose
from nemo_fiberpo.nemo_config import keys as nemo_keys
from nemo_fiberpo.nemo_config.keys import check_nemo_keys
from nemo_fiberpo.plan.assumptions import Assumptions
from tests.support.launching import ROOT

# key -> overrides: a second value, and what it needs beside it
SECOND: dict[str, list[str]] = {
    "algorithm.samples_per_prompt": ["=4", "model.ppo.rollout_micro_batch_size=192"],
    "algorithm.prompts_per_rollout": ["=192"],
    "algorithm.objective": ["=grpo", "algorithm.gating={low: 0.2, high: 0.2}"],
    "algorithm.gating": ["={use_min: false}"],
    "algorithm.compile": ["=true"],
    "algorithm.optimizer_steps": ["=2"],
    "algorithm.epochs": ["=2"],
    "algorithm.rl_steps": ["=3"],
    "algorithm.data_epochs": ["=3"],
    "algorithm.advantage": ["=rloo"],
    "algorithm.weights": ["=token_mean"],
    "algorithm.fixed_length": ["=7", "algorithm.weights=fixed_length_mean"],
    "algorithm.truncated": ["=mask"],
    "algorithm.kl": ["={coefficient: 0.1}"],
    "algorithm.packing": ["=true"],
    "algorithm.passes": ["=1", "hierarchy=trajectory"],
    "algorithm.kept_on": ["=host", "algorithm.passes=all_forward"],
    "algorithm.val_check_interval": ["=3", "algorithm.save_interval=3"],
    "algorithm.save_interval": ["=7"],
    "data.train": ["=other.jsonl"],
    "data.heldout": ["=null"],
    "data.max_prompt_length": ["=9"],
    "data.too_long": ["=drop"],
    "data.heldout_greedy": ["=false"],
    "rewards.kind": ["=server", "rewards.server={ip: a}"],
    "rewards.workers": ["=2"],
    "rewards.time_limit": ["=3"],
    "rewards.memory_limit_mib": ["=99"],
    "algorithm.micro_batches": ["=whole_groups"],
    "algorithm.rollout_correction": ["={kind: tis, high: 2.0}"],
    "rewards.score": ["=raw"],
    "rewards.on_failure": ["=zero"],
    "rewards.max_failed": ["=0.1"],
    "rewards.unsafe_tasks": ["=[countdown]"],
    "rewards.graders": ["={mine: 'a:b'}"],
    "rewards.server": ["={ip: a}", "rewards.kind=server"],
    "warm_start.data": ["=other.jsonl"],
    "warm_start.steps": ["=3"],
    "warm_start.batch_size": ["=3"],
    "warm_start.lr": ["=1"],
    "warm_start.stop_reward": ["=0.9"],
    "warm_start.rehearsal": ["=0.9"],
    "warm_start.check_every": ["=3"],
    "warm_start.check_prompts": ["=3"],
    "pretrained_checkpoint.restore_from_path": ["=other.nemo"],
    **{f"cluster.{field.name}": ["=0.77"] for field in dataclasses.fields(Assumptions) if field.type == "float"},
    "cluster.host": ["=megatron"],
    "cluster.vocab_size": ["=77"],
    "cluster.labels": ["={domain: 9}"],
}
KINDS: dict[str, Any] = {
    "algorithm": AlgorithmSettings,
    "data": DataSettings,
    "rewards": RewardSettings,
    "warm_start": WarmStartSettings,
    "pretrained_checkpoint": PretrainedCheckpoint,
    "cluster": Assumptions,
}
PARSERS: dict[str, Any] = {
    "algorithm": sections.algorithm_settings,
    "data": sections.data_settings,
    "rewards": sections.reward_settings,
    "warm_start": sections.warm_start_settings,
    "cluster": sections.cluster_settings,
    "pretrained_checkpoint": sections.pretrained_checkpoint,
}


def sources() -> Iterator[Path]:
    yield from (ROOT / "nemo_fiberpo").rglob("*.py")
    yield from (ROOT / "examples").glob("*.py")


def read_names() -> set[str]:
    """Attributes that the code reads, and arguments of functions that it uses, other than in the checks of a section
    itself."""
    found: set[str] = set()
    for path in sources():
        tree = ast.parse(path.read_text())
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            if function.name == "__post_init__":
                function.body = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.FunctionDef):
                given = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
                used = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
                found |= given & used
    return found


READ = read_names()


def parsed(key: str, *overrides: str) -> Any:
    section, _, field = key.partition(".")
    return getattr(PARSERS[section](compose("quickstart", overrides)), field)


def test_every_key_of_ours_is_walked():
    assert set(SECOND) == {f"{name}.{field.name}" for name, kind in KINDS.items() for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("key", SECOND)
def test_a_second_value_of_a_key_changes_what_is_parsed_and_something_reads_it(key):
    first, *rest = SECOND[key]
    assert parsed(key, key + first, *rest) != parsed(key)
    assert key.partition(".")[2] in READ, "nothing reads it"


@pytest.mark.parametrize("key", [*(entry.name for entry in dataclasses.fields(RunSettings)), "resume"])
def test_keys_beside_the_sections_are_read(key):
    text = "".join(path.read_text() for path in sources() if path.name != "checks.py")
    assert (
        re.search(rf"\bcfg\.{key}\b|cfg\.get\(\"{key}\"", text)
        or f"${{{key}}}" in (ROOT / "conf/base.yaml").read_text()
    )


@pytest.mark.parametrize("of", [HierarchyGating, KlSettings, *filter(None, sections.OBJECTIVES.values())])
def test_fields_of_gating_and_penalty_are_read(of):
    assert {field.name for field in dataclasses.fields(of)} <= READ


def test_fields_of_a_hierarchy_are_read():
    assert {
        *config._HIERARCHY,
        *config._STRATUM,
        "pos",
        "neg",
        "cap",
        "by",
        "layers",
        "membership",
        "agreement",
    } <= READ


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.optim.lr='1e-6'", r"model\.optim\.lr: must be a finite number, got '1e-6'"),
        ("model.optim.lr=nan", r"model\.optim\.lr: must be a finite number, got nan"),
        ("model.optim.lr=null", r"model\.optim\.lr: must be a finite number, got None"),
        ("model.sequence_parallel=0", r"model\.sequence_parallel: must be true or false, got 0"),
        ("+model.num_layer=3", r"model\.num_layer: nothing reads this key; did you mean 'num_layers'\?"),
        ("+model.optim.lrr=3", r"model\.optim\.lrr: nothing reads this key; did you mean 'lr'\?"),
        ("+model.optim.eps=3", r"model\.optim\.eps: has no effect: it is not passed to Megatron's optimizer"),
        ("+model.optim.sched.warmup=3", r"sched\.warmup: nothing reads this key; did you mean 'warmup_steps'\?"),
        ("+trainer.gradient_clip=3", r"trainer\.gradient_clip: nothing reads .* did you mean 'gradient_clip_val'\?"),
        ("trainer.gradient_clip_val=x", r"trainer\.gradient_clip_val: must be a finite number, got 'x'"),
        (
            "+trainer.log_every_n_steps=5",
            r"trainer\.log_every_n_steps: has no effect: it belongs to Lightning's own",
        ),
        ("+exp_manager.foo=1", r"exp_manager\.foo: nothing reads this key, so it would have no effect"),
        ("exp_manager.create_wandb_logger=yes", r"exp_manager\.create_wandb_logger: must be true or false, got 'yes'"),
    ],
)
def test_keys_of_nemos_sections_that_nothing_reads_are_refused(override, message):
    with pytest.raises(ValueError, match=f"^{message}|^[a-z.]*{message}"):
        check_nemo_keys(compose("quickstart", [override]))


def test_no_key_is_both_read_and_without_effect():
    read = nemo_keys.json.loads(nemo_keys.FILE.read_text())
    assert nemo_keys.BY_HAND.items() <= read.items(), "python -m tests.faults keys writes the file"
    assert {kind.rstrip("!") for kind in read.values()} <= {*nemo_keys._WORDS, "any"}


@pytest.mark.parametrize(
    "name", ["quickstart", "cluster/llama3_1_8b", "cluster/mixtral_8x7b", "cluster/qwen3_235b_a22b"]
)
def test_the_configurations_that_ship_have_none(name):
    check_nemo_keys(compose(name, ["data.train=x", "pretrained_checkpoint.restore_from_path=y"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cpu=no", "cpu: must be true or false, got 'no'"),
        ("data.heldout_greedy=no", "data.heldout_greedy: must be true or false"),
        ("rewards.graders=typo", "rewards.graders: must be a mapping {name: package.module:function}"),
        ("rewards.graders={x: 3}", "rewards.graders.x: must be package.module:function, got 3"),
        ("++pretrained_checkpoint.restore_from_pat=x", "pretrained_checkpoint.restore_from_pat: unknown key; did you"),
        ("++exp_manager=3", "exp_manager: must be a mapping, got 3"),
        ("run_dir=0", "run_dir: must be a text, got 0"),
        ("run_dir=", "run_dir: is empty"),
        ("data.train=[a]", "data.train: must be a text, got ['a']"),
        ("data.train=${nowhere}", "data.train: Interpolation key 'nowhere' not found"),
        ("seed=x", "seed: must be a whole number from 0 to 2147483647, got 'x'"),
        ("seed=-1", "seed: must be a whole number from 0 to 2147483647, got -1"),
        ("warm_start.steps=x", "warm_start.steps: must be a whole number of at least 1"),
        ("~model.ppo.forward_micro_batch_size", "model.ppo.forward_micro_batch_size: "),
        ("model.hidden_dropout=0.1", "model.hidden_dropout: 0.1 is refused by the exact step: dropout draws another"),
        ("+model.fp8=true", "model.fp8: True is refused by the exact step"),
        ("~model.optim.betas", "model.optim.betas: is required: a list"),
        ("~trainer.ppo", "trainer.ppo: is required: a mapping"),
        ("algorithm.kl.coefficient=true", "algorithm.kl.coefficient: must be a number, got True"),
    ],
)
def test_every_leaf_is_checked(override, message):
    with pytest.raises(ValueError) as error:
        read_training_config(compose("quickstart", [override]))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", ["data", "rewards", "trainer"])
def test_a_section_must_be_a_mapping(name):
    cfg = compose("quickstart")
    OmegaConf.set_struct(cfg, False)
    cfg[name] = None  # not by an override: where NeMo is imported, Hydra takes `trainer` for a group of files
    with pytest.raises(ValueError, match=f"^{name}: must be a mapping, got None"):
        read_training_config(cfg)


def test_the_amp_of_megatron_follows_the_precision():
    own = ["model=policy", "hierarchy=domain"]
    assert compose("quickstart", own).model.megatron_amp_O2 is False
    assert compose("quickstart", [*own, "trainer.precision=bf16"]).model.megatron_amp_O2 is True


def test_a_logger_whose_package_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^exp_manager\.create_wandb_logger: needs the package wandb"):
        checks.check_loggers(OmegaConf.create({"exp_manager": {"create_wandb_logger": True}}))
    with pytest.raises(
        ValueError, match=r"^wandb: needs the package wandb, which is not installed; pip install 'wandb<0\.20'"
    ):
        checks.check_loggers(OmegaConf.create({"wandb": True, "exp_manager": {"create_wandb_logger": True}}))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere.to_be:found", r"nowhere\.to_be:found: No module named 'nowhere'.* beside the run config"),
        ("tests.support.bad_graders:nothing", "the module has no function 'nothing'"),
    ],
)
def test_graders_that_are_not_there_are_named(target, message):
    with pytest.raises(ValueError, match=rf"^rewards\.graders\.mine: .*{message}"):
        checks.check_graders({"mine": target})
