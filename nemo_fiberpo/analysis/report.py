"""The report of a run: a picture and a table.

    python -m nemo_fiberpo.analysis.report RUN_DIR [RUN_DIR ...]

reads from each RUN_DIR
    metrics.jsonl           JSON objects with "rl_step" (from 0) and the keys of `runs.METRIC_KEYS`; others are ignored
    heldout_before.jsonl    one answer a line: prompt_index, domain, mode ("sampled" | "greedy"), reward (null where the
    heldout_after.jsonl     grader failed), response
and writes report.png beside them and a table to the terminal. Parts that need a missing file are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nemo_fiberpo.analysis.heldout import Row, format_table, heldout_table
from nemo_fiberpo.analysis.picture import plot_report
from nemo_fiberpo.analysis.runs import Run


def format_markdown(runs: Sequence[tuple[str, Sequence[Row], dict[str, float]]]) -> str:
    """(name, held-out rows, gates at work) of several runs as one Markdown table, and a second one of the gates."""
    lines = [
        "| run | domain | decoding | before | after | change | 95% interval | prompts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows, _ in runs:
        lines += [
            f"| {name} | {row.domain} | {row.mode} | {row.before:.3f} | {row.after:.3f} | {row.difference:+.3f} "
            f"| [{row.low:+.3f}, {row.high:+.3f}] | {row.n} |"
            for row in rows
        ]
    strata = list(dict.fromkeys(stratum for _, _, gates in runs for stratum in gates))
    lines += ["", "| run | " + " | ".join(strata) + " |", "|---" * (len(strata) + 1) + "|"]
    for name, _, gates in runs:
        lines.append(f"| {name} | " + " | ".join(f"{100 * gates.get(stratum, 0):.0f}%" for stratum in strata) + " |")
    return "\n".join(lines)


def make_report(folder: Path, picture: Path | None = None, title: str = "") -> list[Row]:
    """Write the picture of the run in `folder` (default: report.png in it) and return the held-out rows.

    FileNotFoundError if the folder holds none of the files that a report needs.
    """
    run = Run(folder)
    before, after = run.heldout("before"), run.heldout("after")
    has_metrics = (folder / "metrics.jsonl").exists()
    rows = heldout_table(before, after) if before is not None and after is not None else []
    if not (has_metrics or rows):
        raise FileNotFoundError(
            f"{folder}: neither metrics.jsonl nor heldout_before.jsonl and heldout_after.jsonl in it"
        )
    heldout = {row.domain: (row.before, row.after) for row in rows if row.mode == "sampled"}
    curves = run.curves if has_metrics else {"train_reward": {}, "budget_used": {}, "token_share": {}}
    plot_report(
        curves["train_reward"], curves["budget_used"], heldout, picture or folder / "report.png", title,
        label_drifts=run.label_drifts if has_metrics else {}, token_shares=curves["token_share"],
    )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nemo_fiberpo.analysis.report", description="The report of a run.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="run", help="folder with metrics.jsonl, heldout_*.jsonl")
    parser.add_argument("--out", type=Path, help="where the picture of a single run goes (default: RUN/report.png)")
    parser.add_argument("--title", default="", help="a line above the picture")
    parser.add_argument("--markdown", action="store_true", help="print one Markdown table of all runs")
    args = parser.parse_args()
    if args.out and len(args.runs) > 1:
        parser.error("--out: applies to a single run")
    tables = [make_report(run, args.out, args.title) for run in args.runs]
    if args.markdown:
        runs = zip(args.runs, tables, strict=True)
        print(format_markdown([(run.name, rows, Run(run).gates_at_work()) for run, rows in runs]))
        return
    for run, rows in zip(args.runs, tables, strict=True):
        if rows:
            print(format_table(rows))
        print(f"wrote {args.out or run / 'report.png'}")


if __name__ == "__main__":
    main()
