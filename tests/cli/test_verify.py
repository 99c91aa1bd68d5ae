"""`fiberpo verify`: layouts over gloo that pass, mistakes that do not, and what it says of layouts that cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch.distributed as dist

from nemo_fiberpo.cli import main
from nemo_fiberpo.megatron import step
from nemo_fiberpo.megatron.groups import Reducer
from nemo_fiberpo.objective import build_cells, surrogate, token_weights
from nemo_fiberpo.verification import ranks, steps
from nemo_fiberpo.verification.plans import Sizes
from nemo_fiberpo.verification.ranks import Verification
from tests.support import distributed
from tests.support.launching import ROOT, environment, free_ports


def _own_part(_self: Reducer, buffer: Any) -> Any:
    """Every rank gates by its own part of a cell, as if the others had the same."""
    return buffer * dist.get_world_size()


def _mistaken(name: str) -> None:
    if name == "cells of one rank":
        Reducer.__call__ = _own_part  # type: ignore[method-assign]
    if name == "a gradient as often as there are data-parallel ranks":
        scale = step.loss_scale
        step.loss_scale = lambda number, axes: scale(number, axes) / axes.num_averaged
    if name == "the mean of the micro-batches":
        step.loss_scale = lambda number, axes: axes.num_averaged
    if name == "log-probs of other tokens":
        log_probs = step.current_log_probs
        steps.current_log_probs = lambda *given: [value.roll(1, -1) for value in log_probs(*given)]


def _become_rank(rank: int, world: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def worker(rank: int, world: int, verification: Verification, mistake: str, port: int) -> tuple[bool, str]:
    _become_rank(rank, world, port)
    _mistaken(mistake)
    said: list[str] = []
    return ranks.verify(verification, said.append), "".join(said)


def run(world: int, sizes: Sizes, precision: str, mistake: str) -> tuple[bool, str]:
    verification = Verification(sizes, on_cpu=True, precision=precision)
    outcomes = distributed.run(worker, world, verification, mistake, free_ports(1)[0], timeout=240.0, init=False)
    assert len({passed for passed, _ in outcomes}) == 1 and not any(text for _, text in outcomes[1:])
    print(outcomes[0][1])
    return outcomes[0]


LAYOUTS = [
    (1, Sizes(), "float64"),
    (2, Sizes(cp=2, ep=2), "float64"),
    (2, Sizes(pp=2, vpp=2, packed=True), "float64"),
    (3, Sizes(), "float32"),
    (4, Sizes(tp=2, ep=2, etp=1), "float64"),
    (4, Sizes(tp=2, pp=2, experts=False, sequence_parallel=False), "float64"),
    (2, Sizes(tp=2), "bf16"),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "sizes", "precision"), LAYOUTS)
def test_layouts_take_the_step_of_one_rank(world: int, sizes: Sizes, precision: str):
    passed, said = run(world, sizes, precision, "")
    assert passed, said
    assert said.endswith("this layout computes what one rank does\n")


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["float64", "bf16"])
@pytest.mark.parametrize(
    "mistake",
    [
        "cells of one rank",
        "a gradient as often as there are data-parallel ranks",
        "the mean of the micro-batches",
        "log-probs of other tokens",
    ],
)
def test_mistakes_are_noticed_in_every_precision(mistake: str, precision: str):
    passed, said = run(2, Sizes(experts=False, packed=False), precision, mistake)
    assert not passed, said
    assert "TOO LARGE" in said and "DIFFERENT: dense, padded rows" in said


@pytest.mark.parametrize("samples", [16, 24, 96])
def test_every_regime_occurs_in_the_batch(samples: int):
    batch, chain = steps.random_batch(samples, vocab=64), steps.hierarchy()
    labels = {name: steps.labels_of(batch, name).flatten().contiguous() for name in chain.columns}
    mask = batch["mask"].reshape(-1)
    cells = chain.cells(labels, mask, names=steps.NAMES)
    cells = cells.share([cells.census()], 0)
    weighted = token_weights(build_cells(["trajectory"], labels, mask)) * batch["advantage"].reshape(-1)
    metrics = surrogate(batch["log_ratio"].reshape(-1), weighted, cells, chain).report.metrics()
    for regime in ("pass_through", "rollback", "zeroed"):
        assert sum(value for name, value in metrics.items() if name.endswith(regime)) > 0, regime
    assert 0 < metrics["token/clipped"] < 1
    number = batch["mask"].sum(1)
    assert {0, 1} < set(number.tolist()) and (batch["lengths"] <= steps.LENGTH).all()


@pytest.mark.distributed
def test_the_command_starts_its_ranks_with_the_layout_of_a_config():
    config = ["quickstart", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"]
    command = [sys.executable, "-m", "nemo_fiberpo.cli", "verify", *config, "--cpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tp 2, pp 1, cp 1, dp 1" in done.stdout and "computes what one rank does" in done.stdout.splitlines()[-1]
    assert "mixture of experts, padded rows" in done.stdout and "dense" not in done.stdout


def status_worker(rank: int, world: int, port: int) -> int:
    _become_rank(rank, world, port)
    return main(["verify", "--cpu", "--tolerance", "1e-30"])


@pytest.mark.distributed
def test_the_exit_status_is_1_where_a_difference_is_too_large():
    assert distributed.run(status_worker, 2, free_ports(1)[0], timeout=240.0, init=False) == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tp", "0"], "--tp: must be at least 1, got 0"),
        (["--tp", "2", "--pp", "2", "--ranks", "6"], "take 4 or 8 ranks"),
        (["--ep", "4", "--ranks", "2"], "of ep x etp x pp = 4; take 4 ranks"),
        (["--tp", "2", "--etp", "1"], "--etp: 1 without expert parallelism"),
        (["--vpp", "2"], "set --pp to 2 or more"),
        (["--layers", "transformer_engine"], "needs GPUs; take local"),
        (["model.tensor_model_parallel_size=2"], "is neither the name of a file"),
        (["quickstrat"], "did you mean quickstart"),
    ],
)
def test_what_cannot_be_is_refused_before_any_rank_starts(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["verify", "--cpu", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_help_fits_a_screen(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 50 and "fiberpo verify --tp 2 --pp 2" in text
