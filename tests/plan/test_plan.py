"""`fiberpo plan`: the layouts of conf/, everything that is wrong at once, and what it prints."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_fiberpo.aligner.config import checks
from nemo_fiberpo.cli.compose import compose
from nemo_fiberpo.plan.assumptions import Assumptions
from nemo_fiberpo.plan.estimate import times
from nemo_fiberpo.plan.layout import Layout
from nemo_fiberpo.plan.shape import ModelShape
from nemo_fiberpo.plan.table import format_plan
from tests.plan.configs import CLUSTER, ROOT, Run, plan_of

NODES = {"llama3_1_8b": 1, "mixtral_8x7b": 4, "mixtral_8x22b": 16, "qwen3_235b_a22b": 32}


@pytest.mark.parametrize("name", [*CLUSTER, "quickstart"])
def test_every_layout_that_ships_can_run(name: str):
    plan = plan_of(name)
    assert plan.problems == []
    assert plan.memory is not None and plan.cells is not None and plan.layout is not None
    if name != "quickstart":
        assert plan.layout.nodes == NODES[name.removeprefix("cluster/")] and plan.layout.devices == 8
        assert plan.times is not None and plan.times.share < 1e-3


def test_the_dense_layout_runs_on_two_nodes_too():
    assert plan_of("cluster/llama3_1_8b", "trainer.num_nodes=2").problems == []


@pytest.mark.parametrize("name", CLUSTER)
def test_the_training_script_takes_every_layout_for_nemo_aligner_and_no_other(name: str):
    cfg = compose(str(ROOT / "conf" / f"{name}.yaml"), [])
    checks.check_sections(cfg)
    if name.endswith("qwen3_235b_a22b"):
        with pytest.raises(ValueError, match=r"cluster.host: megatron; this layout is for a custom trainer"):
            checks.check_host(cfg)
    else:
        checks.check_host(cfg)
        layout = plan_of(name).layout
        assert layout is not None
        checks.check_batches(cfg, layout.dp, layout.cp)


def test_a_layout_passes_the_training_scripts_own_check():
    done = subprocess.run(
        [
            *(sys.executable, "examples/train_gpt_fiberpo.py", "--check", "--config-name", "cluster/mixtral_8x7b"),
            *("data.train=train.jsonl", "pretrained_checkpoint.restore_from_path=policy.nemo", "run_dir=/nowhere"),
        ],
        cwd=ROOT, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_all_problems_are_reported_at_once():
    plan = plan_of(
        "cluster/mixtral_8x7b",
        "model.tensor_model_parallel_size=3",
        "model.optim.name=adam",
        "algorithm.samples_per_prompt=1",
        "hierarchy.strata.domain.budget.pos=-1",
        "cluster.mfu=2",
        "rewards.workers=0",
    )
    fields = [problem.split(":")[0] for problem in plan.problems]
    for name in (
        "hierarchy.strata.domain.budget.pos",
        "cluster.mfu",
        "algorithm.samples_per_prompt",
        "rewards.workers",
        "model.optim.name",
        "model.sequence_parallel",
        "trainer.num_nodes x devices",
        "model.tensor_model_parallel_size",
    ):
        assert name in fields, plan.problems


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.micro_batch_size=3"], "samples per optimizer step"),
        (["model.ppo.rollout_micro_batch_size=12"], "model.ppo.rollout_micro_batch_size: 12 is not a multiple of"),
        (["+model.virtual_pipeline_model_parallel_size=2"], "NeMo cannot generate with virtual stages"),
        (["model.ppo.length_params.max_length=8000"], "model.encoder_seq_length: 8192 is less than"),
        (["model.expert_model_parallel_size=16"], "model.expert_model_parallel_size: 16 does not divide"),
        (["algorithm.passes=1"], "model.micro_batch_size: 1 is not a multiple of algorithm.samples_per_prompt"),
        (["algorithm.promts_per_rollout=4"], "algorithm.promts_per_rollout: unknown key"),
        (
            [
                "hierarchy=expert_trajectory",
                "hierarchy.expert_partitions.membership=soft",
                "algorithm.objective=gspo",
                "+algorithm.gating={low: 0.1, high: 0.1, stratum: trajectory_expert}",
            ],
            "gating.stratum: 'trajectory_expert' spreads a token over several cells",
        ),
        (["trainer.num_nodes=3", "trainer.devices=7"], "trainer.num_nodes x devices: 3 x 7 = 21 ranks"),
        (["data.max_promt_length=4"], "data.max_promt_length: unknown key; did you mean 'max_prompt_length'"),
        (["data.max_prompt_length=0"], "data.max_prompt_length: must be a whole number of at least 1, got 0"),
        (["model.micro_batch_size=two"], "model.micro_batch_size: must be a whole number of at least 1, got 'two'"),
        (["model.ppo.length_params.max_length=-5"], "length_params.max_length: must be a whole number of at least 1"),
        (["model.ppo.length_params.max_length=x"], "length_params.max_length: must be a whole number of at least 1"),
    ],
)
def test_what_cannot_run_is_refused_by_its_field(overrides: list[str], said: str):
    assert any(said in problem for problem in plan_of("cluster/mixtral_8x7b", *overrides).problems)


def test_the_command_prints_a_table_and_fails_with_all_problems(run: Run):
    status, printed, said = run("cluster/mixtral_8x7b")
    assert status == 0 and not said
    for part in ("32 ranks: 4 x 8", "46.70 B, 12.88 B active", "optimizer", "prompt_group", "reductions", "estimate"):
        assert part in printed
    status, _, said = run("cluster/mixtral_8x7b", "model.micro_batch_size=3", "model.optim.name=adam")
    assert status == 1
    assert len(said.splitlines()) == 3 and all(line.startswith("error: ") for line in said.splitlines())


def test_ranks_that_the_launcher_would_say_are_a_warning_until_they_are_given(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert "warning: trainer.devices: 1, since LOCAL_WORLD_SIZE is not set" in run("quickstart")[1]
    assert "trainer.devices" not in run("quickstart", "trainer.devices=2")[1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "trainer.devices" not in run("quickstart")[1] and "4 ranks: 1 x 4" in run("quickstart")[1]


def test_groups_of_ranks_that_cannot_form_are_not_shown(run: Run):
    status, printed, said = run("cluster/llama3_1_8b", "trainer.devices=3")
    assert status == 1 and "3 ranks are not a multiple of" in said
    assert "3 ranks: 1 x 3" in printed and "groups of" not in printed


def test_json_has_what_the_table_has(run: Run):
    found = json.loads(run("quickstart", "--json", "trainer.devices=2")[1])
    assert found["runs"] and found["layout"]["world"] == 2 and found["groups"]["data"] == {"size": 2, "number": 1}
    assert found["cells"]["strata"]["trajectory"] == [192, 0] and found["cells"]["calls"] == 2
    assert found["memory"]["peak"] > sum(found["memory"]["static"].values())


def test_labels_and_shape_are_those_of_the_data_and_the_checkpoint_that_are_there(tmp_path: Path):
    lines = [
        {"prompt": f"{number}+1=", "domain": domain, "grader": "math_verify", "answer": "1"}
        for number, domain in enumerate(["a"] * 40 + ["b", "c", "d", "e", "f"])
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = tmp_path / "policy.nemo"
    checkpoint.mkdir()
    OmegaConf.save(OmegaConf.create({"num_layers": 2, "num_attention_heads": 4}), checkpoint / "model_config.yaml")
    overrides = [f"data.train={tmp_path}/train.jsonl", f"pretrained_checkpoint.restore_from_path={checkpoint}"]
    plan = plan_of("quickstart", *overrides)
    assert plan.counted and plan.cells is not None and plan.cells.strata["domain"] == (6, 0)
    bare = plan_of("quickstart", "model=policy", *overrides)
    assert any(problem.startswith("model.hidden_size, model.ffn_hidden_size: needed") for problem in bare.problems), (
        bare.problems
    )


def test_a_step_by_hand():
    """One layer of width 1, a vocabulary of 2 not tied: 14 parameters with norms, 12 of them multiplied by."""
    shape = ModelShape(layers=1, hidden=1, heads=1, groups=1, head_dim=1, ffn=1, vocab=2)
    given = Assumptions(peak_tflops=1e-9, mfu=0.5, latency_us=1e6, bandwidth_gb_per_s=1.0)
    assert shape.total.total == 4 + 3 + 2 + 4 + 1 and shape.multiplied == 12
    found = times(shape, Layout(1, 4), 2, 10, 2, 2, 10**9, given)
    assert found.step == pytest.approx(4 * (2 * 12 + 2 * 10) * 20 / (4 * 1e3 * 0.5))
    assert found.reductions == pytest.approx(2 * 2 * math.log2(4) * 1.0 + 2.0)


def test_the_plan_lists_what_it_assumed_about_the_data():
    assert "at most, with cluster.labels" in format_plan(plan_of("cluster/mixtral_8x7b"))


def test_planning_needs_neither_nemo_nor_megatron():
    code = (
        "import sys; from nemo_fiberpo import cli; cli.main(['plan', 'cluster/mixtral_8x22b']);"
        "print([name for name in sys.modules if name.split('.')[0] in ('megatron', 'nemo', 'nemo_aligner')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"
