"""Gradients and weights that are not finite: the run stops before the step and before the checkpoint."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from nemo_fiberpo import nemo_cpu

nemo_cpu.install()
from nemo_fiberpo.aligner import finite  # noqa: E402
from nemo_fiberpo.aligner.checkpoint.callback import WholeCheckpoints  # noqa: E402
from tests.support import distributed, forked  # noqa: E402
from tests.support.launching import fresh, optimizer_steps  # noqa: E402


class Part:
    """What is used of a Megatron optimizer: its gradient's norm, and Adam's state."""

    def __init__(self, norm: float, moment: float = 0.0):
        self.norm, self.ready = norm, False
        self.optimizer = SimpleNamespace(state={"p": {"exp_avg": torch.tensor([0.0, moment]), "step": 3}})

    def get_grad_norm(self) -> float:
        assert self.ready
        return self.norm


class Optimizer:
    def __init__(self, *parts: Part):
        self.steps = 0
        self.mcore_optimizer = SimpleNamespace(chained_optimizers=parts, prepare_grads=self.prepare)

    def prepare(self) -> None:
        for part in self.mcore_optimizer.chained_optimizers:
            part.ready = True

    def step(self, closure) -> None:
        self.steps += 1


def test_the_norm_is_that_of_all_parts_whether_or_not_it_clips():
    optimizer = Optimizer(Part(3.0), Part(4.0))
    assert finite.step(optimizer, "here") == 5.0 and optimizer.steps == 1


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_stops_before_the_step(norm):
    optimizer = Optimizer(Part(3.0), Part(norm))
    with pytest.raises(ValueError, match=f"^grad_norm: {norm} in optimizer step 7 of RL step 3; stopped before"):
        finite.step(optimizer, "optimizer step 7 of RL step 3")
    assert optimizer.steps == 0


VALUES = [(math.nan, 0.0), (math.inf, 0.0), (0.5, math.inf), (0.5, 0.0)]
"""A weight and a moment of the second rank; the last are good."""


def weights_worker(rank: int, world: int) -> list[tuple[str, list[str]]]:
    """What each rank says, and what its callback did."""
    outcomes = []
    for weight, moment in VALUES:
        model, done = torch.nn.Linear(2, 1), []
        with torch.no_grad():
            model.weight[0, 1] = weight if rank else 0.5
        callback = WholeCheckpoints.__new__(WholeCheckpoints)
        callback.finish_saves = lambda *_, done=done, **__: done.append("finished others")  # type: ignore
        WholeCheckpoints.__mro__[1]._save_checkpoint = lambda *_, done=done: done.append("saved")  # type: ignore
        optimizer = Optimizer(Part(1.0), Part(1.0, moment if rank else 0.0))
        trainer = SimpleNamespace(lightning_module=model, optimizers=[optimizer])
        try:
            callback._save_checkpoint(trainer, "run/step=4.ckpt")
            outcomes.append(("", done))
        except ValueError as error:
            outcomes.append((str(error), done))
    return outcomes


@pytest.mark.distributed
def test_weights_that_are_not_finite_are_never_saved_by_any_rank():
    for rank, outcomes in enumerate(distributed.run(weights_worker, 2, timeout=200.0)):
        *bad, good = zip(VALUES, outcomes, strict=True)
        assert good[1] == ("", ["finished others", "saved"])
        for (_, moment), (said, done) in bad:
            assert done == ["finished others"]
            assert said.startswith("checkpoint step=4: 1 weights of the policy or moments of its optimizer are not")
            assert ("weight has 1" in said) == (rank == 1 and moment == 0.0)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_whose_gradient_overflows_fails_and_keeps_its_checkpoints(start, tmp_path):
    """On-policy the KL penalty has no gradient; at the second optimizer step it is beyond float32."""
    run_dir = fresh(start, tmp_path, "run")
    overrides = ["algorithm.rl_steps=2", "algorithm.save_interval=1", "algorithm.kl.coefficient=1e300"]
    with pytest.raises(AssertionError) as error:
        forked.launch("train_gpt_fiberpo.py", run_dir, *overrides)
    assert "error: grad_norm: " in str(error.value)
    assert "in optimizer step 1 of RL step 0; stopped before the weights changed" in str(error.value)
    [row] = optimizer_steps(run_dir)
    assert math.isfinite(row["train_optim/grad_norm"])
    assert not list((run_dir / "nemo").rglob("manifest.json"))
