"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator

from .layout import Layout
from .memory import GIB, MIB, Memory
from .passes import StepCosts
from .plan import Plan

MEANING = {
    "tensor": "copies of the tokens",
    "context": "parts of the sequences",
    "data": "samples of their own",
    "pipeline": "layers of their own",
    "expert tensor": "parts of the same experts",
    "expert": "experts of their own",
    "expert data": "the same experts",
}


def format_plan(plan: Plan) -> str:
    """The table that `fiberpo plan` prints."""
    lines = [plan.name]
    if plan.layout is not None:
        lines += ["", *_ranks(plan.layout, plan.cpu)]
    if plan.shape is not None and plan.layout is not None:
        lines += ["", *_parameters(plan)]
    if plan.memory is not None:
        lines += ["", *_memory(plan, plan.memory)]
    if plan.batches is not None and plan.cells is not None:
        lines += ["", *_cells(plan)]
    if plan.costs is not None:
        lines += ["", *_costs(plan.costs)]
    lines += [""] + [f"warning: {warning}" for warning in plan.warnings] if plan.warnings else []
    lines += [""] + [f"not checked: {file}" for file in plan.unchecked] if plan.unchecked else []
    if plan.problems:
        return "\n".join(lines)
    if plan.cpu:
        end = "This run can start, as far as arithmetic can tell: on the CPU, where memory is compared with nothing."
    else:
        end = "This run fits, as far as arithmetic can tell."
    return "\n".join([*lines, "", end])


def _ranks(layout: Layout, cpu: bool) -> Iterator[str]:
    number = f"{layout.world} {'rank' if layout.world == 1 else 'ranks'}"
    yield f"{number}: {layout.nodes} x {layout.devices}{' processes on the CPU, no GPU' if cpu else ''}"
    for axis, found in layout.groups().items() if layout.whole else ():
        number = "1 group" if len(found) == 1 else f"{len(found)} groups"
        yield f"  {axis:<14}{number:>11} of {len(found[0]):<5}{MEANING[axis]:<28}{_shown(found[0])}".rstrip()


def _shown(ranks: list[int]) -> str:
    if len(ranks) < 2:
        return ""
    if ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}, ..."
    return ", ".join(map(str, ranks if len(ranks) < 5 else [*ranks[:2], ".."])) + (
        f", {ranks[-1]}, ..." if len(ranks) >= 5 else ", ..."
    )


def _parameters(plan: Plan) -> Iterator[str]:
    assert plan.shape is not None and plan.layout is not None
    shape, layout = plan.shape, plan.layout
    yield f"{'parameters':<24}{_billions(shape.total.total)}, {_billions(shape.active)} active"
    layers, stages = shape.even(layout.pp)
    if stages > 0 and layers % stages == 0:
        for stage in sorted({0, layout.pp // 2, layout.pp - 1}):
            own = shape.stage(stage, layout.pp, layout.tp, layout.ep, layout.etp)
            experts = f", {_billions(own.expert)} of experts" if own.expert else ""
            yield f"  {f'rank of stage {stage}':<22}{_billions(own.total)}{experts}"


def _billions(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def _memory(plan: Plan, memory: Memory) -> Iterator[str]:
    given = plan.assumptions
    name, unit = ("MiB", MIB) if memory.peak < GIB else ("GiB", GIB)
    yield f"memory of the fullest rank (stage {memory.stage}), {name}, estimate"
    phases = ("training", memory.training), ("log-probs", memory.log_probs), ("generation", memory.generation)
    for title, part in (("", memory.static), *phases):
        for name, size in part.items():
            yield f"  {title:<12}{name:<28}{size / unit:8.2f}"
    there, reserve = (size * GIB / unit for size in (given.gpu_memory_gib, given.reserve_gib))
    of = "of a CPU rank, beside its libraries" if plan.cpu else f"of {there:g} - {reserve:g} = {there - reserve:.1f}"
    yield f"  {'peak':<40}{memory.peak / unit:8.2f}   {of}"
    if plan.host_bytes:
        of = "" if plan.cpu else f"   of {given.host_memory_gib * GIB / unit:g}"
        yield f"  {'host memory of a node':<40}{plan.host_bytes / unit:8.2f}{of}"


def _cells(plan: Plan) -> Iterator[str]:
    assert plan.batches is not None and plan.cells is not None and plan.layout is not None
    batches, cells, layout = plan.batches, plan.cells, plan.layout
    yield (
        f"a rollout: {batches.prompts} prompts x {batches.group} = {batches.rollout} samples, {batches.steps} "
        f"optimizer steps of {batches.per_step}; {batches.microbatches(layout.dp)} micro-batches of {batches.micro} "
        "per step and rank"
    )
    yield f"  {'stratum':<24}{'cells of a step':>16}{'on several ranks':>18}" + (
        "" if plan.counted else "   at most, with cluster.labels"
    )
    for name, (number, shared) in cells.strata.items():
        yield f"  {name:<24}{number:>16,}{shared:>18,}"
    if layout.world == 1:
        yield "reductions and exchange of cells: nothing is sent, one rank holds everything"
        return
    yield f"reductions of an optimizer step: {cells.calls}, {cells.bytes:,} bytes; none where it is on-policy"
    yield f"of a rollout: {plan.off_policy_steps * cells.calls}, {plan.off_policy_steps * cells.bytes:,} bytes"
    yield (
        f"exchange of cells, once per rollout: up to {batches.steps * cells.exchanged:,} bytes from each rank that "
        "holds tokens of its own"
    )
    if plan.times is not None:
        given = plan.assumptions
        step = "a step of two passes" if plan.costs else "a step"
        yield (
            f"estimate: {step} takes {plan.times.step:.3g} s ({given.peak_tflops:g} TFLOPS x MFU {given.mfu:g}, "
            f"longest rows), reductions {1e3 * plan.times.reductions:.3g} ms ({given.latency_us:g} us a hop, "
            f"{given.bandwidth_gb_per_s:g} GB/s): {plan.times.share:.4%} of it"
        )


def _costs(costs: StepCosts) -> Iterator[str]:
    unit = "one forward and backward pass" + (" with full recomputation" if costs.recomputed else "")
    yield f"an optimizer step after the first of a rollout; cost 1 is {unit}"
    yield f"  {'algorithm.passes':<20}{'forward passes':<18}cost"
    for passes, entry in costs.of.items():
        forward, cost = (
            " to ".join(dict.fromkeys(f"{end:.2f}" for end in ends)) for ends in (entry.forward, entry.cost)
        )
        yield f"  {passes:<20}{forward:<18}{cost:<16}{entry.why}".rstrip()
    if costs.advice is not None:
        yield f"  {costs.advice}"
