"""Made-up hierarchies, run configs and lines of data: each has a meaning, or is a ValueError that names key, or file
and line. Sound ones with a few things wrong, by hypothesis from a seed.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import torch
import yaml
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo_fiberpo import load_hierarchy, token_coefficients
from nemo_fiberpo.aligner.config.checks import read_training_config
from nemo_fiberpo.cli.compose import compose
from nemo_fiberpo.config import load_expert_partitions, load_token_labels
from nemo_fiberpo.graders import builtin, checks
from nemo_fiberpo.prompts.records import load_prompts
from tests.faults.outcome import Outcomes, TooLong, within

SECONDS = 20.0
ODD = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 0.5, 1e-300, 1e308, 10**400, 2**63, float("nan"), float("inf")]),
    st.sampled_from(
        ["", " ", "no", "yes", "null", "???", "${", "${nowhere}", "${oc.env:HOME}", "1e-6", "\ud800", "a.b"]
    ),
    st.sampled_from([[], {}, [[]], [None], {"": 1}, {"a": None}, [1, 2], ["domain"], {"pos": 1, "neg": 1}, {"cap": 0}]),
    st.text(max_size=8),
    st.integers(),
    st.floats(),
)
NAMES = [
    "domain",
    "trajectory",
    "budget",
    "pos",
    "neg",
    "slope",
    "gate",
    "join",
    "only",
    "enabled",
    "name",
    "domian",
    "",
]
HIERARCHY: dict[str, Any] = {
    "token_clip": 0.04,
    "token_clips": {"code": 0.06},
    "strata": {
        "domain": {"budget": {"pos": 0.02, "neg": 0.015}, "budgets": {"code": {"pos": 0.03, "neg": 0.02}}},
        "task": {"budget": {"pos": 0.03, "neg": 0.02}, "only": {"domain": ["code"]}},
        "prompt_group": {"budget": {"pos": 0.04, "neg": 0.03}, "slope": {"cap": 32}, "min_tokens": 4},
        "trajectory": {"budget": {"pos": 0.12, "neg": 0.05}, "slope": 32, "gate": "soft", "enabled": True},
        "trajectory_segment": {"join": ["trajectory", "segment"], "budget": {"pos": 0.12, "neg": 0.05}},
    },
    "branches": {"modality": {"beside": "domain", "budget": {"pos": 0.02, "neg": 0.015}}},
    "sweeps": 2,
    "token_labels": {"segment": {"bins": [0, 2]}},
    "ignore": ["<a>", "</a>"],
}
LINES: list[dict[str, Any]] = [
    {"prompt": "2+5=", "domain": "math", "grader": "math_verify", "answer": "7", "id": "a", "response": "7"},
    {"prompt": "2+5=", "domain": "math", "grader": "math_verify", "answer": "7", "answer_form": "literal"},
    {
        "prompt": "spell cat backward", "domain": "words", "grader": "reasoning_gym", "task": "spell_backward",
        "entry": {"question": "cat", "answer": "tac", "metadata": {"word": "cat", "word_len": 3}},
        "strata": {"language": "en"}, "meta": {"source": [1]},
    },
]  # fmt: skip


def paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value below this one."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*above, key)
            yield from paths(value[key], (*above, key))


def edited(base: dict[str, Any], edits: list[tuple[tuple[Any, ...], str, Any, str]]) -> dict[str, Any]:
    """A copy with values replaced, taken away, renamed or added; no edit of what an earlier one took away."""
    out = copy.deepcopy(base)
    for path, how, value, name in edits:
        node: Any = out
        try:
            for key in path[:-1]:
                node = node[key]
            there = node[path[-1]]
        except (KeyError, IndexError, TypeError):
            continue
        value = copy.deepcopy(value)  # hypothesis hands out the same list again, which a later edit may change
        if how == "put":
            node[path[-1]] = value
        elif how == "take":
            del node[path[-1]]
        elif how == "rename" and isinstance(node, dict):
            node[name] = node.pop(path[-1])
        elif how == "add" and isinstance(there, dict):
            there[name] = value
    return out


def edits_of(base: Any, most: int = 3) -> st.SearchStrategy[Any]:
    how = st.sampled_from(["put", "put", "put", "take", "rename", "add"])
    edit = st.tuples(st.sampled_from(list(paths(base))), how, ODD, st.sampled_from(NAMES) | st.text(max_size=6))
    return st.lists(edit, min_size=1, max_size=most)


def tried(out: Outcomes, kind: str, what: Any, call: Callable[[], Any], names: str) -> None:
    """Call; what it raises must be a ValueError whose message begins as `names` says, within SECONDS."""
    shown = repr(what)[:300]
    try:
        with within(SECONDS):
            call()
    except ValueError as error:
        if not re.match(names, str(error)) or "\n    full_key" in str(error):
            out.add(kind, "names nothing", f"{str(error)[:200]!r} for {shown}")
        else:
            out.add(kind, "refused by name")
    except TooLong:
        out.add(kind, "too long", shown)
    except BaseException as error:
        out.add(kind, "another exception", f"{type(error).__name__}: {str(error)[:200]} for {shown}")
    else:
        out.add(kind, "accepted")


def run(number: int, seed: int, strategy: st.SearchStrategy[Any], body: Callable[[Any], None]) -> None:
    """`body` with that many examples."""
    quiet = list(hypothesis.HealthCheck)
    phases = [hypothesis.Phase.generate]

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=number, database=None, deadline=None, suppress_health_check=quiet, phases=phases)
    @hypothesis.given(strategy)
    def each(value: Any) -> None:
        body(value)

    each()


def use_hierarchy(source: Any) -> None:
    """Load it, and if it is accepted, gate a small batch by it: the coefficients are numbers."""
    hierarchy = load_hierarchy(source)
    load_expert_partitions(source)
    load_token_labels(source)
    tokens = torch.arange(16)
    columns = {name: tokens // 4 if name == "trajectory" else tokens // 8 for name in hierarchy.columns}
    columns |= {name: tokens // 16 for name in hierarchy.columns if name in ("domain", "modality")}
    names = {"domain": ["code"]} if "domain" in columns else {}
    try:
        cells = hierarchy.cells(columns, names=names, shape=(4, 4))
    except ValueError:
        return  # of this batch: a name that its cells do not have, cells that do not nest
    found = token_coefficients(0.01 * torch.ones(16), torch.full((16,), 1 / 16), cells, hierarchy)
    assert bool(torch.isfinite(found).all()), "coefficients that are no numbers"


def hierarchies(number: int, seed: int, out: Outcomes) -> None:
    keys = "|".join((*HIERARCHY, "expert_partitions"))
    key = rf"(?s)(hierarchy|{keys}|[^:]{{0,60}}: unknown key|nested)"

    def of_mapping(edits: Any) -> None:
        made = edited(HIERARCHY, edits)
        tried(out, "hierarchies", made, lambda: use_hierarchy(made), key)

    run(number - number // 3, seed, edits_of(HIERARCHY), of_mapping)
    text = yaml.safe_dump(HIERARCHY, sort_keys=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "h.yaml"

        def of_file(changes: Any) -> None:
            changed = text
            for place, length, inserted in changes:
                changed = changed[:place] + inserted + changed[place + length :]
            path.write_bytes(changed.encode("utf-8", "surrogatepass"))
            tried(out, "hierarchy files", changed, lambda: use_hierarchy(path), re.escape(str(path)))

        odd = st.sampled_from(
            ["1:30", "010", "&a ", "*a", "<<: *a", "!!set ", "[", "{", "\t", "\0", "- ", "? ", "${", "|"]
        )
        change = st.tuples(st.integers(0, len(text)), st.integers(0, 12), odd | st.text(max_size=4))
        run(number // 3, seed, st.lists(change, min_size=1, max_size=3), of_file)


def run_configs(number: int, seed: int, out: Outcomes) -> None:
    base: Any = OmegaConf.to_container(compose("quickstart", ["data.heldout=null", "run_dir=runs/fuzz"]))
    sections = "|".join((*base, "[^:]{0,60}: unknown key", "nested"))

    def body(edits: Any) -> None:
        made = edited(base, edits)

        def check() -> None:
            try:
                cfg = OmegaConf.create(made)
            except Exception:
                return  # no YAML file has this: keys that OmegaConf cannot hold, a text that it cannot parse
            read_training_config(cfg)

        tried(out, "run configs", edits, check, rf"(?s)({sections})")

    run(number, seed, edits_of(base), body)


def lines(number: int, seed: int, out: Outcomes) -> None:
    of_name = {"math_verify": builtin.math_verify, "reasoning_gym": builtin.reasoning_gym}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "d.jsonl"

        def load() -> None:
            for record in load_prompts(path):
                wrong = checks.complaint(
                    of_name[record.grader], record.grader, record.fields, record.prompt, record.response
                )
                if wrong:
                    raise ValueError(f"{record.where}: {wrong}")

        def body(drawn: Any) -> None:
            which, edits, cut = drawn
            try:
                text = json.dumps(edited(LINES[which], edits), ensure_ascii=cut % 2 == 0)
                raw = text.encode("utf-8", "surrogatepass")
            except (ValueError, TypeError):
                return
            if cut % 7 == 0:  # damage of the text itself
                place = cut % (len(raw) + 1)
                raw = raw[:place] + bytes([cut % 256]) + raw[place + cut % 3 :]
            path.write_bytes(raw + b"\n")
            tried(out, "lines of data", raw, load, re.escape(str(path)))

        drawn = st.integers(0, len(LINES) - 1).flatmap(
            lambda which: st.tuples(st.just(which), edits_of(LINES[which], 2), st.integers(0, 5000))
        )
        run(number, seed, drawn, body)


def fuzz(configs: int = 5000, data: int = 10000, seed: int = 0) -> Outcomes:
    """`configs` hierarchies and run configs, four hierarchies to a run config; `data` lines."""
    out = Outcomes()
    hierarchies(configs - configs // 5, seed, out)
    run_configs(configs // 5, seed, out)
    lines(data, seed, out)
    return out
