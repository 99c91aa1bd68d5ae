"""report.md and report.json of `run.sh`, from the results of pytest, of `measure` and of two benchmarks.

    python -m tests.gpu.report FOLDER --stages "name status seconds ..."

FOLDER holds junit.xml, measure.json, logprobs.json and step.json, as far as its stages came; the exit status is 0 where
every check passed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks import logprobs
from tests.gpu import device
from tests.gpu.measure import markdown

PACKAGES = ("triton", "liger_kernel", "megatron-core", "transformer_engine", "apex", "numpy")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def read_checks(path: Path) -> dict[str, Any]:
    """Numbers of the checks by how they ended, and what those that did not pass say."""
    counts, failed, skipped = Counter[str](), {}, Counter[str]()
    for case in ET.parse(path).getroot().iter("testcase"):
        ended = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        counts["passed" if ended is None else ended.tag] += 1
        if ended is None:
            continue
        said = ended.get("message") or ""
        if ended.tag == "skipped":
            skipped[said] += 1
        else:
            failed[f"{case.get('classname')}::{case.get('name')}"] = said
    return {"counts": dict(counts), "failed": failed, "skipped": dict(skipped)}


def make_report(folder: Path, stages: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """What is known of a run, and what is missing of it. `stages` holds exit statuses and seconds."""
    seconds = {name: spent for name, (_, spent) in stages.items()}
    report: dict[str, Any] = {"device": device.describe(), "versions": versions(), "seconds": seconds}
    wrong = {name: status for name, (status, _) in stages.items() if status}
    ends = {124: "its time limit"}
    problems = [f"{name} ended by {ends.get(status, f'status {status}')}" for name, status in wrong.items()]
    checks, figures = folder / "junit.xml", folder / "measure.json"
    if checks.exists():
        report["checks"] = read_checks(checks)
        failed = report["checks"]["failed"].items()
        problems += [f"{name}: {(said.splitlines() or [''])[0]}" for name, said in failed]
        if not report["checks"]["counts"].get("passed"):
            problems.append("no check passed")
    else:
        problems.append("the checks did not end: there is no junit.xml")
    if figures.exists():
        report["measured"] = json.loads(figures.read_text())
        if report["measured"]["fell back to eager"]:
            problems.append("torch.compile failed while measuring")
    else:
        problems.append("measuring did not end: there is no measure.json")
    if (folder / "logprobs.json").exists():
        report["log-probs"] = json.loads((folder / "logprobs.json").read_text())
    else:
        problems.append("measuring log-probs did not end: there is no logprobs.json")
    if (folder / "step.json").exists():
        report["steps"] = json.loads((folder / "step.json").read_text())
    else:
        problems.append("measuring steps did not end: there is no step.json")
    return {**report, "problems": problems, "ok": not problems}


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# Checks on {report['device']}",
        "",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + ".",
        "Seconds: " + ", ".join(f"{name} {spent}" for name, spent in report["seconds"].items()) + ".",
        "",
        "All checks passed." if report["ok"] else "**Problems:**",
        *[f"- {problem}" for problem in report["problems"]],
    ]
    if "checks" in report:
        counts = report["checks"]["counts"]
        lines += ["", "Checks: " + ", ".join(f"{number} {name}" for name, number in counts.items()) + ". Skipped:"]
        lines += [f"- {number} x {reason}" for reason, number in report["checks"]["skipped"].items()]
    if "measured" in report:
        lines += ["", "## Figures", "", markdown(report["measured"])]
        if report["measured"]["not compiled"]:
            lines += ["", f"Nothing compiled was measured: {report['measured']['not compiled']}."]
    if "log-probs" in report:
        lines += ["", "## Log-probs", "", logprobs.markdown(report["log-probs"])]
    if "steps" in report:
        from benchmarks import step  # it imports Megatron, which a machine may lack

        lines += ["", "## Steps"]
        lines += [line for result in report["steps"] for line in ("", step.markdown(result))]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", default="", help="three words a stage: its name, exit status and seconds")
    args = parser.parse_args()
    words = args.stages.split()
    triples = zip(words[::3], words[1::3], words[2::3], strict=True)
    report = make_report(args.folder, {name: (int(status), int(spent)) for name, status, spent in triples})
    (args.folder / "report.json").write_text(json.dumps(report, indent=1))
    (args.folder / "report.md").write_text(as_markdown(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
