"""Several runs side by side: tables, one picture, one page and one CSV.

    fiberpo compare RUN [RUN ...]

Runs whose configurations differ only in seed and folder form a group. Runs without metrics.jsonl or run.json are left
out; unfinished ones are compared as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_fiberpo.analysis.comparison_picture import plot_comparison
from nemo_fiberpo.analysis.groups import labels, settings_of, settings_table
from nemo_fiberpo.analysis.heldout import Row
from nemo_fiberpo.analysis.page import write_page
from nemo_fiberpo.analysis.runs import MODES, Run
from nemo_fiberpo.analysis.summary import TRAILING, Summary, over_seeds, summarise
from nemo_fiberpo.analysis.tables import Table, as_csv, interval, number

NEEDED = ("metrics.jsonl", "run.json")
FILES = ("compare.png", "compare.html", "compare.csv")


@dataclass(frozen=True)
class Comparison:
    """Runs, ordered by group; `settings` holds the configuration of each group; `notes` explain what was left out."""

    summaries: list[Summary]
    settings: Mapping[str, Mapping[str, object]]
    level: float | None
    notes: list[str]

    @property
    def groups(self) -> dict[str, list[Summary]]:
        return {group: [one for one in self.summaries if one.group == group] for group in self.settings}

    @property
    def strata(self) -> list[str]:
        return list(dict.fromkeys(stratum for one in self.summaries for stratum in one.drift))


def compare(folders: Sequence[Path], level: float | None = None) -> Comparison:
    """Read and summarise the runs. ValueError if none can be compared.

    level  training reward; the comparison shows the RL step at which each run first reaches it
    """
    runs, notes = _readable(folders)
    if not runs:
        raise ValueError("; ".join(notes) or "no run was given")
    settings = [settings_of(run) for run in runs]
    of_run = labels(settings)
    by_group = dict(zip(of_run, settings, strict=True))
    made = [summarise(run, group, level) for run, group in zip(runs, of_run, strict=True)]
    summaries = [one for group in by_group for one in made if one.group == group]
    notes += [note for one in summaries for note in one.notes]
    if len({run.identity.get("data.heldout.sha256") for run in runs}) > 1:
        notes.append("data.heldout.sha256 differs: these runs were not tested on the same held-out prompts")
    return Comparison(summaries, by_group, level, notes)


def _readable(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    runs, notes = [], []
    for folder in dict.fromkeys(folders):
        missing = [name for name in NEEDED if not (folder / name).exists()]
        run = Run(folder)
        if missing:
            notes.append(f"{folder}: left out, no {' and '.join(missing)} in it")
        elif not run.rows:
            notes.append(f"{folder}: left out, metrics.jsonl has no line yet")
        else:
            runs.append(run)
    return runs, notes


def write_comparison(found: Comparison, out: Path, title: str = "") -> list[Path]:
    """Write the picture, the page and the CSV into the folder `out` and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    picture, page, table = (out / name for name in FILES)
    plot_comparison(found.groups, found.strata, picture, title)
    tables = [*reversed(comparison_tables(found)), *_settings(found)]
    write_page(page, title or "Comparison of runs", tables, picture, found.notes)
    table.write_text(comparison_csv(found), "utf-8")
    return [picture, page, table]


def comparison_tables(found: Comparison) -> list[Table]:
    """The tables, longest first: in a terminal, the last one stays in view."""
    return [table for table in (_heldout(found), _training(found), _over_seeds(found)) if table.rows]


def _heldout(found: Comparison) -> Table:
    rows = []
    for one in found.summaries:
        for row in one.heldout:
            change = [number(row.difference, "+.3f"), interval(row.low, row.high), str(row.n)]
            rows.append([one.group, one.run.name, row.domain, row.mode, number(row.before), number(row.after), *change])
        if not one.heldout:
            rows += [
                [one.group, one.run.name, domain, mode, number(before), "-", "-", "-", "-"]
                for (domain, mode), before in sorted(
                    one.before.items(), key=lambda item: (MODES.index(item[0][1]), item)
                )
            ]
    columns = ["group", "run", "domain", "decoding", "before", "after", "change", "95% interval", "prompts"]
    note = "The interval is the 95 percent paired bootstrap interval of the change over prompts."
    return Table("Held-out reward", columns, rows, note)


def _over_seeds(found: Comparison) -> Table:
    rows = []
    for group, members in found.groups.items():
        of: dict[tuple[str, str], list[Row]] = {}
        for row in (row for one in members for row in one.heldout):
            of.setdefault((row.domain, row.mode), []).append(row)
        for (domain, mode), seeds in of.items():
            if len(seeds) > 1:
                after = number(over_seeds([row.after for row in seeds])[0])
                mean, low, high = over_seeds([row.difference for row in seeds])
                rows.append([group, domain, mode, str(len(seeds)), after, number(mean, "+.3f"), interval(low, high)])
    columns = ["group", "domain", "decoding", "runs", "after", "change", "95% interval"]
    note = "Means over the runs of a group, with the 95 percent interval of Student's t over them."
    return Table("Held-out reward over seeds", columns, rows, note)


def _training(found: Comparison) -> Table:
    reached = [] if found.level is None else [f"reaches {found.level:g}"]
    columns = ["group", "run", "RL steps", "area", *reached, "TV", "KL", "entropy", "s/step", "min"]
    columns += [f"{stratum} beyond" for stratum in found.strata]
    rows = []
    for one in found.summaries:
        at = [] if found.level is None else [str(one.reached) if one.reached is not None else "never"]
        entropy = f"{number(one.entropy[0])} to {number(one.entropy[1])}"
        time = [number(one.seconds_per_step, ".1f"), number(one.seconds / 60, ".1f")]
        beyond = [number(100 * one.beyond[s], ".0f") + "%" if s in one.beyond else "-" for s in found.strata]
        figures = [number(one.area), *at, number(one.tv, ".2g"), number(one.kl, ".2g"), entropy, *time]
        rows.append([one.group, one.run.name, str(one.rl_steps), *figures, *beyond])
    note = (
        "area: under the curve of the training reward, divided by its length in RL steps. reaches: the first RL step "
        f"at which the mean training reward of {TRAILING} RL steps is at least that. TV, KL: from the policy that "
        "sampled, the largest of a rollout, mean over RL steps. entropy: nats per token, first and last RL step. "
        "beyond: optimizer steps, except on-policy ones, in which a cell of the stratum is beyond its budget."
    )
    return Table("Training", columns, rows, note)


def _settings(found: Comparison) -> list[Table]:
    rows = settings_table(found.settings)
    note = "Every key of run.json in which groups differ, except seeds and folders."
    return [Table("Settings that differ", ["setting", *found.settings], rows, note)] if rows else []


def comparison_csv(found: Comparison) -> str:
    """A line per run, domain and mode; the figures of a run are repeated in each of its lines."""
    strata = found.strata
    columns = ["group", "run", "seed", "domain", "decoding", "before", "after", "change", "low", "high", "prompts"]
    columns += ["rl_steps", "area", "reached", "tv", "kl", "entropy_first", "entropy_last", "seconds"]
    columns += ["seconds_per_step", *(f"drift_{s}" for s in strata), *(f"beyond_{s}" for s in strata)]
    lines: list[list[object]] = []
    for one in found.summaries:
        figures: list[object] = [one.rl_steps, one.area, one.reached, one.tv, one.kl, *one.entropy, one.seconds]
        figures += [one.seconds_per_step, *(one.drift.get(s) for s in strata), *(one.beyond.get(s) for s in strata)]
        head = [one.group, str(one.run.path), one.run.identity.get("seed")]
        tested: list[list[object]] = [
            [row.domain, row.mode, row.before, row.after, row.difference, row.low, row.high, row.n]
            for row in one.heldout
        ] or [[domain, mode, before, *[None] * 5] for (domain, mode), before in sorted(one.before.items())]
        lines += [[*head, *row, *figures] for row in tested or [[None] * 8]]
    return as_csv(columns, lines)
