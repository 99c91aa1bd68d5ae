"""Labels of a hierarchy's strata from the columns of verl's batches, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_fiberpo.megatron.groups import TokenAxes, named_failure
from nemo_fiberpo.objective import Hierarchy, prefix_state_labels

SOURCES = {"domain": "data_source", "prompt_group": "uid"}
"""Column of the hierarchy -> key of verl's batch. Any other is a key of the batch or of the sample's `extra_info`."""
OF_THE_ROLLOUT = ("trajectory", "state")  # made here
UNNAMED = ("prompt_group", *OF_THE_ROLLOUT)  # too many cells for names


@dataclass(frozen=True)
class Labels:
    """What `Hierarchy.cells` takes, for this rank's rows [b, R] flattened, and the label of each row's trajectory."""

    columns: dict[str, Tensor]
    names: dict[str, Sequence[str]]
    trajectory: Tensor


def check_columns(hierarchy: Hierarchy) -> None:
    """ValueError for a column that verl's batches cannot give."""
    if "expert_partition" in hierarchy.columns:
        raise ValueError(
            "expert_partition: verl does not hand over the routing of its rollouts; switch the strata that need it off"
        )


def read_columns(get: Callable[[str], Any], rows: int, hierarchy: Hierarchy) -> dict[str, list[str]]:
    """The texts of every column that comes from the data, one per row; "" for none, where that may be.

    `get` gives a key's values: a sequence of one per row, one value that all rows have, or None. Raises ValueError that
    names the column.
    """
    out = {}
    for name in hierarchy.columns:
        if name in OF_THE_ROLLOUT:
            continue
        key = SOURCES.get(name, name)
        values = _per_row(get(key), rows)
        if values is None and name not in SOURCES:
            extra = _per_row(get("extra_info"), rows) or []
            values = [row.get(key) if isinstance(row, Mapping) else None for row in extra] or None
        missing = [row for row, value in enumerate(values or [None] * rows) if value is None]
        if missing and name not in hierarchy.optional_columns:
            where = f"`{key}`" if name in SOURCES else f"`{key}`, as a column or in extra_info"
            raise ValueError(
                f"{name}: the hierarchy needs {where} for every sample, but {len(missing)} of {rows} have none"
            )
        out[name] = ["" if value is None else str(value) for value in values or [None] * rows]
    return out


def _per_row(values: Any, rows: int) -> list[Any] | None:
    if values is None:
        return None
    if hasattr(values, "tolist"):
        values = values.tolist()
    # TensorDict keeps equal values of all rows as one.
    return list(values) if isinstance(values, (list, tuple)) and len(values) == rows else [values] * rows


def make_labels(
    texts: Mapping[str, list[str]],
    problem: str | None,
    mask: Tensor,
    tokens: Tensor | None,
    hierarchy: Hierarchy,
    axes: TokenAxes,
) -> Labels:
    """Labels of this rank's rows: places in the sorted values of all ranks.

    Args
        texts    of `read_columns`; {} with a `problem`, which is raised on every rank
        mask     bool [b, R]
        tokens   int64 [b, R + 1], the last token of the prompt and the response; needed for a stratum of states

    SPMD: every rank of `axes.group` calls this. One all_gather_object.
    """
    rows = mask.shape[0]
    own = {
        "shard": axes.shard,
        "rows": rows,
        "values": {k: sorted(set(v)) for k, v in texts.items()},
        "problem": problem,
    }
    entries: list[Any] = [own]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(axes.group) > 1:
        entries = [None] * dist.get_world_size(axes.group)
        with named_failure("the exchange of labels"):
            dist.all_gather_object(entries, own, group=axes.group)
    problems = [f"rank {rank}: {entry['problem']}" for rank, entry in enumerate(entries) if entry["problem"]]
    if problems:
        raise ValueError("; ".join(problems))
    shards = {entry["shard"]: entry["rows"] for entry in entries}
    first = sum(count for shard, count in shards.items() if shard < axes.shard)
    columns: dict[str, Tensor] = {}
    names: dict[str, Sequence[str]] = {}
    for column, of_rows in texts.items():
        known = {value for entry in entries for value in entry["values"][column]} | configured(hierarchy, column)
        ordered = sorted(known - {""})
        place = {"": -1} | {value: index for index, value in enumerate(ordered)}
        columns[column] = torch.tensor([place[value] for value in of_rows], device=mask.device)
        if column not in UNNAMED:
            names[column] = ordered
    columns["trajectory"] = torch.arange(first, first + rows, device=mask.device)
    flat = {name: label[:, None].expand(mask.shape).flatten() for name, label in columns.items()}
    if "state" in hierarchy.columns:
        assert tokens is not None
        group = columns.get("prompt_group", columns["trajectory"])
        flat["state"] = prefix_state_labels(tokens, group).flatten()
    return Labels(flat, names, flat["trajectory"])


def configured(hierarchy: Hierarchy, column: str) -> set[str]:
    """Names of a column that the hierarchy mentions: a mini-batch need not have samples of every one."""
    found: set[str] = set()

    def add(stratum: Any, keys: Iterable[str]) -> None:
        if column in stratum.columns:
            at = stratum.columns.index(column)
            found.update(parts[at] for key in keys if len(parts := key.split("/")) == len(stratum.columns))

    by_name = {stratum.name: stratum for stratum in hierarchy.active}
    for stratum in hierarchy.active:
        add(stratum, stratum.budgets)
        for coarser, kept in stratum.only.items():
            add(by_name[coarser], kept)
    if hierarchy.token_clips:
        add(hierarchy.active[0], hierarchy.token_clips)
    return found
