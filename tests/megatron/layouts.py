"""Every layout of 1, 2, 4 and 8 ranks that Megatron allows, each compared with one process: loss, metrics, gradients.

    python -m tests.megatron.layouts [--ranks 1 2 4 8] [--variants seg ...] [--write docs/layouts.md]

One line per layout as it goes; the exit status is 1 if any of them exceeds the bound. `bash tests/run.sh matrix` runs
it on both versions of megatron-core and writes docs/layouts.md, which says what is compared and what is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.megatron import comparison
from tests.megatron.comparison import BOUND, Outcome, Reference
from tests.megatron.layouts_intro import INTRO
from tests.megatron.slow import same_metrics
from tests.megatron.tiny import EXPERTS, Layout

RANKS = (1, 2, 4, 8)
MOST_LAYERS = 8
EXPERT_CASES = {"ag-pad": "experts", "a2a-pad": "experts_soft"}
SEGMENT_CASES = ("segments", "segments_inside")


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    layout: Layout
    case: str = "uneven"


@dataclasses.dataclass(frozen=True)
class Row:
    """Results of one set of process groups."""

    ranks: int
    layout: Layout
    variants: list[str]
    loss_error: float
    gradient_error: float
    worst: str
    metrics: bool
    mass_error: float
    labels: bool
    reductions: int
    bytes: int
    problem: str = ""

    @property
    def passed(self) -> bool:
        small = max(self.loss_error, self.gradient_error, self.mass_error) <= BOUND
        return not self.problem and self.metrics and self.labels and small

    @property
    def data(self) -> int:
        return self.ranks // (self.layout.tp * self.layout.pp * self.layout.cp)


def megatron_version() -> str:
    import megatron.core

    return megatron.core.__version__


def powers(limit: int) -> Iterator[int]:
    return (2**exponent for exponent in range(int(math.log2(limit)) + 1))


def group_sets(ranks: int) -> list[Layout]:
    """One layout for every legal set of process groups."""
    return [
        Layout(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, microbatches=max(2, pp))
        for pp in powers(ranks)
        for tp in powers(ranks // pp)
        for cp in powers(ranks // pp // tp)
        for etp in sorted({1, tp})
        for ep in powers(ranks // pp // etp)
        if EXPERTS % ep == 0 and (etp == tp or ep > 1)
    ]


def forward_is_wrong(layout: Layout, version: str) -> bool:
    """Whether Megatron itself computes another function on this layout, see docs/layouts.md."""
    several = EXPERTS // layout.ep > 1
    spread = layout.ep > 1 and (layout.etp or layout.tp) > 1
    return version.startswith("0.11.") and layout.dispatcher == "alltoall" and spread and several


def variants_of(ranks: int, groups: Layout, index: int, version: str) -> list[Variant]:
    """The steps of one set of process groups; `index` is its place among those of as many ranks."""

    def make(name: str, case: str | None = None, **changes: object) -> Variant:
        layout = dataclasses.replace(groups, **changes)
        case = case or EXPERT_CASES.get(name) or ("experts_first" if layout.packed else "experts_floor")
        if forward_is_wrong(layout, version):
            layout = dataclasses.replace(layout, dispatcher="allgather")
        return Variant(name, layout, case)

    base = [
        make("ag-pad", dispatcher="allgather"),
        make("a2a-thd", packed=True),
        make("ag-thd", dispatcher="allgather", packed=True, rope=False),
        make("a2a-pad", rope=False),
    ]
    base = [entry for entry in base if not (entry.name.startswith("a2a") and entry.layout.dispatcher == "allgather")]
    packed = {"packed": index % 2 == 0, "rope": index % 3 != 0}
    extra = [make("rec", recompute=True, **packed), make("one", "trajectory_experts", one_pass=True, **packed)]
    extra.append(make("chunk", logprobs="chunked", tied=index % 2 == 1, **packed))
    if ranks > groups.tp * groups.pp:
        extra.append(make("opt", distributed_optimizer=True, overlap=True, **packed))
    if groups.cp > 1:
        extra += [make(kind, gathered=kind, **packed) for kind in ("slice", "sum")]
    if ranks == 8:
        names = ("ag-pad", "a2a-thd") if index % 2 else ("ag-thd", "a2a-pad")
        base = [entry for entry in base if entry.name in names]
        extra = [extra[(index + step) % len(extra)] for step in range(2 if groups.pp == 1 else 1)]
    for vpp in (2, 4):
        if groups.pp > 1 and groups.pp * vpp <= MOST_LAYERS:
            extra.append(make(f"vpp{vpp}", vpp=vpp, overlap=vpp == 2, **packed))
    if groups.tp > 1 and groups.ep == 1:
        extra.append(make("dense", "uneven", experts=0, sequence_parallel=False))
    if groups.cp > 1 or groups.splits_sequence:
        extra.append(make("seg", SEGMENT_CASES[index // 2 % 2], **packed))
    return base + extra


def compare(ranks: int, groups: Layout, variants: Sequence[Variant], references: dict) -> Row:
    """Run the variants of one set of process groups."""
    names = [variant.name for variant in variants]
    failed = Row(ranks, groups, names, math.nan, math.nan, "", False, math.nan, False, 0, 0)
    try:
        jobs = [(variant.layout, variant.case) for variant in variants]
        every = comparison.run_steps(ranks, jobs, references, timeout=400.0)
    except Exception as error:
        errors = re.findall(r"^\w*(?:Error|Exception)\b.*", str(error), re.MULTILINE)
        return dataclasses.replace(failed, problem=(errors or [str(error).strip() or type(error).__name__])[0])
    losses, gradients, same, masses, labels, counts, sizes = [0.0], [(0.0, "")], True, [0.0], True, [0], [0]
    for variant, outcomes in zip(variants, every, strict=True):
        reference: Reference = references[variant.layout.kind, variant.case]
        losses.append(comparison.loss_error(outcomes, reference))
        error, name = comparison.largest_error(outcomes, reference)
        gradients.append((error, f"{variant.name} {name}"))
        same = same and all(agrees(outcome, reference) for outcome in outcomes)
        masses += [outcome.mass_error for outcome in outcomes]
        labels = labels and all(outcome.same_labels for outcome in outcomes)
        if not variant.layout.one_pass:
            counts.append(len(outcomes[0].reductions))
            sizes.append(sum(size for _, size in outcomes[0].reductions))
    error, worst = max(gradients, key=lambda entry: (entry[0] != entry[0], entry[0]))
    found = worst_of(losses), error, worst, same, worst_of(masses), labels, max(counts), max(sizes)
    return Row(ranks, groups, names, *found)


def worst_of(errors: Sequence[float]) -> float:
    return max(errors, key=lambda error: (error != error, error))


def agrees(outcome: Outcome, reference: Reference) -> bool:
    assert outcome.metrics is not None
    return same_metrics(outcome.metrics, reference.metrics) and outcome.recompute_error < 1e-12


def label(row: Row) -> str:
    sizes = {"tp": row.layout.tp, "pp": row.layout.pp, "cp": row.layout.cp, "dp": row.data, "ep": row.layout.ep}
    words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    if row.layout.tp > 1:
        words.append(f"etp{row.layout.etp}")
    return " ".join(words) or "one process"


def line(row: Row) -> str:
    outcome = "ok" if row.passed else f"FAILED {row.problem}"
    return (
        f"{row.ranks} ranks  {label(row):28} loss {row.loss_error:.1e}  gradient {row.gradient_error:.1e}  metrics "
        f"{'equal' if row.metrics else 'DIFFER'}  labels {'equal' if row.labels else 'DIFFER'}  "
        f"router masses {row.mass_error:.1e}  {row.reductions} all-reduces, {row.bytes} bytes  "
        f"[{' '.join(row.variants)}]  {outcome}" + ("" if row.passed else f" ({row.worst})")
    )


def section(rows: Sequence[Row], version: str) -> str:
    """What docs/layouts.md says of one version of megatron-core."""
    steps = sum(len(row.variants) for row in rows)
    counts = ", ".join(f"{sum(row.ranks == ranks for row in rows)} on {ranks}" for ranks in RANKS)
    failed = [row for row in rows if not row.passed]
    loss, gradient = worst_of([row.loss_error for row in rows]), worst_of([row.gradient_error for row in rows])
    lines = [
        f"## megatron-core {version}",
        "",
        f"{len(rows)} layouts ({counts} ranks) in {steps} steps, {len(failed)} failed. Largest relative error of the "
        f"loss {loss:.1e}, of any gradient {gradient:.1e}; metrics "
        f"{'equal' if all(row.metrics for row in rows) else 'DIFFER'} on all ranks of all layouts. Expert partitions "
        f"and segments {'equal' if all(row.labels for row in rows) else 'DIFFER'} at every token, router masses to "
        f"{worst_of([row.mass_error for row in rows]):.1e}.",
        "",
        "| ranks | layout | variants | loss | gradient | all-reduces | bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.ranks} | {label(row)} | {' '.join(row.variants)} | {row.loss_error:.1e} | {row.gradient_error:.1e}"
        f"{'' if row.passed else ' **FAILED** ' + row.problem} | {row.reductions} | {row.bytes} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def write(path: Path, rows: Sequence[Row], version: str) -> None:
    """Replace this version's section; those of other versions stay."""
    old = path.read_text() if path.exists() else ""
    kept = {
        found[1]: found[0].strip() + "\n"
        for found in re.finditer(r"## megatron-core (\S+)\n(?:(?!## megatron-core ).*\n?)*", old)
    }
    kept[version] = section(rows, version)
    ordered = sorted(kept, key=lambda entry: [int(number) for number in re.findall(r"\d+", entry)])
    path.write_text("\n".join([INTRO, *(kept[entry] for entry in ordered)]))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), choices=RANKS)
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these, see docs/layouts.md")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write this version's section of FILE")
    options = parser.parse_args(arguments)
    if options.write and (options.variants or set(options.ranks) != set(RANKS)):
        parser.error(
            f"--write: replaces the whole section of a version: it needs all variants and all of --ranks {RANKS}"
        )
    version = megatron_version()
    print(f"megatron-core {version}", flush=True)
    plans = [
        (ranks, groups, variants_of(ranks, groups, index, version))
        for ranks in options.ranks
        for index, groups in enumerate(group_sets(ranks))
    ]
    if options.variants:
        plans = [(*plan, [entry for entry in variants if entry.name in options.variants]) for *plan, variants in plans]
        plans = [plan for plan in plans if plan[2]]
    every = [variant for _, _, variants in plans for variant in variants]
    references = comparison.references_for([entry.layout for entry in every], sorted({entry.case for entry in every}))
    rows = []
    for ranks, groups, variants in plans:
        rows.append(compare(ranks, groups, variants, references))
        print(line(rows[-1]), flush=True)
    print(section(rows, version).split("\n")[2])
    if options.write:
        write(options.write, rows, version)
    return int(not all(row.passed for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
