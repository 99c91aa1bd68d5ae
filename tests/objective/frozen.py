"""What the objective computes for the random cases, and what it refuses, kept in frozen.npz.

A change of these results is a change of the objective. Where one is meant, this makes the file again:

    python -m tests.objective.frozen nemo_fiberpo

`frozen.npz` holds one float64 vector and an index in JSON: per case a digest of its data and the names of its arrays
and numbers, which follow one another in the vector; per refusal the errors, one for each rank.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.objective.random_cases import NUM_CASES, Case, make_case
from tests.objective.random_hierarchies import Array
from tests.objective.random_refusals import Refusal, refusals
from tests.objective.ranks import on_ranks

FILE = Path(__file__).with_name("frozen.npz")
LENGTH = 24.0
"""Of the weights by fixed length."""


@dataclass
class Outcome:
    """Arrays of a case by name, over the tokens of all ranks; and its numbers, the same on every rank."""

    arrays: dict[str, Array]
    numbers: dict[str, float]


def digest(case: Case) -> str:
    """Of all that a case holds: without the same data there is nothing to compare."""
    held = [repr({**vars(case), "labels": None, "mask": None, "log_ratio": None, "weighted_advantage": None})]
    held += [repr((name, label.tolist())) for name, label in case.labels.items()]
    held += [repr(array.tolist()) for array in (case.live, case.rank_T, case.log_ratio, case.weighted_advantage)]
    return hashlib.sha256("\n".join(held).encode()).hexdigest()[:16]


def tensors(values: dict[str, Any]) -> dict[str, Any]:
    """Arrays as tensors; what else a refusal gives stays as it is."""
    return {name: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for name, v in values.items()}


def build(fpo: Any, hierarchy: Any, case: Case, at: Array) -> Any:
    """Cells of the tokens of one rank."""
    labels = tensors({name: label[at] for name, label in case.labels.items()})
    mask = None if case.mask is None else torch.from_numpy(case.mask[at])
    shape = None if case.shape is None else (int(at.sum()) // case.shape[1], case.shape[1])
    return hierarchy.cells(labels, mask, case.names or None, shape)


def share(held: list[Any]) -> list[Any]:
    """The cells of all ranks, each shared with the others."""
    censuses = [cells.census() for cells in held]
    return [cells.share(censuses, rank) for rank, cells in enumerate(held)]


def token_tensors(case: Case, at: Array) -> tuple[Tensor, Tensor]:
    """Log-ratios and weighted advantages of the tokens of one rank, in the dtype of the case."""
    dtype = getattr(torch, case.dtype)
    return torch.from_numpy(case.log_ratio[at]).to(dtype), torch.from_numpy(case.weighted_advantage[at]).to(dtype)


def _weights(fpo: Any, case: Case, held: list[Any], at_R: list[Array]) -> list[dict[str, Tensor]]:
    """Every kind of weights of every rank, on the cells of the case and on cells of one stratum by itself."""
    out: list[dict[str, Tensor]] = [{} for _ in held]
    for stratum, alone in case.weights:
        cells = held
        if alone:
            label, mask = torch.from_numpy(case.labels[stratum]), torch.from_numpy(case.live)
            of = importlib.import_module(f"{fpo.__name__}.objective").build_cells
            cells = share([of([stratum], {stratum: label[at]}, mask[at]) for at in at_R])
        for rank, own in enumerate(cells):
            for kind in ("trajectory_mean", "token_mean", "fixed_length_mean"):
                length = {"length": LENGTH} if kind == "fixed_length_mean" else {}
                key = f"weights/{stratum}/{'alone' if alone else 'among others'}/{kind}"
                out[rank][key] = fpo.token_weights(own, kind, stratum=stratum, **length)
    return out


def _on_one_rank(fpo: Any, hierarchy: Any, cells: Any, case: Case, at: Array, reduce: Any) -> tuple[dict, dict]:
    """All that one rank computes: arrays over its tokens, and numbers."""
    calls = 0

    def counted(buffer: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return reduce(buffer)

    through = None if reduce is None else counted
    log_ratio, weight = token_tensors(case, at)
    result = fpo.surrogate(log_ratio, weight, cells, hierarchy, through)
    arrays, numbers = {"coefficients": result.coefficients}, {"J": result.value, "reductions/surrogate": float(calls)}
    numbers |= {f"report/{name}": value for name, value in result.report.metrics().items()}
    calls = 0
    arrays["token_coefficients"] = fpo.token_coefficients(log_ratio, weight, cells, hierarchy, through)
    numbers["reductions/token_coefficients"], calls = float(calls), 0
    leaf = log_ratio.clone().requires_grad_()
    gated = fpo.gated_log_ratio(leaf, cells, hierarchy, through)
    numbers["reductions/forward"] = float(calls)
    gated.backward(weight)
    numbers["reductions/forward and backward"] = float(calls)
    assert leaf.grad is not None
    arrays |= {"gated": gated.detach(), "gradient": leaf.grad}
    for kind, arguments in case.gatings:
        gating, key, calls = getattr(fpo, kind)(**arguments), f"{kind} {arguments.get('space', '')}".strip(), 0
        result = fpo.surrogate(log_ratio, weight, cells, hierarchy, through, gating)
        numbers |= {f"{key}/J": result.value, f"{key}/clipped": result.report.metrics()["token/clipped"]}
        numbers[f"reductions/{key}"] = float(calls)
        arrays[f"{key}/coefficients"] = result.coefficients
        arrays[f"{key}/ratio"] = fpo.gated_ratio(log_ratio, weight, cells, gating, through)
    numbers |= {f"cells/{entry['name']}": float(cells.num_cells(entry["name"])) for entry in case.active}
    numbers["reductions"] = float(hierarchy.num_reductions)
    return arrays, numbers


def _raise(results: list[Any]) -> None:
    for error in results:
        if isinstance(error, Exception):
            raise error


def _gather(at_R: list[Array], results: list[Any]) -> dict[str, Array]:
    """The arrays of all ranks, over the tokens of the case."""
    _raise(results)
    arrays: dict[str, Array] = {}
    for at, result in zip(at_R, results, strict=True):
        for name, value in result.items():
            arrays.setdefault(name, np.zeros(len(at)))[at] = value.double().numpy()
    return arrays


def evaluate(fpo: Any, case: Case) -> Outcome:
    """What a package computes for a case, on all its ranks at once."""
    hierarchy = fpo.load_hierarchy(case.config)
    at_R = [case.rank_T == rank for rank in range(case.world_size)]
    held = [build(fpo, hierarchy, case, at) for at in at_R]
    if case.shared:
        held = share(held)
    if case.world_size == 1:
        results = [_on_one_rank(fpo, hierarchy, held[0], case, at_R[0], None)]
    else:

        def work(rank: int, reduce: Any) -> tuple[dict, dict]:
            return _on_one_rank(fpo, hierarchy, held[rank], case, at_R[rank], reduce)

        results, _ = on_ranks(case.world_size, work)
        _raise(results)
    weights = _weights(fpo, case, held, at_R) if case.weights else [{} for _ in held]
    assert all(numbers == results[0][1] for _, numbers in results), "value and report are the same on every rank"
    arrays = _gather(at_R, [{**own, **more} for (own, _), more in zip(results, weights, strict=True)])
    return Outcome(arrays, results[0][1])


def on_policy(fpo: Any, case: Case) -> Outcome:
    """Coefficients where every log-ratio is 0: through the gates, on all ranks, and by `on_policy_coefficients`."""
    hierarchy = fpo.load_hierarchy(case.config)
    at_R = [case.rank_T == rank for rank in range(case.world_size)]
    held = share([build(fpo, hierarchy, case, at) for at in at_R])

    def work(rank: int, reduce: Any) -> dict[str, Tensor]:
        weight = token_tensors(case, at_R[rank])[1]
        through = fpo.surrogate(torch.zeros_like(weight), weight, held[rank], hierarchy, reduce).coefficients
        return {"through the gates": through, "direct": fpo.on_policy_coefficients(weight, held[rank])}

    return Outcome(_gather(at_R, on_ranks(case.world_size, work)[0]), {})


def refuse(fpo: Any, refusal: Refusal) -> list[str]:
    """The errors of all ranks as "type: message"; "no error" for a rank without."""
    try:
        results = refusal.run(fpo)
    except Exception as error:
        results = [error]
    errors = results if isinstance(results, list) else [None]
    return ["no error" if error is None else f"{type(error).__name__}: {error}" for error in errors]


def save(fpo: Any, path: Path) -> None:
    values: list[Array] = []
    cases: dict[str, Any] = {}
    words: dict[str, int] = {}
    for seed in range(NUM_CASES):
        case = make_case(seed)
        outcome = evaluate(fpo, case)
        assert np.array_equal(outcome.arrays.pop("token_coefficients"), outcome.arrays["coefficients"])
        names = [words.setdefault(word, len(words)) for word in (*outcome.arrays, *outcome.numbers)]
        cases[case.name] = [digest(case), len(case.rank_T), len(outcome.arrays), names]
        values += [*outcome.arrays.values(), np.array([*outcome.numbers.values()])]
    index = {"cases": cases, "words": list(words), "refusals": {r.name: refuse(fpo, r) for r in refusals()}}
    np.savez_compressed(path, index=np.frombuffer(json.dumps(index).encode(), np.uint8), values=np.concatenate(values))


def load(path: Path = FILE) -> tuple[dict[str, tuple[str, Outcome]], dict[str, list[str]]]:
    """Digest and outcome by the name of a case, and errors by the name of a refusal."""
    with np.load(path) as file:
        index, values = json.loads(bytes(file["index"])), file["values"]
    cases, at = {}, 0
    for name, (held, num, num_arrays, numbers) in index["cases"].items():
        words = [index["words"][word] for word in numbers]
        arrays = {word: values[at + n * num : at + (n + 1) * num] for n, word in enumerate(words[:num_arrays])}
        at += num * num_arrays
        cases[name] = held, Outcome(arrays, dict(zip(words[num_arrays:], values[at:].tolist(), strict=False)))
        at += len(words) - num_arrays
    assert at == len(values)
    return cases, index["refusals"]


if __name__ == "__main__":
    path = Path(sys.argv[2]) if len(sys.argv) > 2 else FILE
    save(importlib.import_module(sys.argv[1]), path)
    print(f"{path}: {path.stat().st_size} bytes")
