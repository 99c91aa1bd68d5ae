"""Imports run one way, and `import nemo_fiberpo` needs torch and omegaconf alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nemo_fiberpo"

# The rooms, lowest first: a room may import itself and what is below it. `diagnostics`, `budget_warnings`, `config` and
# the package's `__init__` stand between the objective and megatron.
ROOMS = [
    "values", "yaml_text", "labelling", "objective", "diagnostics", "budget_warnings", "config", "__init__",
    "plan", "megatron", "aligner", "integrations", "analysis", "cli",
]  # fmt: skip
BELOW = {"values", "labelling", "objective"}
ALLOWED = {
    "values": {"values"},
    "yaml_text": set(),
    "labelling": {"labelling", "values"},
    "objective": BELOW,
    "diagnostics": {"diagnostics", *BELOW},
    "budget_warnings": {"objective"},
    "config": {"config", "budget_warnings", "yaml_text", *BELOW},
    "__init__": {"config", "objective"},
    "plan": {"plan", "objective", "labelling"},
    "megatron": {"megatron", "config", "objective", "labelling", "__init__"},
    "aligner": {"aligner", "plan", "megatron", "config", "budget_warnings", "yaml_text", "__init__", *BELOW},
    "integrations": {"integrations", "megatron", "config", "objective", "__init__"},
    "analysis": {"analysis", "aligner", "config", "objective"},
    "cli": set(ROOMS),
}
PURE = {"megatron", "nemo", "nemo_aligner", "omegaconf", "hydra", "numpy", "torch.distributed"}
# What no file of a room may import from outside; submodules included.
FORBIDDEN = {
    **dict.fromkeys(["values", "yaml_text", "labelling", "objective", "diagnostics"], PURE),
    "budget_warnings": {"megatron", "nemo", "nemo_aligner", "omegaconf", "hydra", "torch.distributed"},
    "config": {"megatron", "nemo", "nemo_aligner", "hydra", "torch.distributed"},
    "__init__": {"megatron", "nemo", "nemo_aligner", "hydra", "torch.distributed"},
    "plan": {"megatron", "nemo", "nemo_aligner", "omegaconf", "hydra", "torch.distributed"},
    "megatron": {"nemo", "nemo_aligner", "omegaconf", "hydra"},
    "analysis": {"megatron", "nemo", "nemo_aligner", "hydra"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The room of a file: its directory below the package, or its own name."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, inside functions and under conditions too."""
    package = ["nemo_fiberpo", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{stem}.{alias.name}"


def violations(path: Path) -> list[str]:
    room = room_of(path)
    found = []
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] == "nemo_fiberpo":
            target = parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"
            wrong = target not in ALLOWED[room]
        else:
            wrong = any(name == bad or name.startswith(bad + ".") for bad in FORBIDDEN.get(room, ()))
        if wrong:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path):
    assert room_of(path) in ALLOWED, f"{path}: give its room a place in ROOMS and ALLOWED"
    assert not violations(path)


def test_the_walk_sees_an_arrow_that_runs_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "objective").mkdir()
    bad = tmp_path / "objective" / "bad.py"
    bad.write_text(
        "from ..megatron import step\ndef f():\n    import torch.distributed as dist\nfrom .. import config\n"
    )
    assert [text.split(" imports ")[1] for text in violations(bad)] == [
        "nemo_fiberpo.megatron.step",
        "nemo_fiberpo.config",
        "torch.distributed",
    ]


def test_import_needs_torch_and_omegaconf_alone():
    # Every top-level module that torch and omegaconf bring along is theirs; anything first imported later is refused.
    code = """
import sys, torch, omegaconf, omegaconf.errors
theirs = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names) | {"nemo_fiberpo"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in theirs:
            raise ImportError(f"nemo_fiberpo needs {name}")
sys.meta_path.insert(0, Refuse())
import nemo_fiberpo
for name in nemo_fiberpo.__all__:
    getattr(nemo_fiberpo, name)
hierarchy = nemo_fiberpo.load_hierarchy({"token_clip": 1, "strata": [{"name": "a", "budget": {"pos": 1, "neg": 1}}]})
cells = hierarchy.cells({"a": torch.zeros(3, dtype=torch.int64)})
assert nemo_fiberpo.surrogate(torch.zeros(3), torch.ones(3), cells, hierarchy).value == 3.0
assert not {"megatron", "nemo", "nemo_aligner", "hydra"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
