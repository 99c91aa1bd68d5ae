"""A step of the tiny model on a layout's ranks, and the same in one process by plain autograd, to be compared."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from nemo_fiberpo.labelling.expert_partitions import COLUMN
from nemo_fiberpo.megatron.groups import Reducer, TokenAxes
from nemo_fiberpo.megatron.one_pass import one_pass_step
from nemo_fiberpo.megatron.step import exact_step
from nemo_fiberpo.objective import build_cells, surrogate, token_weights
from nemo_fiberpo.verification import shards
from nemo_fiberpo.verification.shards import Gradient
from tests.megatron import batches, partitions, segments, slow, tiny
from tests.megatron.batches import STRATA, Batch
from tests.megatron.partitions import MEMBERSHIP
from tests.megatron.tiny import Layout
from tests.support import distributed

BOUND = 1e-10
Kind = tuple[int, int, bool, bool]


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch and the strata of its hierarchy; `extra` adds a loss beside the objective, `soft` makes expert partitions
    soft."""

    batch: str = "uneven"
    strata: tuple[str, ...] = STRATA
    extra: bool = False
    soft: bool = False

    @property
    def has_experts(self) -> bool:
        return COLUMN in batches.columns(self.strata)


CASES = {
    "uneven": Case(),
    "masked_half": Case("masked_half"),
    "on_policy": Case("on_policy"),
    "penalty": Case(extra=True),
    "trajectory": Case(strata=("trajectory",)),
    "groups_in_two": Case("groups_in_two", ("prompt_group", "trajectory")),
    "experts": Case(strata=(*STRATA, "trajectory_expert")),
    "experts_first": Case(strata=("expert_partition", "domain_expert", "group_expert", "trajectory_expert")),
    "experts_floor": Case(strata=(*STRATA, "floored_expert")),
    "experts_soft": Case(strata=(*STRATA, "trajectory_expert"), soft=True),
    "segments": Case("segments", ("segment", "domain_segment", "trajectory_segment")),
    "segments_inside": Case("segments", (*STRATA, "trajectory_segment")),
    "trajectory_experts": Case(strata=("trajectory", "trajectory_expert")),
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """One process: the batch with its old log-probs, and loss, gradients and metrics of the objective on it.

    Of a case with expert partitions the batch has the router masses, [b, s - 1, P], the labels, [b, s - 1], and where
    they are soft the memberships, uint8 [b, s - 1, P].
    """

    batch: Batch
    loss: float
    extra: float
    grads: dict[str, torch.Tensor]
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a rank's step gave.

    reductions     (ranks, bytes) of the all-reduces that its gates issued
    mass_error     largest |difference| of the router masses that this rank read from those of one process
    same_labels    whether the expert partitions that it made of them, or its segments, are those of one process
    """

    loss: float | None
    extra: float
    metrics: dict[str, float] | None
    recompute_error: float
    grads: dict[str, Gradient]
    reductions: list[tuple[int, int]]
    calls: int
    represents: bool
    mass_error: float = 0.0
    same_labels: bool = True


def reference_worker(rank: int, world: int, kinds: list[Kind], cases: list[str]) -> dict[tuple[Kind, str], Reference]:
    with tiny.megatron(Layout()):
        return {
            (kind, name): _reference(kind, CASES[name])
            for kind in kinds
            for name in cases
            if kind[1] or not CASES[name].has_experts
        }


def _reference(kind: Kind, case: Case) -> Reference:
    """The whole batch in one micro-batch, the slow objective, and autograd through both; no step of ours."""
    layers, experts, rope, tied = kind
    layout = Layout(experts=experts, rope=rope, layers=layers, tied=tied)
    model = tiny.make_model(layout)
    batch = batches.make_batch(case.batch)
    [laid] = batches.lay_out(layout, [batch], batches.LENGTH, 0)
    policy = batches.make_policy(layout, model, [laid.rows])
    watching = partitions.router_inputs(model) if case.has_experts else contextlib.nullcontext([])
    with watching as seen:
        log_probs = policy.log_probs(policy.forward({"rows": laid.rows}, model), {"rows": laid.rows})[:, :-1]
    if case.has_experts:
        batch["masses"] = partitions.slow_masses(seen)[:, :-1]
        batch[COLUMN] = partitions.slow_labels(batch["masses"])
    if case.soft:
        batch[MEMBERSHIP] = partitions.slow_membership(batch["masses"])
    batch["old"] = log_probs.detach() - batch["log_ratio"]
    chain = batches.hierarchy(case.strata)
    loss = -slow.slow_objective(log_probs - batch["old"], batch, chain)
    extra = batches.kl_penalty(log_probs, batch) if case.extra else torch.zeros(())
    (loss + extra).backward()
    model.finish_grad_sync()
    grads = {name: part.value for name, part in shards.gradients(model).items()}
    return Reference(batch, loss.item(), extra.item(), grads, _metrics(batch, case))


def _metrics(batch: Batch, case: Case) -> dict[str, float]:
    """The report of the objective on the plain columns of the samples."""
    needed = batches.columns(case.strata)
    labels = {name: batches.labels_of(batch, name).flatten(0, 1).contiguous() for name in needed}
    mask, chain = batch["mask"].reshape(-1), batches.hierarchy(case.strata)
    cells = chain.cells(labels, mask, names=batches.names(case.strata))
    cells = cells.share([cells.census()], 0)
    weights = token_weights(build_cells(["trajectory"], labels, mask))
    weighted = weights * batch["advantage"].reshape(-1)
    return surrogate(batch["log_ratio"].reshape(-1), weighted, cells, chain).report.metrics()


def references_for(layouts: Sequence[Layout], cases: Sequence[str]) -> dict[tuple[Kind, str], Reference]:
    kinds = sorted({layout.kind for layout in layouts})
    return distributed.run(reference_worker, 1, kinds, list(cases), timeout=600.0)[0]


@contextlib.contextmanager
def counting_reductions() -> Iterator[list[tuple[int, int]]]:
    """(ranks, bytes) of every all-reduce at torch.distributed that a `Reducer` issued."""
    sizes: list[tuple[int, int]] = []
    all_reduce, reduce = dist.all_reduce, Reducer.__call__

    def counted(tensor: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        sizes.append((dist.get_world_size(group), tensor.numel() * tensor.element_size()))
        return all_reduce(tensor, *args, group=group, **kwargs)

    def reducing(self: Reducer, buffer: torch.Tensor) -> torch.Tensor:
        dist.all_reduce = counted
        try:
            return reduce(self, buffer)
        finally:
            dist.all_reduce = all_reduce

    Reducer.__call__ = reducing
    try:
        yield sizes
    finally:
        Reducer.__call__ = reduce


def take_step(
    layout: Layout,
    batch: Batch,
    strata: Sequence[str] = STRATA,
    *,
    make_reducer: Callable[[TokenAxes], Reducer] = Reducer,
    **options: Any,
) -> Outcome:
    """One step on the tiny model, in a rank's process; `options` go to the step."""
    model = tiny.make_model(layout)
    axes = TokenAxes.from_parallel_state(gathered={"cp": layout.gathered} if layout.gathered else None)
    read: tuple[float, bool] = (0.0, True)
    if COLUMN in batches.columns(strata):
        rows = batches.rows_of(layout, batch, axes)
        batch, *read = partitions.label_batch(batches.make_policy(layout, model, rows), rows, batch, axes)
    if segments.SEGMENT in batches.columns(strata):
        batch, same = segments.label_batch(batch, axes)
        read = (0.0, same)
    step = batches.make_step(layout, batch, strata, axes)
    policy = batches.make_policy(layout, model, step.rows)
    chain, reducer = batches.hierarchy(strata), make_reducer(axes)
    with counting_reductions() as sizes:
        if step.parts is not None:
            result = one_pass_step(policy, step.microbatches, step.tokens, step.parts, chain, reducer, **options)
        else:
            result = exact_step(policy, step.microbatches, step.tokens, chain, reducer, **options)
    return Outcome(
        result.loss,
        result.extra_loss,
        result.report.metrics() if result.report else None,
        result.recompute_error,
        shards.gradients(model),
        sizes,
        reducer.calls,
        axes.represents,
        *read,
    )


Job = tuple[Layout, str]


def steps_worker(rank: int, world: int, pickled: bytes) -> list[Outcome]:
    jobs: list[tuple[Layout, Batch, str]] = pickle.loads(pickled)
    with tiny.megatron(jobs[0][0]):
        return [take_step(layout, batch, CASES[case].strata, **options_of(case)) for layout, batch, case in jobs]


def run_steps(
    world: int, jobs: Sequence[Job], references: Mapping[tuple[Kind, str], Reference], timeout: float = 120.0
) -> list[list[Outcome]]:
    """Outcomes of all ranks, job by job; the layouts of the jobs differ in nothing that process groups depend on."""
    batch_jobs = [(layout, references[layout.kind, case].batch, case) for layout, case in jobs]
    # As bytes: tensors among a process's arguments take a file descriptor each.
    ranks = distributed.run(steps_worker, world, pickle.dumps(batch_jobs), timeout=timeout)
    return [list(outcomes) for outcomes in zip(*ranks, strict=True)]


def options_of(name: str) -> dict[str, Any]:
    return {"extra_loss": batches.kl_penalty} if CASES[name].extra else {}


def largest_error(outcomes: Sequence[Outcome], reference: Reference) -> tuple[float, str]:
    return shards.largest_gradient_error([outcome.grads for outcome in outcomes], reference.grads)


def loss_error(outcomes: Sequence[Outcome], reference: Reference) -> float:
    return max(abs(outcome.loss - reference.loss) / abs(reference.loss) for outcome in outcomes)
