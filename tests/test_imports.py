"""Imports run one way. The names of the package need only torch and omegaconf, a help text not even torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nemo_fiberpo"

# The rooms, lowest first: a room may import itself, and of those below it what ALLOWED has. Files that stand beside the
# rooms of `aligner` are rooms of their own.
ROOMS = [
    "values", "cores", "fields", "logits", "step_cost", "labelling", "objective", "diagnostics", "budget_warnings",
    "yaml_text", "plain", "config", "__init__",
    "plan", "graders", "megatron", "verification", "storage", "prompts", "rewards", "hydra_support",
    "nemo_cpu", "nemo_config",
    "aligner.lifecycle", "aligner.config", "aligner.data", "aligner.generation", "aligner.rewards",
    "aligner.rollout", "aligner.finite", "aligner.checkpoint",
    "analysis", "aligner.loggers", "aligner.actor", "aligner.trainer", "aligner.build", "aligner.run",
    "conversion", "integrations", "cli",
]  # fmt: skip
BELOW = {"values", "fields", "logits", "labelling", "objective"}
ALLOWED = {
    "values": set(),
    "cores": set(),
    "fields": {"values"},
    "logits": {"values"},
    "step_cost": set(),
    "labelling": {"values", "fields"},
    "objective": BELOW,
    "diagnostics": BELOW,
    "budget_warnings": {"objective"},
    "yaml_text": set(),
    "plain": {"yaml_text"},
    "config": {"budget_warnings", "plain", *BELOW},
    "__init__": {"config", "objective"},
    "plan": {"logits", "step_cost", *BELOW},
    "graders": set(),
    "megatron": {"config", "logits", "step_cost", "objective", "labelling", "__init__"},
    "verification": {"megatron", "objective", "labelling"},
    "storage": {"cores", "megatron"},
    "prompts": {"graders", "storage", *BELOW},
    "rewards": {"graders", "prompts", "values"},
    "hydra_support": {"megatron", "plain", "yaml_text"},
    "nemo_cpu": {"megatron"},
    "nemo_config": {"plain", "values"},
    **{room: set(ROOMS[: ROOMS.index(room)]) for room in ROOMS if room.startswith("aligner.")},
    "conversion": {"config", "storage", "nemo_cpu"},
    "integrations": {"megatron", "config", "objective", "__init__"},
    "analysis": {"aligner.checkpoint", "config", "objective"},
    "cli": set(ROOMS),
}
PURE = {"megatron", "nemo", "nemo_aligner", "omegaconf", "hydra", "numpy", "torch.distributed"}
# What no file of a room may import from outside; submodules included.
FORBIDDEN = {
    **dict.fromkeys(
        ["values", "cores", "fields", "logits", "step_cost", "yaml_text", "labelling", "objective", "diagnostics"], PURE
    ),
    "budget_warnings": {"megatron", "nemo", "nemo_aligner", "omegaconf", "hydra", "torch.distributed"},
    "config": {"megatron", "nemo", "nemo_aligner", "hydra", "torch.distributed"},
    "__init__": {"megatron", "nemo", "nemo_aligner", "hydra", "torch.distributed"},
    "graders": PURE,
    "rewards": PURE,
    "prompts": {"torch", *PURE},
    "hydra_support": {"torch", "nemo", "nemo_aligner"},
    "nemo_config": {"torch", "nemo", "nemo_aligner"},
    "plan": {"megatron", "nemo", "nemo_aligner", "omegaconf", "hydra", "torch.distributed"},
    "megatron": {"nemo", "nemo_aligner", "omegaconf", "hydra"},
    "verification": {"nemo", "nemo_aligner", "omegaconf", "hydra"},
    "analysis": {"megatron", "nemo", "nemo_aligner", "hydra"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(*names: str) -> str:
    """The room of a module of the package, by the names that lead to it."""
    if names[:1] == ("aligner",) and len(names) > 1:
        return ".".join(names[:2])
    return names[0] if names and names[0] in ROOMS else "__init__"


def names_of(path: Path) -> tuple[str, ...]:
    """`("aligner", "data", "prompts")`; a package by its own."""
    names = path.relative_to(PACKAGE).with_suffix("").parts
    return names[:-1] if names[-1] == "__init__" else names


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
    room = room_of(*names_of(path))
    found = []
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] == "nemo_fiberpo":
            wrong = room_of(*parts[1:]) not in {room, *ALLOWED[room]}
        else:
            wrong = any(name == bad or name.startswith(bad + ".") for bad in FORBIDDEN.get(room, ()))
        if wrong:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path):
    names = names_of(path)
    if names == ("aligner",):  # says what the room is, and imports nothing
        assert not list(imports(path))
        return
    assert room_of(*names) in ALLOWED, f"{path}: give its room a place in ROOMS and ALLOWED"
    assert not violations(path)


def test_no_file_imports_what_imports_it():
    modules = {".".join(("nemo_fiberpo", *names_of(path))): path for path in FILES}
    arrows = {}
    for name, path in modules.items():
        targets = ((full, full.rpartition(".")[0]) for _, full in imports(path))
        arrows[name] = {module for pair in targets for module in pair if module in modules and module != name}
    packages = {".".join(name.split(".")[:depth]) for name in modules for depth in range(1, name.count(".") + 1)}
    for name in arrows:  # `from package import module` needs the module, not what the package imports
        arrows[name] -= packages
    left = dict(arrows)
    while ready := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in ready:
            del left[name]
    assert not left, f"imports in a circle: {sorted(left)}"


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


def test_import_needs_only_torch_and_omegaconf():
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
assert nemo_fiberpo.objective.Gate and nemo_fiberpo.config.load_hierarchy
for name in nemo_fiberpo.__all__:
    getattr(nemo_fiberpo, name)
hierarchy = nemo_fiberpo.load_hierarchy({"token_clip": 1, "strata": [{"name": "a", "budget": {"pos": 1, "neg": 1}}]})
cells = hierarchy.cells({"a": torch.zeros(3, dtype=torch.int64)})
assert nemo_fiberpo.surrogate(torch.zeros(3), torch.ones(3), cells, hierarchy).value == 3.0
assert not {"megatron", "nemo", "nemo_aligner", "hydra"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "from nemo_fiberpo import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass",
        "import nemo_fiberpo.cli.rank",
        "import runpy; runpy.run_path('examples/train_gpt_fiberpo.py', run_name='__mp_main__')",
    ],
    ids=["help", "child of a rank of fiberpo", "child of a rank of the script"],
)
def test_a_help_text_and_the_child_of_a_rank_need_no_torch(code: str):
    """multiprocessing imports the main module of a rank again in its children; torch takes two seconds."""
    code += "\nimport sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
