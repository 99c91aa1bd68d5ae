"""The command `fiberpo`: which configuration is meant, what is said where none is, and screens of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.plan.configs import ROOT, Run, plan_of

OWN = "defaults: [cluster/mixtral_8x7b, {override /hierarchy: tree}, _self_]\nname: mine\n"


def fiberpo(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nemo_fiberpo.cli", *arguments],
        cwd=cwd, text=True, capture_output=True, timeout=120, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: is neither the name of a file in"),
        (["nowhere"], "there are quickstart, cluster/llama3_1_8b"),
        (["quikstart"], "did you mean quickstart?"),
        (["mixtral_8x7b"], "did you mean cluster/mixtral_8x7b or cluster/mixtral_8x22b?"),
        (["cluster/llama3_1_8"], "did you mean cluster/llama3_1_8b?"),
        (["conf/nowhere.yaml"], "conf/nowhere.yaml: there is no such file"),
        (["conf/quikstart.yaml"], "did you mean conf/quickstart.yaml"),
        (["base"], "base: has no section model, algorithm, hierarchy; a run begins with defaults: [base, "),
        (["quickstart", "hierarchy=nowhere"], "hierarchy/nowhere"),
        (["quickstart", "hierarchy=tre"], "Could not find 'hierarchy/tre'; did you mean 'tree'?"),
        (["quickstart", "model.nowhere=1"], "model.nowhere"),
        (["quickstart", "no override"], "override 'no override': "),
        (["quickstart", "data.train=[1"], "override 'data.train=[1': no viable alternative at input '[1'; write KEY"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_one_line(arguments: list[str], said: str, run: Run):
    status, printed, error = run(*arguments)
    assert status == 2 and not printed
    assert len(error.splitlines()) == 1 and error.startswith("error: ") and said in error


def test_without_a_configuration_the_known_ones_are_listed(run: Run):
    status, printed, said = run()
    assert status == 2 and not printed and "usage: fiberpo plan" in said
    named = {line.strip() for line in said.splitlines()}
    files = [*(ROOT / "conf").glob("*.yaml"), *(ROOT / "conf" / "cluster").glob("*.yaml")]
    names = {str(file.relative_to(ROOT / "conf").with_suffix("")) for file in files} - {"base"}
    assert names <= named and "base" not in named


@pytest.mark.parametrize("given", ["{folder}/mine.yaml", "mine.yaml", "./mine"])
def test_a_file_outside_of_conf_has_its_defaults_there(
    given: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "with space, and 'quotes'"
    (folder / "hierarchy").mkdir(parents=True)
    (folder / "mine.yaml").write_text(OWN.replace("tree", "own_tree"))
    tree = yaml.safe_load((ROOT / "conf" / "hierarchy" / "tree.yaml").read_text())
    (folder / "hierarchy" / "own_tree.yaml").write_text(yaml.dump(tree, sort_keys=False))
    monkeypatch.chdir(folder)
    status, printed, said = run(given.format(folder=folder), "--json")
    assert (status, said) == (0, "")
    found = json.loads(printed)
    assert found["layout"]["world"] == 32 and list(found["cells"]["strata"]) == list(tree["strata"])


def test_files_beside_a_configuration_that_it_does_not_use_may_have_names_of_conf(tmp_path: Path, run: Run):
    for name in ("quickstart", "mine", "hierarchy/tree", "hierarchy/domain"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text("{}" if name != "mine" else OWN.replace("tree", "trajectory"))
    assert run(str(tmp_path / "mine.yaml"))[0] == 0
    status, _, error = run(str(tmp_path / "mine.yaml"), "hierarchy=tree")
    assert status == 2 and error.startswith(f"error: {tmp_path}/hierarchy/tree.yaml: the training script would take")


def test_a_name_is_looked_up_in_conf_here_too(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    assert run("mine")[0] == 0 and run("cluster/mixtral_8x7b")[0] == 0
    assert {"  mine", "  cluster/mixtral_8x7b"} <= set(run()[2].splitlines())


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"quickstart.yaml": OWN}, "the training script would take"),
        ({"mine.yaml": OWN, "hierarchy/tree.yaml": "{}"}, "the training script would take"),
        ({"mine.yaml": OWN.replace("8x7b", "8x7c")}, "Could not load 'cluster/mixtral_8x7c'"),
        ({"mine.yaml": "a: [1"}, "expected ',' or ']'"),
        ({"mine.yaml": "- 1"}, "must be a mapping"),
        ({"mine.yaml": ""}, "has no section model"),
        ({"mine.yml": OWN}, "Hydra reads only .yaml; rename it to mine.yaml"),
    ],
)
def test_a_file_outside_of_conf_that_cannot_be_taken_is_one_line(
    files: dict[str, str], said: str, tmp_path: Path, run: Run
):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    status, printed, error = run(str(tmp_path / next(iter(files))))
    assert status == 2 and not printed
    assert len(error.splitlines()) == 1 and str(tmp_path) in error and said in error


@pytest.mark.parametrize("arguments", [["plan", "cluster/mixtral_8x7b"], ["plan", "--help"], ["plan"]])
def test_a_reader_that_leaves_is_no_error(arguments: list[str]):
    process = subprocess.Popen(
        [sys.executable, "-m", "nemo_fiberpo.cli", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # what `| head` does, but before the first line
    said = process.stderr.read()
    assert process.wait(timeout=120) == (2 if len(arguments) == 1 else 0)
    assert "Traceback" not in said and "BrokenPipe" not in said


def test_help_names_every_command_and_argument():
    done = fiberpo("--help")
    names = ("train", "check", "plan", "compare", "calibrate", "import-hf", "export-hf")
    assert done.returncode == 0 and all(re.search(rf"^    {name} +\w", done.stdout, re.M) for name in names)
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    for command, arguments in (("import-hf", ("DIR", "OUT.nemo")), ("export-hf", ("RUN.nemo", "DIR"))):
        done = fiberpo(command, "--help")
        assert done.returncode == 0 and all(f"  {name}  " in done.stdout for name in arguments), done.stdout


def test_on_the_cpu_nothing_is_compared_with_a_gpu(run: Run):
    status, printed, said = run("quickstart", "trainer.devices=2", "algorithm.kl.coefficient=0.1")
    assert (status, said) == (0, "")
    assert "2 ranks: 1 x 2 processes on the CPU, no GPU" in printed
    assert not any(word in printed for word in ("79.6", "73.6", "1024", "TFLOPS", "GB/s", "of 0", "fits"))
    found = json.loads(run("quickstart", "trainer.devices=2", "--json")[1])
    assert found["cpu"] and found["times"] is None and set(found["assumptions"]) == {"host", "vocab_size", "labels"}


def test_on_the_cpu_no_size_of_a_gpu_refuses_or_warns():
    small = plan_of("quickstart", "cluster.gpu_memory_gib=0.1", "cluster.reserve_gib=0", "cluster.host_memory_gib=1e-6",
                    "algorithm.kl.coefficient=0.1", "trainer.devices=1")  # fmt: skip
    assert small.problems == [] and small.warnings == [] and small.host_bytes > 0


def test_one_rank_sends_nothing(run: Run):
    printed = run("quickstart", "trainer.devices=1")[1]
    assert "nothing is sent" in printed and "bytes" not in printed
    assert "bytes" in run("quickstart", "trainer.devices=2")[1]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cpu=false"], "trainer.accelerator: cpu, but cpu is false"),
        (["trainer.accelerator=gpu"], "trainer.accelerator: 'gpu', but cpu is true"),
        (["trainer.precision=bf17"], "trainer.precision: 'bf17' is unknown; did you mean 'bf16'?"),
        (["resume.allow=[hierarcy]"], "resume.allow: 'hierarcy' is not a key that must stay the same"),
        (
            ["algorithm.val_check_interval=30", "data.heldout=null"],
            "algorithm.val_check_interval: 30 evaluates data.heldout, which is not set",
        ),
        (["seed=x"], "seed: must be a whole number from 0 to 2147483647, got 'x'"),
        (["model.optim.lr='1e-6'"], "model.optim.lr: must be a finite number, got '1e-6'"),
        (["+model.num_layer=2"], "model.num_layer: nothing reads this key; did you mean 'num_layers'?"),
        (["data.train=/tmp"], "/tmp: cannot be read: is no regular file"),
        (["algorithm.prompts_per_rollout=a"], "algorithm.prompts_per_rollout: must be a whole number"),
        (["algorithm.optimizer_steps=0"], "algorithm.optimizer_steps: must be a whole number"),
    ],
)
def test_what_the_training_script_refuses_is_refused_once(overrides: list[str], said: str):
    problems = plan_of("quickstart", *overrides).problems
    assert len(problems) == 1 and problems[0].startswith(said), problems


def test_missing_files_are_reported_as_not_checked(run: Run):
    status, printed, _ = run("quickstart", "data.train=/nope.jsonl")
    assert status == 0 and "not checked: data.train: there is no /nope.jsonl" in printed


def test_an_unresolved_reference_is_reported_whatever_else_is_wrong():
    lost = "model.hidden_size: Interpolation key 'nowhere' not found"
    given = "model.hidden_size=${nowhere}"
    assert plan_of("quickstart", given).problems == [lost]
    # model.global_batch_size refers to the optimizer steps, and has no problem of its own
    for other in ("trainer.precision=bf17", "algorithm.optimizer_steps=0"):
        problems = plan_of("quickstart", given, other).problems
        assert len(problems) == 2 and problems[0].startswith(other.split("=")[0]) and problems[1] == lost, problems


def test_a_configuration_without_the_key_cpu_is_one_for_gpus():
    plan = plan_of("quickstart", "~cpu", "trainer.accelerator=gpu")
    assert plan.problems == [] and not plan.cpu
    assert plan_of("quickstart", "~cpu").problems[0].startswith("trainer.accelerator: cpu, but cpu is false")


def test_prompts_that_do_not_fill_a_rollout_are_refused(tmp_path: Path):
    line = json.dumps({"prompt": "1+1=", "domain": "a", "grader": "math_verify", "answer": "2"}) + "\n"
    (tmp_path / "train.jsonl").write_text(95 * line)
    problems = plan_of("quickstart", f"data.train={tmp_path}/train.jsonl").problems
    assert len(problems) == 1 and "algorithm.prompts_per_rollout: 96, but data.train" in problems[0], problems
    (tmp_path / "train.jsonl").write_text(96 * line)
    plan_of.cache_clear()
    assert plan_of("quickstart", f"data.train={tmp_path}/train.jsonl").problems == []
