"""What the public API refuses: configurations, labels and data sets, tokens, ranks that disagree, other arguments."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.objective.batch_refusals import (
    BRANCH,
    NUM,
    SOFT,
    TREE,
    Batch,
    refused_data_sets,
    refused_labels,
    refused_made_labels,
    sound,
    with_bad_token,
)
from tests.objective.config_refusals import CHAIN, DOMAIN, GROUP, OFF, TRAJECTORY, config, edited, refused_configs
from tests.objective.ranks import on_ranks

LENGTH = 6


@dataclass(frozen=True)
class Refusal:
    """`run` raises with a package, or returns what each rank raised."""

    name: str
    run: Callable[[Any], Any]


def _tokens() -> Iterator[tuple[str, Batch]]:
    """Log-ratios and weighted advantages that `surrogate` refuses."""
    b = sound(3)
    yield "log-ratios of int64", replace(b, log_ratio=torch.zeros(NUM, dtype=torch.int64))
    yield "a list of log-ratios", replace(b, log_ratio=[0.0] * NUM)
    yield "a log-ratio too few", replace(b, log_ratio=b.log_ratio[1:])
    yield "advantages in two dimensions", replace(b, weight=b.weight.view(4, 6))
    for seed, name in enumerate(("log_ratio", "weight") * 2):
        for value in (math.nan, -math.inf):
            bad = replace(sound(20 + seed), shape=(NUM // LENGTH, LENGTH) if seed > 1 else None)
            yield f"{value} as {name}, {seed}", with_bad_token(bad, name, value)
    soft = replace(sound(30), config=SOFT)
    yield "inf beside shares", with_bad_token(soft, "log_ratio", math.inf)


def _on_ranks(batches: list[Batch]) -> Callable[[Any], Any]:
    """Each batch on its rank, in the same reductions; the errors of all ranks."""

    def run(fpo: Any) -> list[Any]:
        held = [batch.cells(fpo) for batch in batches]
        censuses = [cells.census() for cells in held]
        shared = [cells.share(censuses, rank) for rank, cells in enumerate(held)]

        def work(rank: int, reduce: Any) -> None:
            batch = batches[rank]
            fpo.surrogate(batch.log_ratio, batch.weight, shared[rank], fpo.load_hierarchy(batch.config), reduce)

        return on_ranks(len(batches), work)[0]

    return run


def _ranks() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    b = sound(4)
    half = NUM // 2
    for name in ("log_ratio", "weight"):
        for value in (math.nan, math.inf):
            bad = with_bad_token(b, name, value)
            yield f"{value} as {name} on one of two ranks", _on_ranks([bad.part(0, half), b.part(half, NUM)])
            yield (
                f"{value} as {name} on one of three ranks",
                _on_ranks([b.part(half, NUM), replace(b.part(0, 0), mask=None), bad.part(0, half)]),
            )
    other = b.having("domain", 1 - b.labels["domain"])
    yield "groups in other domains on another rank", _on_ranks([b.part(0, NUM), other.part(0, NUM)])

    def share(batches: list[Batch], order: list[int], rank: int) -> Callable[[Any], Any]:
        def run(fpo: Any) -> None:
            held = [batch.cells(fpo) for batch in batches]
            held[0].share([held[index].census() for index in order], rank)

        return run

    halves = [b.part(0, half), b.part(half, NUM)]
    yield "censuses in another order", share(halves, [1, 0], 0)
    yield "a rank that is not there", share(halves, [0, 1], 2)

    def unreduced(fpo: Any) -> None:
        held = [batch.cells(fpo) for batch in halves]
        shared = held[0].share([cells.census() for cells in held], 0)
        fpo.surrogate(halves[0].log_ratio, halves[0].weight, shared, fpo.load_hierarchy(CHAIN))

    yield "no reduction for shared cells", unreduced


def _other_hierarchies() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Cells of another hierarchy than the one that is given with them."""
    b = sound(5)
    beside = edited(BRANCH, "branches", 0, "beside", "domain")
    floors = config(DOMAIN, {**GROUP, "min_tokens": 3}, TRAJECTORY)
    for name, built, given in (
        ("a stratum too few", config(DOMAIN, TRAJECTORY), CHAIN),
        ("a stratum too many", CHAIN, config(GROUP, TRAJECTORY)),
        ("other sweeps", BRANCH, edited(BRANCH, "sweeps", 2)),
        ("a branch in another place", BRANCH, beside),
        ("a branch too many", BRANCH, config(DOMAIN, TRAJECTORY)),
        ("another floor", floors, edited(floors, "strata", 1, "min_tokens", 4)),
        ("no floor", CHAIN, floors),
    ):

        def run(fpo: Any, built: Any = built, given: Any = given) -> None:
            cells = replace(b, config=built).cells(fpo)
            shared = cells.share([cells.census()], 0)
            fpo.surrogate(b.log_ratio, b.weight, shared, fpo.load_hierarchy(given))

        yield f"cells of {name}", run


def _weights_and_maps() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    b, tree, soft = sound(6), sound(6, config=TREE), sound(6, config=SOFT)
    for batch, arguments in (
        (b, {"kind": "token_meen"}),
        (b, {"kind": "fixed_length_mean"}),
        (b, {"kind": "token_mean", "length": 3.0}),
        (b, {"kind": "fixed_length_mean", "length": 0}),
        (b, {"kind": "fixed_length_mean", "length": math.inf}),
        (b, {"stratum": "task"}),
        (tree, {"stratum": "task"}),
        (soft, {"stratum": "trajectory_expert"}),
    ):
        where = [entry["name"] for entry in batch.config["strata"]]
        yield (
            f"weights {arguments} on {where}",
            lambda fpo, of=batch, given=arguments: fpo.token_weights(of.cells(fpo), **given),
        )
    for kind, arguments in (
        ("PpoClip", {"low": 0.0, "high": 0.2}),
        ("PpoClip", {"low": 0.2, "high": math.inf}),
        ("PpoClip", {"low": 20, "high": 0.2}),
        ("PpoClip", {"low": 0.2, "high": 0.2, "use_min": 1}),
        ("Gspo", {"low": 0.2, "high": -1}),
        ("Gspo", {"low": "0.2", "high": 1}),
        ("Gspo", {"low": 0.2, "high": 0.2, "stratum": ""}),
        ("TrulyPpo", {"eps": 0.2, "alpha": 0}),
        ("TrulyPpo", {"eps": 1.2, "alpha": 1}),
        ("Apc", {"delta": 0}),
        ("Apc", {"delta": 0.1, "space": "logs"}),
        ("Apc", {"delta": 0.1, "stratum": 3}),
    ):
        yield f"{kind} {arguments}", lambda fpo, kind=kind, given=arguments: getattr(fpo, kind)(**given)
    for batch, stratum_name in ((b, "task"), (tree, "task"), (soft, "trajectory_expert"), (tree, "prompt_group")):
        for kind, arguments in (("Gspo", {"low": 0.1, "high": 0.1}), ("Apc", {"delta": 0.1})):

            def run(
                fpo: Any, of: Batch = batch, kind: str = kind, given: Any = arguments, name: str = stratum_name
            ) -> Any:
                return of.surrogate(fpo, gating=getattr(fpo, kind)(**given, stratum=name))

            where = [entry["name"] for entry in batch.config["strata"]]
            yield f"{kind} on {stratum_name} of {where}", run
    for value in (math.nan, math.inf):
        bad = with_bad_token(sound(7, shape=(NUM // LENGTH, LENGTH)), "weight", value)
        yield f"{value} on-policy", lambda fpo, of=bad: fpo.on_policy_coefficients(of.weight, of.cells(fpo))
    yield "too few on-policy", lambda fpo: fpo.on_policy_coefficients(b.weight[1:], b.cells(fpo))


def _others() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    b = sound(8)

    def alone(fpo: Any) -> Any:
        build_cells = importlib.import_module(f"{fpo.__name__}.objective").build_cells
        return build_cells(["trajectory", "task"], {"trajectory": b.labels["trajectory"]}, b.mask)

    yield "cells of a stratum without labels", alone
    yield "no active stratum and no tokens", lambda fpo: fpo.load_hierarchy(config(OFF)).cells({})
    yield (
        "gated log-ratios too few",
        lambda fpo: fpo.gated_log_ratio(b.log_ratio[1:], b.cells(fpo), fpo.load_hierarchy(CHAIN)),
    )
    bad = with_bad_token(b, "log_ratio", math.nan)
    yield (
        "nan in gated log-ratios",
        lambda fpo: fpo.gated_log_ratio(bad.log_ratio, bad.cells(fpo), fpo.load_hierarchy(CHAIN)),
    )
    yield (
        "nan in gated ratios",
        lambda fpo: fpo.gated_ratio(bad.log_ratio, bad.weight, bad.cells(fpo), fpo.PpoClip(0.1, 0.1)),
    )
    yield (
        "inf in coefficients",
        lambda fpo: fpo.token_coefficients(b.log_ratio, b.weight / 0.0, b.cells(fpo), fpo.load_hierarchy(CHAIN)),
    )


def refusals() -> list[Refusal]:
    """All of them, each with a name of its own."""
    out = [Refusal(name, lambda fpo, given=given: fpo.load_hierarchy(given)) for name, given in refused_configs()]
    out += [Refusal(f"cells: {name}", b.cells) for name, b in (*refused_labels(), *refused_made_labels())]
    out += [Refusal(f"tokens: {name}", b.surrogate) for name, b in _tokens()]
    for name, given, labels in refused_data_sets():
        held = {key: torch.tensor(value) for key, value in labels.items()}
        out.append(Refusal(f"data: {name}", lambda fpo, of=given, held=held: fpo.load_hierarchy(of).check_data(held)))
    calls = (*_ranks(), *_other_hierarchies(), *_weights_and_maps(), *_others())
    out += [Refusal(name, run) for name, run in calls]
    names = [refusal.name for refusal in out]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return out
