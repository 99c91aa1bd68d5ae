"""Steps of a small random model on a layout's ranks, compared with the same step on one rank.

The one rank has the whole batch in one micro-batch, computes the objective by loops (`loops.py`) and takes its
gradient by autograd. The ranks of the layout take the exact step. Log-ratios are given: old log-probs are the model's
own minus them, so that a precision's rounding of log-probs does not decide between regimes of the gates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_fiberpo.megatron.groups import Reducer, TokenAxes
from nemo_fiberpo.megatron.schedule import Policy
from nemo_fiberpo.megatron.step import StepResult, current_log_probs, exact_step
from nemo_fiberpo.objective import Budget, Hierarchy, Stratum
from nemo_fiberpo.verification import shards
from nemo_fiberpo.verification.laying_out import Batch, Step, lay_out, make_policy, make_step, own_parts
from nemo_fiberpo.verification.loops import objective_by_loops
from nemo_fiberpo.verification.model import Layout, make_bare_model, make_model, process_groups

LENGTH = 12
NAMES = {"domain": ["math", "code"]}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A step to compare; those of a run differ in nothing that process groups depend on."""

    name: str
    layout: Layout
    on_policy: bool = False

    @property
    def kind(self) -> tuple[int, bool]:
        """What the reference depends on."""
        return self.layout.experts, self.on_policy


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Largest errors that pass: relative ones of the loss and of every gradient, those of log-probs in nats."""

    loss: float
    log_probs: float
    gradient: float


@dataclasses.dataclass(frozen=True)
class Errors:
    """Of a variant, the largest of all ranks. loss is None on-policy, where the step does not compute it.

    parameter   the one with the largest error of its gradient
    """

    variant: str
    loss: float | None
    log_probs: float
    gradient: float
    parameter: str

    def within(self, tolerance: Tolerance) -> bool:
        pairs = ((self.loss or 0.0, tolerance.loss), (self.log_probs, tolerance.log_probs))
        return all(error <= bound for error, bound in (*pairs, (self.gradient, tolerance.gradient)))  # False for NaN


@dataclasses.dataclass(frozen=True)
class _Reference:
    loss: float
    log_probs: Tensor
    grads: dict[str, Tensor]


def hierarchy() -> Hierarchy:
    """Budgets so tight, and slopes so flat, that every regime occurs."""
    strata = (
        Stratum("domain", Budget(0.02, 0.03), {"code": Budget(0.05, 0.09)}, slope=0.5),
        Stratum("prompt_group", Budget(0.05, 0.04), slope=0.7),
        Stratum("trajectory", Budget(0.06, 0.05)),
    )
    return Hierarchy(strata, token_clip=0.08)


def random_batch(samples: int, vocab: int, seed: int = 7) -> Batch:
    """Trajectories of 2 to LENGTH tokens in scattered order, four per prompt and two prompts per domain in turn; some
    have no response token, some one. `samples` is a multiple of 8."""
    generator = torch.Generator().manual_seed(seed)

    def whole(high: Tensor) -> Tensor:
        return (torch.rand(samples, generator=generator, dtype=torch.float64) * (high + 1)).long()

    order = torch.randperm(samples, generator=generator)
    position = torch.arange(LENGTH - 1)
    number = whole(torch.full((samples,), LENGTH - 3))
    number[order % 8 == 0], number[order % 8 == 1] = 0, 1
    start = whole(LENGTH - 2 - number) + (number == 0)
    noise = torch.randn(samples, LENGTH - 1, generator=generator, dtype=torch.float64) * 0.12
    drift = torch.randn(samples, 1, generator=generator, dtype=torch.float64) * 0.08
    advantage = torch.randn(samples, 1, generator=generator, dtype=torch.float64)
    return {
        "tokens": torch.randint(0, vocab, (samples, LENGTH), generator=generator),
        "lengths": start + number + 1,
        "mask": (position >= start[:, None]) & (position < (start + number)[:, None]),
        "advantage": advantage.expand(-1, LENGTH - 1),
        "log_ratio": drift + noise,
        "domain": order // 8 % 2,
        "prompt_group": order // 4,
        "trajectory": order,
    }


def labels_of(batch: Batch, name: str) -> Tensor:
    """A label per token, [b, s - 1]."""
    return batch[name][:, None].expand_as(batch["mask"])


def compare(variants: Sequence[Variant], batch: Batch, device: torch.device) -> Iterator[Errors]:
    """The errors of every variant, one after the other, the same on every rank.

    SPMD: every rank of the default group calls it, with the same arguments, and takes all that it yields.
    """
    with process_groups(Layout()):
        kinds = {variant.kind: variant for variant in variants}
        references = {kind: _reference(variant, _on(batch, device)) for kind, variant in kinds.items()}
    with process_groups(variants[0].layout):
        for variant in variants:
            yield _errors(variant, _on(batch, device), references[variant.kind])


def _on(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}


def _given(batch: Batch, on_policy: bool) -> Tensor:
    return torch.zeros_like(batch["log_ratio"]) if on_policy else batch["log_ratio"]


def _reference(variant: Variant, batch: Batch) -> _Reference:
    """On this rank only, without communication."""
    layout = variant.layout.on_one_rank()
    model = make_bare_model(layout)
    [laid] = lay_out(layout, [batch], LENGTH, 0)
    policy = make_policy(layout, model, [laid.rows])
    output = policy.forward({"rows": laid.rows}, model)
    log_probs = policy.log_probs(output, {"rows": laid.rows})[:, :-1].double()
    log_ratio = (log_probs - log_probs.detach() + _given(batch, variant.on_policy)).cpu()
    chain = hierarchy()
    labels = {name: labels_of(batch, name).cpu() for name in chain.columns}
    mask, advantage = batch["mask"].cpu(), batch["advantage"].cpu()
    loss = -objective_by_loops(log_ratio, mask, advantage, labels, chain, NAMES)
    loss.backward()
    grads = {name: parameter.grad.double().cpu() for name, parameter in shards.named_parameters(model)}  # type: ignore[union-attr]
    return _Reference(loss.item(), log_probs.detach(), grads)


def _errors(variant: Variant, batch: Batch, reference: _Reference) -> Errors:
    layout, given = variant.layout, _given(batch, variant.on_policy)
    model, axes = make_model(layout), TokenAxes.from_parallel_state()
    batch = {**batch, "given": given, "reference": reference.log_probs, "old": reference.log_probs - given}
    step = make_step(layout, batch, hierarchy(), labels_of, NAMES, axes)
    policy = make_policy(layout, model, step.rows)
    error, step = _with_own_old(layout, batch, step, policy, axes)
    tokens = step.tokens
    result = exact_step(policy, step.microbatches, tokens, hierarchy(), Reducer(axes), on_policy=variant.on_policy)
    return _of_all_ranks(variant, result, max(error, result.recompute_error), model, reference)


def _with_own_old(layout: Layout, batch: Batch, step: Step, policy: Policy, axes: TokenAxes) -> tuple[float, Step]:
    """The largest error of this rank's log-probs on live tokens, 0 where it has none; and the step with old log-probs
    that are its own minus the given log-ratios."""
    parts, laid = own_parts(layout, batch, axes)
    error, old = 0.0, list(step.tokens.old_log_probs)
    for index, current in enumerate(current_log_probs(policy, step.microbatches)):
        entry, part = laid[index], parts[index]
        difference = (current.double() - entry.take(part["reference"], 0.0)).abs()
        mask = step.tokens.mask[index]
        error = max(error, float(torch.where(mask, difference, 0.0).nan_to_num(torch.inf).amax()))
        old[index] = torch.where(mask, current.double() - entry.take(part["given"], 0.0), old[index])
    return error, dataclasses.replace(step, tokens=dataclasses.replace(step.tokens, old_log_probs=old))


def _of_all_ranks(
    variant: Variant, result: StepResult, log_probs: float, model: object, reference: _Reference
) -> Errors:
    """The first rank puts the shards of all ranks together."""
    grads = {
        name: dataclasses.replace(part, value=part.value.double().cpu())
        for name, part in shards.gradients(model).items()
    }
    first, ranks = dist.get_rank() == 0, dist.get_world_size()
    every: list = [None] * ranks
    dist.gather_object((grads, result.loss, log_probs), every if first else None)
    found: list = [None]
    if first:
        gradient, parameter = shards.largest_gradient_error([entry[0] for entry in every], reference.grads)
        loss = None if result.loss is None else _worst(abs(one / reference.loss - 1) for _, one, _ in every)
        found = [Errors(variant.name, loss, _worst(entry[2] for entry in every), gradient, parameter)]
    dist.broadcast_object_list(found)
    errors: Errors = found[0]
    return errors


def _worst(errors: Iterator[float]) -> float:
    return max(errors, key=lambda error: (error != error, error))
