"""The objective against what it computed and refused before, for random cases of every feature (see frozen.py)."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

import nemo_fiberpo as fpo
from tests.objective.frozen import Outcome, digest, evaluate, load, on_policy, refuse, token_tensors
from tests.objective.random_cases import NUM_CASES, Case, make_case
from tests.objective.random_hierarchies import columns_of
from tests.objective.random_refusals import refusals

FROZEN, ERRORS = load()
REFUSALS = {refusal.name: refusal for refusal in refusals()}

CHANGED: set[str] = set()
"""Numbers that are meant to differ from the frozen ones, by name: a figure of the report is "report/" and its name."""

ARRAYS = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2.0**-7}
"""Tolerances of arrays, relative to the largest value. Float32 results are within 1.7e-7 of exact ones; elements of
bfloat16 are float32 results that are rounded once, perhaps to another neighbour."""
NUMBERS = {"float64": 1e-9, "float32": 1e-6, "bfloat16": 1e-6}
"""Tolerances of the figures of a report, absolute below 1 and relative above."""

STRATA = "domain|prompt_group|trajectory|trajectory_expert|task|topic|modality|expert|crossing|b"
VALUES = re.compile(rf"'[^']*'|torch\.\w+|-?\d+(?:\.\d+)?|\b(?:True|False|None|nan|inf|{STRATA})\b")
"""What a message says of the case at hand: quoted names, dtypes, numbers, and strata."""


def _scale(name: str, case: Case, frozen: Outcome) -> float:
    """The largest magnitude that an array, or a sum of one, is made of: rounding errors are relative to it."""
    weight = np.where(case.live, case.weighted_advantage, 0.0)
    kind, _, what = name.rpartition("/")
    if what == "J":
        ratio = frozen.arrays[f"{kind}/ratio"] if kind else np.exp(frozen.arrays["gated"])
        return float(np.abs(weight * ratio).sum())
    largest = float(np.abs(frozen.arrays[name]).max(initial=0.0))
    if what in ("coefficients", "gradient"):
        return max(largest, float(np.abs(weight).max(initial=0.0)))
    if what == "gated":
        return max(largest, float(np.abs(np.where(case.live, case.log_ratio, 0.0)).max(initial=0.0)))
    return largest


def differences(case: Case, frozen: Outcome, got: Outcome) -> list[str]:
    """What `got` lacks or has otherwise than the frozen outcome; it may have more."""
    found: list[str] = []
    frozen = Outcome({**frozen.arrays, "token_coefficients": frozen.arrays["coefficients"]}, frozen.numbers)
    for name, wanted in frozen.arrays.items():
        if name not in got.arrays:
            found.append(f"{name}: is gone")
            continue
        dtype = "float64" if name.startswith("weights/") or name.endswith("/ratio") else case.dtype
        scale = _scale(name.replace("token_coefficients", "coefficients"), case, frozen)
        error = np.abs(got.arrays[name] - wanted)
        if not (error <= ARRAYS[dtype] * scale).all():
            found.append(f"{name}: differs by {error.max():.3g} at token {error.argmax()}, of {scale:.3g}")
        if (got.arrays[name][~case.live] != (1.0 if name.endswith("/ratio") else 0.0)).any():
            found.append(f"{name}: is not neutral at masked tokens")
    for name, wanted in frozen.numbers.items():
        if name not in got.numbers:
            found += [f"{name}: is gone"] if name not in CHANGED else []
        elif name not in CHANGED:
            exact = name.startswith(("reductions", "cells/"))
            bound = 0.0 if exact else NUMBERS[case.dtype] * max(abs(wanted), 1.0)
            if name.rpartition("/")[2] == "J":
                bound = ARRAYS["float32" if case.dtype == "bfloat16" else case.dtype] * _scale(name, case, frozen)
            if not abs(got.numbers[name] - wanted) <= bound:
                found.append(f"{name}: is {got.numbers[name]!r}, was {wanted!r}")
    return found


def message_differences(frozen: str, got: str) -> list[str]:
    """A refusal stays of the same type and field, and still says all that it said of the case at hand."""
    (kind, field, rest), (got_kind, got_field, got_rest) = (
        re.split(": ", f"{m}: : ", maxsplit=2) for m in (frozen, got)
    )
    if (kind, field) != (got_kind, got_field):
        return [f"{got_kind} of {got_field!r}, was {kind} of {field!r}"]
    missing = set(VALUES.findall(rest)) - set(VALUES.findall(got_rest))
    return [f"does not say {value}" for value in sorted(missing)]


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_a_random_case_is_as_it_was(seed: int):
    case = make_case(seed)
    held, frozen = FROZEN[case.name]
    assert digest(case) == held, "the generator draws other cases than the file was made from"
    assert differences(case, frozen, evaluate(fpo, case)) == []


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_as_it_was(name: str):
    got = refuse(fpo, REFUSALS[name])
    assert len(got) == len(ERRORS[name])
    for frozen, message in zip(ERRORS[name], got, strict=True):
        assert message_differences(frozen, message) == [], message


@pytest.mark.parametrize("seed", range(0, NUM_CASES, 2))
def test_on_policy_coefficients_are_the_weighted_advantages(seed: int):
    case = make_case(seed)
    weight = token_tensors(case, np.ones_like(case.live))[1].double().numpy()
    weight[~case.live] = 0.0
    arrays = on_policy(fpo, case).arrays
    assert np.array_equal(arrays["direct"], weight)
    if case.soft is None:
        assert np.array_equal(arrays["through the gates"], weight)
    else:
        scale = np.abs(weight).max(initial=0.0)
        assert (np.abs(arrays["through the gates"] - weight) <= ARRAYS[case.dtype] * scale).all()


def test_the_file_is_of_these_cases_and_refusals():
    assert [*FROZEN] == [make_case(seed).name for seed in range(NUM_CASES)]
    assert [*ERRORS] == [*REFUSALS]
    for errors in ERRORS.values():
        assert all(error.startswith("ValueError: ") for error in errors)


def test_every_regime_and_every_feature_occurs():
    seen: Counter[str] = Counter()
    for seed in range(NUM_CASES):
        case, (_, outcome) = make_case(seed), FROZEN[f"seed_{seed}"]
        seen.update({re.sub("^report/[^/]*/", "", name) for name, v in outcome.numbers.items() if 0 < v < 1})
        for entry in case.active:
            seen.update(key for key in ("join", "only", "min_tokens", "beside", "budgets") if entry.get(key))
        branches = [entry for entry in case.config.get("branches", []) if entry in case.active]
        features = {
            "ranks": case.world_size > 1,
            "a rank without tokens": len(set(case.rank_T)) < case.world_size,
            "sweeps": bool(branches) and case.config["sweeps"] > 1,
            "soft": case.soft is not None,
            "soft and floor": case.soft is not None and any(entry.get("min_tokens") for entry in case.active),
            "soft branch": any(case.soft in columns_of(entry) for entry in branches),
            "only and branch": bool(branches) and any(entry.get("only") for entry in case.active),
            "nothing active": not case.active,
            "all masked": not case.live.any(),
            "rows": case.shape is not None,
            "negative labels": any((label < 0).any() for label in case.labels.values()),
            "bad masked tokens": not np.isfinite(case.log_ratio).all(),
            **{f"{kind} {arguments.get('space', '')}".strip(): True for kind, arguments in case.gatings},
        }
        seen.update(name for name, there in features.items() if there)
        seen[case.dtype] += 1
    wanted = {"join", "only", "min_tokens", "beside", "budgets", *features, *ARRAYS, "merged_tokens", "clipped"}
    wanted |= {"pos/rollback", "pos/zeroed", "neg/rollback", "neg/zeroed"}
    wanted |= {"PpoClip", "Gspo", "TrulyPpo", "Apc ratio", "Apc log"}
    assert {name: seen[name] for name in wanted if seen[name] < 5} == {}


def test_a_small_change_is_noticed():
    for seed in range(5, NUM_CASES, 60):
        case, (_, frozen) = make_case(seed), FROZEN[f"seed_{seed}"]
        same = Outcome({**frozen.arrays, "token_coefficients": frozen.arrays["coefficients"]}, frozen.numbers)
        assert differences(case, frozen, same) == []
        for name in same.arrays if case.live.any() else ():
            scale = _scale(name.replace("token_coefficients", "coefficients"), case, same)
            changed = same.arrays[name].copy()
            changed[case.live.argmax()] += 1.1 * ARRAYS[case.dtype] * scale
            assert differences(case, frozen, Outcome({**same.arrays, name: changed}, same.numbers)) != [] or scale == 0
        for name, value in same.numbers.items():
            changed = {**same.numbers, name: value + 1.1e-6 * max(abs(value), 1.0, _sum(case))}
            missing = {key: number for key, number in same.numbers.items() if key != name}
            assert differences(case, frozen, Outcome(same.arrays, changed)) != []
            assert differences(case, frozen, Outcome(same.arrays, missing)) == [f"{name}: is gone"]


def _sum(case: Case) -> float:
    return float(np.abs(np.where(case.live, case.weighted_advantage, 0.0)).sum())


@pytest.mark.parametrize(
    ("message", "missing"),
    [
        ("ValueError: labels['task']: value 4 has tokens in domain 0 ('code') and in domain 1 ('math'); wrong", []),
        ("ValueError: labels['task']: tokens of value 4 are in domain 1 ('math') and domain 0 ('code')", []),
        ("TypeError: labels['task']: value 4 has tokens in domain 0 ('code') and in domain 1 ('math')", ["TypeError"]),
        ("ValueError: labels['domain']: value 4 has tokens in domain 0 ('code') and in 1 ('math')", ["labels"]),
        ("ValueError: labels: value 4 has tokens in domain 0 ('code') and in domain 1 ('math')", ["labels"]),
        ("ValueError: labels['task']: value 5 has tokens in domain 0 ('code') and in domain 1 ('math')", ["4"]),
        ("ValueError: labels['task']: value 4 has tokens in 0 ('code') and 1 ('maths')", ["'math'", "domain"]),
        ("no error", ["no error"]),
    ],
)
def test_another_message_is_noticed(message: str, missing: list[str]):
    frozen = "ValueError: labels['task']: value 4 has tokens in domain 0 ('code') and in domain 1 ('math'); wrong"
    found = message_differences(frozen, message)
    assert len(found) == len(missing) and all(word in line for word, line in zip(missing, found, strict=True))
