"""The content of `fiberpo plan`: what a run needs, and everything that is wrong with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_fiberpo.objective.hierarchy import Hierarchy
from nemo_fiberpo.objective.optimistic import gates_can_pass
from nemo_fiberpo.objective.ratio_gating import RatioGating

from .assumptions import Assumptions
from .batches import Batches
from .cells import Partitions, PromptLabels, StepCells, step_cells
from .estimate import Times, times
from .layout import Layout
from .lengths import response_length, too_long
from .memory import GIB, Memory, Run, memory
from .passes import Dealing, StepCosts, step_costs
from .shape import ModelShape


@dataclass(frozen=True)
class Request:
    """The parts of a run's configuration, resolved; None where they could not be read, which `problems` reports.

    of_tokens     names of the labels of `token_labels` by column
    kl            whether the initial policy is needed
    epochs        passes over a rollout
    passes        maximum number of forward passes of a step
    all_forward   whether all forward passes of a step come before its backward passes
    on_host       whether what they need is kept in host memory
    auto          with `algorithm.passes: auto`
    recorded      a run, and its f at each off-policy place in the rollout
    whole_groups  whether a prompt group is dealt to one rank
    cpu           a run without GPUs: no times are estimated, and memory is not compared with `assumptions`
    """

    name: str
    model: Mapping[str, Any]
    trainer: Mapping[str, Any]
    assumptions: Assumptions
    prompt_length: int
    hierarchy: Hierarchy | None
    batches: Batches | None = None
    prompts: PromptLabels | None = None
    partitions: Partitions | None = None
    of_tokens: Mapping[str, Sequence[str]] = field(default_factory=dict)
    gating: RatioGating | None = None
    kl: bool = False
    epochs: int = 1
    passes: int = 2
    all_forward: bool = False
    on_host: bool = False
    auto: bool = False
    recorded: tuple[str, Sequence[float]] | None = None
    whole_groups: bool = False
    cpu: bool = False

    @property
    def response_length(self) -> int:
        """Longest response in tokens. ValueError unless it is a positive whole number."""
        return response_length(self.model)


@dataclass
class Plan:
    """The results, None where a problem prevented them. Problems prevent the run, warnings do not; `unchecked` lists
    files that the configuration names and that do not exist."""

    name: str
    assumptions: Assumptions
    cpu: bool = False
    layout: Layout | None = None
    shape: ModelShape | None = None
    batches: Batches | None = None
    run: Run | None = None
    memory: Memory | None = None
    host_bytes: int = 0
    cells: StepCells | None = None
    counted: bool = False
    off_policy_steps: int = 0
    costs: StepCosts | None = None
    times: Times | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields and derived values."""
        out: dict[str, Any] = {"name": self.name, "runs": not self.problems, "cpu": self.cpu}
        out |= {"problems": self.problems, "warnings": self.warnings, "unchecked": self.unchecked}
        for name in ("layout", "shape", "batches", "memory", "cells", "costs", "times", "assumptions"):
            value = getattr(self, name)
            out[name] = None if value is None else dataclasses.asdict(value)
        if self.cpu:  # the only ones used
            out["assumptions"] = {name: out["assumptions"][name] for name in ("host", "vocab_size", "labels")}
        if self.layout is not None:
            out["layout"] |= {"world": self.layout.world, "dp": self.layout.dp, "expert_dp": self.layout.expert_dp}
            groups = self.layout.groups() if self.layout.whole else {}
            out["groups"] = {axis: {"size": len(found[0]), "number": len(found)} for axis, found in groups.items()}
        if self.shape is not None:
            out["parameters"] = {"total": self.shape.total.total, "active": self.shape.active}
        if self.memory is not None:
            out["memory"]["peak"] = self.memory.peak
        if self.times is not None:
            out["times"]["share"] = self.times.share
        return out | {"off_policy_steps": self.off_policy_steps, "host_bytes": self.host_bytes}


def make_plan(request: Request, problems: list[str]) -> Plan:
    """The plan of a run, after the known `problems` of its configuration."""
    plan = Plan(request.name, request.assumptions, request.cpu, problems=list(problems))
    layout = _tried(plan, lambda: Layout.from_config(request.model, request.trainer))
    if layout is None:
        return plan
    plan.layout, before = layout, len(plan.problems)
    vocabulary = request.assumptions.vocab_size
    plan.shape = _tried(plan, lambda: ModelShape.from_config(request.model, vocabulary, layout.tp))
    plan.problems += layout.problems(plan.shape)
    plan.warnings += layout.warnings() if layout.whole and not request.cpu else ()
    plan.batches = request.batches
    if layout.world % (layout.tp * layout.pp * layout.cp) or request.batches is None:
        return plan
    plan.problems += request.batches.problems(layout.dp, layout.cp)
    plan.problems += _tried(plan, lambda: _lengths(request, layout)) or []
    if len(plan.problems) > before or plan.shape is None:
        return plan
    _add_memory(plan, request, layout, plan.shape, request.batches)
    if request.hierarchy is not None:
        off_policy = request.batches.steps * request.epochs > 1
        if off_policy and (request.auto or request.recorded is not None):
            _add_costs(plan, request, layout, request.batches, request.hierarchy)
        if request.prompts is not None:
            _add_cells(plan, request, layout, plan.shape, request.batches, request.hierarchy, request.prompts)
    return plan


def _tried(plan: Plan, make: Any) -> Any:
    """The result, or None and its ValueError among the problems."""
    try:
        return make()
    except ValueError as error:
        plan.problems.append(str(error))
        return None


def _lengths(request: Request, layout: Layout) -> list[str]:
    found = list(too_long(request.model, request.prompt_length))
    multiple, widest = layout.length_multiple, request.model.get("encoder_seq_length")
    if widest and widest % multiple:
        found.append(
            f"model.encoder_seq_length: {widest} is not a multiple of {multiple} (2 x context parallel, x tensor "
            "parallel with sequence parallelism), which the lengths of rows are rounded up to"
        )
    return found


def _add_memory(plan: Plan, request: Request, layout: Layout, shape: ModelShape, batches: Batches) -> None:
    precision, number = request.trainer.get("precision", "bf16"), batches.microbatches(layout.dp)
    lengths = request.prompt_length, request.response_length
    given = request.assumptions
    generated = batches.generation if given.host == "nemo_aligner" else 0
    sizes = batches.micro, batches.forward, generated, number
    run = Run.from_config(request.model, precision, *lengths, *sizes, request.all_forward, request.on_host)
    plan.run, plan.memory = run, memory(shape, layout, run, given.expert_imbalance)
    on_host = (plan.memory.static["weights"] if request.kl else 0) + plan.memory.on_host
    plan.host_bytes = on_host * min(layout.devices, layout.world)
    if not request.cpu:
        _compare(plan, plan.memory, given, layout, request.all_forward and not request.on_host)


def _compare(plan: Plan, needed: Memory, given: Assumptions, layout: Layout, keeps_all: bool) -> None:
    """Compare the memory with that of a GPU and its node. `keeps_all`: the activations of all micro-batches of an
    optimizer step are on the device."""
    limit = given.gpu_memory_gib - given.reserve_gib
    peak = needed.peak / GIB
    if peak > limit:
        plan.problems.append(
            f"cluster.gpu_memory_gib: a rank of pipeline stage {needed.stage} needs {peak:.1f} GiB, and "
            f"{given.gpu_memory_gib:g} - reserve {given.reserve_gib:g} = {limit:.1f} GiB are there; "
            + _remedy(needed, keeps_all)
        )
    elif peak > 0.92 * limit:
        plan.warnings.append(
            f"cluster.gpu_memory_gib: {peak:.1f} of {limit:.1f} GiB; the estimate is no finer than that"
        )
    if plan.host_bytes > given.host_memory_gib * GIB:
        plan.problems.append(
            f"cluster.host_memory_gib: {layout.devices} ranks hold {plan.host_bytes / GIB:.0f} GiB in host memory on "
            f"a node of {given.host_memory_gib:g}; set algorithm.kl.coefficient to 0, algorithm.kept_on to device, or "
            "shard the policy further"
        )


def _remedy(found: Memory, keeps_all: bool) -> str:
    """Advice for the largest part of the memory."""
    static, training, log_probs, generation = (
        sum(part.values()) for part in (found.static, found.training, found.log_probs, found.generation)
    )
    if static >= max(training, log_probs, generation):
        return (
            "most of it are weights, gradients and optimizer: raise model.tensor_, pipeline_ or "
            "expert_model_parallel_size, or trainer.num_nodes"
        )
    if log_probs > max(training, generation):
        return "most of it is the pass of old log-probs: lower model.ppo.forward_micro_batch_size"
    if training >= generation and keeps_all:
        return (
            "most of it are activations of all micro-batches of an optimizer step, which algorithm.passes: all_forward "
            "holds at once: set it to 2, algorithm.kept_on to host, model.activations_checkpoint_granularity to full, "
            "or model.logprobs to chunked"
        )
    if training >= generation:
        return (
            "most of it are activations: lower model.micro_batch_size, raise model.context_parallel_size, or set "
            "model.activations_checkpoint_granularity to full"
        )
    return "most of it is generation: lower model.ppo.rollout_micro_batch_size"


def _add_costs(plan: Plan, request: Request, layout: Layout, batches: Batches, hierarchy: Hierarchy) -> None:
    assert plan.run is not None
    alone = layout.dp * layout.cp * batches.microbatches(layout.dp) == 1
    dealing = Dealing(batches.group, batches.micro, request.whole_groups, layout.cp, alone)
    recomputed = plan.run.recompute < 0
    plan.costs = step_costs(hierarchy, request.gating, dealing, recomputed, request.recorded)


def _add_cells(
    plan: Plan,
    request: Request,
    layout: Layout,
    shape: ModelShape,
    batches: Batches,
    hierarchy: Hierarchy,
    prompts: PromptLabels,
) -> None:
    plan.counted = prompts.counted
    cells = _tried(
        plan,
        lambda: step_cells(
            hierarchy,
            prompts,
            prompts_per_step=batches.prompts // batches.steps,
            group=batches.group,
            dp=layout.dp,
            cp=layout.cp,
            positions=request.response_length,
            partitions=request.partitions,
            of_tokens=request.of_tokens,
            gating=request.gating,
            passes=request.passes,
            whole_groups=request.whole_groups,
        ),
    )
    if cells is None:
        return
    if request.auto and gates_can_pass(hierarchy, request.gating):
        # An optimistic step finds by one more reduction which micro-batches of any rank its second pass needs.
        flags = 8 * layout.dp * batches.microbatches(layout.dp)
        cells = dataclasses.replace(cells, calls=cells.calls + 1, bytes=cells.bytes + flags)
    plan.cells = cells
    # The first optimizer step after a rollout is on-policy: its reductions are skipped, but not those of one pass.
    plan.off_policy_steps = batches.steps * request.epochs - (1 if request.passes == 2 else 0)
    if request.cpu:
        return
    length = request.prompt_length + request.response_length
    sizes = cells.calls, cells.bytes
    passes = 1 if request.all_forward else request.passes
    plan.times = times(shape, layout, batches.per_step, length, passes, *sizes, request.assumptions)
