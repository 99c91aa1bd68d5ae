"""The documents: links to files, the functions and tests of the table of equations, and what the figures show."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import nemo_fiberpo as fpo

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def links(document: Path) -> list[tuple[str, Path]]:
    """Text and target of every link to a file, outside of code blocks."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    found = [(name, target.split("#")[0]) for name, target in LINK.findall(text) if "://" not in target]
    return [(name, (document.parent / target).resolve()) for name, target in found if target]


@functools.cache
def defined(path: Path) -> frozenset[str]:
    """Functions, classes, methods and constants of a module, methods and fields as Class.name."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return frozenset(names)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_every_name_is_in_it(document: Path):
    wrong = []
    for text, target in links(document):
        if not target.exists():
            wrong.append(f"[{text}]: no file {target}")
        elif "::" in text:
            file, name = text.strip("`").split("::")
            if file != target.name or name not in defined(target):
                wrong.append(f"[{text}]: not in {target}")
    assert not wrong, "\n".join(wrong)


def table() -> list[tuple[str, str]]:
    """First cell and whole line of every row of equations.md, up to the formulas."""
    text, _ = (ROOT / "docs" / "equations.md").read_text().split("\n## Formulas of this package\n")
    lines = text.splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| equation")]
    return [(line.split("|")[1].strip(), line) for line in rows]


def test_every_row_of_the_table_has_a_test_and_no_equation_is_missing():
    rows = table()
    assert len(rows) > 50
    covered = set()
    for first, line in rows:
        tests = [text for text, _ in LINK.findall(line) if text.strip("`").startswith("test_") and "::" in text]
        assert tests or "no test" in line, f"{first}: names no test"
        for low, high in re.findall(r"\((\d+)\)(?:-\((\d+)\))?", first):
            covered |= set(range(int(low), int(high or low) + 1))
    assert covered == set(range(1, 83))


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(FIGURES))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_figure_2_has_a_point_of_the_reported_value_in_each_regime(figure):
    names, values = zip(*figure("figure2").values(), strict=True)
    assert names == ("G-I", "G-II,r", "G-II", "G-III,r", "G-III")
    assert values == pytest.approx([-0.01, 0.09, 0.20, 0.12, 0.0], abs=1e-12)


def test_figure_3_is_five_rings_with_the_local_regimes_inside_the_first(figure):
    module = figure("figure3")
    delta, _ = module.plane(1.05, 150)
    outer, local = module.regimes_of(delta[delta.min(1).values > -1.0])
    assert set(outer.tolist()) == {0, 1, 2, 3, 4}
    assert set(local[outer == 0].tolist()) == {0, 1, 2}
    assert local[outer > 0].min() > 0  # L-I lies in G-I
    # outwards along rays the regime never goes back
    angle = torch.linspace(0.0, 2.0 * torch.pi, 61, dtype=torch.float64)
    radius = torch.linspace(0.0, 1.0, 200, dtype=torch.float64)[:, None, None]
    rays = radius * (torch.stack([angle.cos(), angle.sin()], 1) @ module.AXES)
    order = module.regimes_of(rays.view(-1, 3))[0].view(200, 61)
    assert (order.diff(dim=0) >= 0).all() and (order[-1] >= 3).all()


def test_figure_4_has_the_reported_order_of_events(figure):
    module = figure("figure4")
    course = module.follow()
    happened = module.events(course)
    assert list(happened) == ["first eps clip", "C- onset", "C-*", "C+ onset", "C+*"]
    assert list(happened.values()) == sorted(happened.values())
    assert list(happened.values()) == pytest.approx([0.138, 0.250, 0.257, 0.716, 0.742], abs=0.012)
    onset, peak = int((course.t - happened["C- onset"]).abs().argmin()), int(course.value.argmax())
    reported = [course.value[0], course.value[onset], course.value[peak], course.value[-1]]
    assert [float(value) for value in reported] == pytest.approx([0.198, 0.269, 0.310, 0.275], abs=0.005)
    assert int(course.log_weight.abs().argmax()) == peak
    assert float(course.log_weight[peak]) == pytest.approx(0.12, abs=1e-3)
    weighted = fpo.token_weights(module.ONE) * torch.tensor(module.ADVANTAGE, dtype=torch.float64)
    for at in range(0, 1001, 50):
        log_ratio = torch.log1p(course.t[at] * torch.tensor(module.DELTA, dtype=torch.float64))
        value = fpo.surrogate(log_ratio, weighted, module.ONE, module.HIERARCHY).value
        assert value == pytest.approx(float(course.value[at]), abs=1e-15)
    zeroed = course.t >= happened["C+*"]
    assert (course.log_weight[zeroed] == 0.0).all()
    torch.testing.assert_close(course.value[zeroed], course.without_weight[zeroed], rtol=0, atol=1e-15)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_one_command_draws_a_figure(number: int, tmp_path: Path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(FIGURES / f"figure{number}.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    picture = tmp_path / f"figure{number}.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 120_000
