"""The commands `fiberpo compare` and `fiberpo calibrate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMPARE = """Reads metrics.jsonl, run.json and heldout_*.jsonl of every run, of unfinished ones too. Prints tables, and
writes compare.png, compare.html (one file, to be opened in a browser) and compare.csv. docs/analysis.md explains them.

examples:
  fiberpo compare runs/seed0 runs/seed1 runs/grpo0 runs/grpo1
  fiberpo compare runs/* --reward 0.6 --out comparison
"""
CALIBRATE = """Reads metrics.jsonl and run.json of a run, with FiberPO or with an objective that only lets the hierarchy
watch, and prints the budgets that would let most of its cells pass at the last optimizer step of a rollout.
docs/analysis.md has the rule.

examples:
  fiberpo calibrate runs/grpo
  fiberpo calibrate runs/grpo-seed0 runs/grpo-seed1
  fiberpo calibrate runs/grpo --pass 0.99 --out conf/hierarchy/calibrated.yaml   then hierarchy=calibrated
"""


def add_commands(commands: Any, formatter: Any) -> None:
    """`compare` and `calibrate`, to the subparsers of `fiberpo`."""

    def add(name: str, **texts: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(
            name, formatter_class=formatter, allow_abbrev=False, **texts
        )
        return parser

    compare = add("compare", help="several runs side by side", description=COMPARE)
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the run_dir of a run")
    compare.add_argument("--out", type=Path, default=Path("comparison"), metavar="DIR", help="default: comparison")
    compare.add_argument("--reward", type=float, metavar="R", help="also: RL steps until the training reward is R")
    compare.add_argument("--title", default="", help="of the picture and the page")
    calibrate = add("calibrate", help="budgets from the drift of a run", description=CALIBRATE)
    calibrate.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="the run_dir of a run; seeds of one setting count as one run"
    )
    calibrate.add_argument(
        "--pass",
        dest="passing",
        type=float,
        metavar="Q",
        help="share of cells within their budget at the last optimizer step of a rollout; default: 0.95",
    )
    calibrate.add_argument("--cells", action="store_true", help="also propose budgets for all named cells")
    calibrate.add_argument("--out", type=Path, metavar="FILE.yaml", help="write the hierarchy there")


def run(given: argparse.Namespace, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
    """Run the command; ValueError or OSError if the runs cannot be read."""
    (_compare if given.command == "compare" else _calibrate)(given, say, warn)


def _compare(given: argparse.Namespace, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
    from nemo_fiberpo.analysis.compare import compare, comparison_tables, write_comparison

    found = compare(given.runs, given.reward)
    for note in found.notes:
        warn(f"note: {note}\n")
    for table in comparison_tables(found):
        say(table.as_text() + "\n\n")
    for path in write_comparison(found, given.out, given.title):
        say(f"wrote {path}\n")


def _calibrate(given: argparse.Namespace, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
    from nemo_fiberpo.analysis.calibrate import PASSING, calibrate
    from nemo_fiberpo.analysis.explanation import explain, hierarchy_yaml

    passing = PASSING if given.passing is None else given.passing
    proposal, name = calibrate(given.runs, passing, given.cells), ", ".join(map(str, given.runs))
    say(explain(proposal, name) + "\n")
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(hierarchy_yaml(proposal, name), "utf-8")
        say(f"\nwrote {given.out}\n")
