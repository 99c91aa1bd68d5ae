"""f: the share of the micro-batches of an optimizer step in which the coefficients of the optimistic step are not exact,
so that its second pass runs over them (nemo_fiberpo/megatron/optimistic.py).

    torchrun --standalone --nproc_per_node 1 benchmarks/second_pass.py record drift.pt --config-name quickstart KEY=VALUE ...
    python benchmarks/second_pass.py table drift.pt ...

`record` is a run of examples/train_gpt_fiberpo.py on one rank that keeps the log-ratios, weighted advantages and labels
of every optimizer step after the first one of a rollout. `table` deals the rows of each of these steps to micro-batches:

    shuffled       rows in random order
    whole groups   prompt groups in random order, each in one micro-batch
    by domain      the same, with the groups of a domain one after the other

and evaluates the objective twice, on the whole step and on each micro-batch by itself. Rows of the table are means over
the RL steps, by place in the rollout.
"""  # noqa: E501 (a command in one line)

from __future__ import annotations

import runpy
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_fiberpo import load_hierarchy
from nemo_fiberpo.objective import Hierarchy, SlopeCap, token_coefficients
from nemo_fiberpo.objective.optimistic import differs, optimistic_coefficients, part_cells

ROOT = Path(__file__).resolve().parents[1]
ARRANGEMENTS = ("shuffled", "whole groups", "by domain")
GATES = ("rollback", "clip")


def plain(hierarchy: Hierarchy) -> dict[str, Any]:
    """A chain as a config has it, without the gates."""
    strata = {}
    for stratum in hierarchy.active:
        slope = {"cap": stratum.slope.cap} if isinstance(stratum.slope, SlopeCap) else stratum.slope
        strata[stratum.name] = {"budget": {"pos": stratum.budget.pos, "neg": stratum.budget.neg}, "slope": slope}
    return {"token_clip": hierarchy.token_clip, "strata": strata}


def record(out: Path, arguments: list[str]) -> None:
    """Train, and save what the objective of every off-policy optimizer step is evaluated on."""
    import nemo_fiberpo.megatron.step

    step: Any = nemo_fiberpo.megatron.step
    exact_step, surrogate = step.exact_step, step.surrogate
    kept: list[dict[str, Any]] = []
    place = 0

    def noting(log_ratio: Tensor, advantage: Tensor, cells: Any, hierarchy: Hierarchy, *more: Any) -> Any:
        rows = cells.layout.batch
        mask = torch.ones(rows, dtype=torch.bool) if cells.layout.mask_T is None else cells.layout.mask_T.view(rows)
        labels = {name: cells.cell_per_token(name).view(rows).clone() for name in cells.stages.strata}
        entry = {"log_ratio": log_ratio.view(rows).clone(), "advantage": advantage.view(rows).clone(), "mask": mask}
        kept.append(entry | {"place": place, "labels": labels, "hierarchy": plain(hierarchy), "use_min": more[2]})
        return surrogate(log_ratio, advantage, cells, hierarchy, *more)

    def stepping(*given: Any, on_policy: bool, **options: Any) -> Any:
        nonlocal place
        place = 0 if on_policy else place + 1
        return exact_step(*given, on_policy=on_policy, **options)

    step.exact_step, step.surrogate = stepping, noting  # before the actor imports them
    sys.argv = ["train_gpt_fiberpo.py", *arguments]
    try:
        runpy.run_path(str(ROOT / "examples" / "train_gpt_fiberpo.py"), run_name="__main__")
    finally:
        torch.save(kept, out)


def arranged(entry: dict[str, Any], arrangement: str, seed: int) -> Tensor:
    """The rows of a step in the order in which they are dealt to micro-batches."""
    of_row = {name: torch.where(entry["mask"], label, -1).amax(1) for name, label in entry["labels"].items()}
    order = torch.randperm(len(entry["mask"]), generator=torch.Generator().manual_seed(seed))
    if arrangement != "shuffled":
        place_of_group = order  # of more groups than there are
        order = place_of_group[of_row["prompt_group"]].argsort(stable=True)
    if arrangement == "by domain":
        order = order[of_row["domain"][order].argsort(stable=True)]
    return order


def second_share(entry: dict[str, Any], hierarchy: Hierarchy, rows: Tensor, microbatches: int) -> float:
    """f of one step, in float64."""

    def cells(part: Tensor) -> Any:
        labels = {name: label[part].flatten() for name, label in entry["labels"].items()}
        return hierarchy.cells(labels, entry["mask"][part].flatten(), shape=tuple(entry["mask"][part].shape))

    def columns(part: Tensor) -> list[Tensor]:
        return [entry[name][part].flatten().double() for name in ("log_ratio", "advantage")]

    whole, use_min = cells(rows).shared, entry["use_min"]
    log_ratio, advantage = columns(rows)
    exact = token_coefficients(log_ratio, advantage, whole, hierarchy, use_min=use_min).view(len(rows), -1)
    split = list(zip(rows.chunk(microbatches), exact.chunk(microbatches), strict=True))
    touched = 0
    for (part, right), own in zip(split, part_cells([cells(part) for part, _ in split], whole), strict=True):
        log_ratio, advantage = columns(part)
        guess = optimistic_coefficients(log_ratio, advantage, own, hierarchy, use_min=use_min)
        touched += bool(differs(right.flatten(), guess, advantage).any())
    return touched / microbatches


def print_table(path: str) -> None:
    kept = torch.load(path, weights_only=True)
    groups = min(len(entry["labels"]["prompt_group"].unique()) for entry in kept)
    counts = (2, 4, 8) if groups % 8 == 0 else (2, 3, 6)  # micro-batches of whole groups
    print(f"\n{path}: {len(kept)} steps of {len(kept[0]['mask'])} rows in {groups} prompt groups")
    print(kept[0]["hierarchy"])
    for gate in GATES:
        for arrangement in ARRANGEMENTS:
            for number in counts:
                found = defaultdict(list)
                for seed, entry in enumerate(kept):
                    config = entry["hierarchy"]
                    strata = {name: stratum | {"gate": gate} for name, stratum in config["strata"].items()}
                    rows = arranged(entry, arrangement, seed)
                    share = second_share(entry, load_hierarchy(config | {"strata": strata}), rows, number)
                    found[entry["place"]].append(share)
                means = [sum(found[place]) / len(found[place]) for place in sorted(found)]
                by_place = " ".join(f"{mean:.2f}" for mean in means)
                print(f"| {gate} | {arrangement} | {number} | {sum(means) / len(means):.2f} | {by_place} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "record":
        record(Path(sys.argv[2]), sys.argv[3:])
    else:
        for name in sys.argv[2:]:
            print_table(name)
