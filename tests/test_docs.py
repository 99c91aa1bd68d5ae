"""The documents: links to files, and the functions and tests of the table of equations. Figures: test_figures.py."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
