"""Gradients and weights that are not finite, found by all ranks alike before they do harm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def step(optimizer: Any, where: str) -> float:
    """Take an optimizer step of NeMo's mcore_distributed_optim; the norm of the gradient before clipping.

    ValueError that says `where`, before a weight or a moment changes, unless that norm is finite: Megatron clips a
    gradient with an infinite norm to zeros and NaN, and its own check looks for NaN alone, on one rank.

    SPMD: every rank calls this. One more all-reduce than the step itself for each of the chained optimizers.
    """
    mcore = optimizer.mcore_optimizer
    mcore.prepare_grads()  # the step does it again, with the same result: there is no loss scale
    norm = math.hypot(*(part.get_grad_norm() for part in _parts(optimizer)))
    if not math.isfinite(norm):
        raise ValueError(
            f"grad_norm: {norm} in {where}; stopped before the weights changed. The same command goes on from the "
            "newest checkpoint; if it comes to this again, lower model.optim.lr or the coefficients of the losses"
        )
    optimizer.step(closure=None)
    return norm


def check_weights(model: torch.nn.Module, optimizer: Any, refused: str) -> None:
    """ValueError, beginning with what is `refused`, unless all weights and all moments of the optimizer are finite.

    SPMD: every rank calls this, with its own part of them. One all-reduce.
    """
    flags = [torch.isfinite(value).logical_not_().sum() for value in _values(model, optimizer)]
    counts = torch.stack(flags).sum() if flags else torch.zeros((), dtype=torch.int64)
    total = counts.reshape(1).to(torch.cuda.current_device())
    torch.distributed.all_reduce(total)
    if int(total):
        named = ((name, torch.isfinite(value).logical_not_().sum()) for name, value in model.named_parameters())
        first = next((f"; {name} has {int(number)} on this rank" for name, number in named if int(number)), "")
        raise ValueError(
            f"{refused}: {int(total)} weights of the policy or moments of its optimizer are not finite{first}. Nothing "
            "is written; the newest checkpoint is from before"
        )


def _values(model: torch.nn.Module, optimizer: Any) -> Iterator[Tensor]:
    yield from (value.detach() for value in model.parameters())
    for part in _parts(optimizer):
        for state in () if part.optimizer is None else part.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value) and value.is_floating_point())


def _parts(optimizer: Any) -> list[Any]:
    """Megatron's optimizers, of which there is one for the experts where these are distributed."""
    mcore = optimizer.mcore_optimizer
    return list(getattr(mcore, "chained_optimizers", [mcore]))
