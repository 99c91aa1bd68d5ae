"""The tables and pictures of the study, from the results of its runs.

    python examples/study/results.py

Reads docs/study/results/*.json; writes docs/study/tables.md and docs/study/<stage>.png, a table and a picture for each
stage of study.yaml that has results. They cover every run that was made.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from study_runs import Run, read_by_setting, read_references, read_study

from nemo_fiberpo.analysis.summary import first_at

STUDY = Path(__file__).resolve().parents[2] / "docs" / "study"
BASELINES = ("grpo", "clip_higher", "ppo", "gspo")
MARGIN = -0.03  # "not inferior": the lower bound of the difference to the best baseline is above this
SEEDS = 5  # fewer get no verdict: their intervals cover little but the spread of prompts
RESAMPLES = 10_000
OUTCOMES: dict[str, list[str]] = read_by_setting("outcome")
TITLES: dict[str, str] = read_by_setting("titles")
Result = dict[str, Any]
Arm = tuple[str, str, float]  # setting, objective, learning rate


def rewards(result: Result, moment: str) -> NDArray[np.float64]:
    """Of every held-out prompt that counts in the setting, in order of domains; nan where the answer was not graded."""
    digits = "".join(result["heldout"][moment][domain] for domain in counted(result))
    return np.array([float(digit) if digit != "-" else np.nan for digit in digits])


def counted(result: Result) -> list[str]:
    """The domains whose reward is the outcome."""
    return OUTCOMES.get(result["setting"]) or sorted(result["heldout"]["before"])


def final(result: Result) -> NDArray[np.float64]:
    """`rewards` after training; all 0 for a run that ended with an error."""
    return rewards(result, "after") if result["heldout"]["after"] else np.zeros_like(rewards(result, "before"))


def collapsed(result: Result) -> bool:
    """The final held-out reward is below half of what it was before."""
    return bool(np.nanmean(final(result)) < np.nanmean(rewards(result, "before")) / 2)


def domain_means(result: Result) -> dict[str, float]:
    after = result["heldout"]["after"] or dict.fromkeys(result["heldout"]["before"], "0")
    graded = {domain: digits.replace("-", "") for domain, digits in after.items()}
    return {domain: digits.count("1") / max(len(digits), 1) for domain, digits in graded.items()}


def area(result: Result) -> float:
    """Mean reward of the sampled responses over all RL steps; a run that ended early counts 0 from there on."""
    curve = result["curves"].get("train_rollouts/rewards", [])
    return sum(value or 0.0 for value in curve) / max(planned_steps(result), 1)


def planned_steps(result: Result) -> int:
    given = [one.split("=")[1] for one in result["overrides"] if one.startswith("algorithm.rl_steps=")]
    return int(given[-1])


def interval(differences: Sequence[NDArray[np.float64]], generator: np.random.Generator) -> tuple[float, float]:
    """95 percent interval of the mean of paired differences, by a bootstrap of seeds, and of prompts within each.

    `scipy.stats.bootstrap` resamples one level: the spread of prompts within a seed, or that of seeds, would be lost.
    """
    means = np.empty((RESAMPLES, len(differences)))
    for column, values in enumerate(differences):
        values = values[~np.isnan(values)]
        # The mean of n draws with replacement, by how often each distinct value is drawn.
        distinct, counts = np.unique(values, return_counts=True)
        draws = generator.multinomial(len(values), counts / len(values), size=RESAMPLES)
        means[:, column] = draws @ distinct / len(values)
    chosen = generator.integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.quantile(np.take_along_axis(means, chosen, axis=1).mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def paired(arm: Mapping[int, Result], other: Mapping[int, Result]) -> list[NDArray[np.float64]]:
    """By seed, the differences of the final rewards of the same prompts."""
    return [final(arm[seed]) - final(other[seed]) for seed in sorted(set(arm) & set(other))]


def verdict(low: float, high: float) -> str:
    if low > MARGIN:
        return "better" if low > 0 else "not inferior"
    return "inferior" if high < MARGIN else "undecided"


def panels(arms: Mapping[Arm, Mapping[int, Result]]) -> list[tuple[str, dict[Arm, Mapping[int, Result]]]]:
    """Titles and arms that are compared: those of a setting, and of a learning rate where an objective has several."""
    by_rate = len({arm[:2] for arm in arms}) < len(arms)
    out: dict[tuple[str, float], dict[Arm, Mapping[int, Result]]] = defaultdict(dict)
    for arm, of_seed in arms.items():
        out[arm[0], arm[2] if by_rate else 0.0][arm] = of_seed
    return [
        (TITLES.get(setting, setting) + (f", learning rate {lr:.1e}" if lr else ""), out[setting, lr])
        for setting, lr in sorted(out)
    ]


GAIN = 0.1  # "steps": the first RL step at which the mean reward of five is this much above the held-out reward before
OUTCOME = (
    "objective", "learning rate", "seeds", "before", "after", "by domain", "worst", "area", "steps", "collapses",
    "difference to the reference", "",
)  # fmt: skip


def tables(arms: Mapping[Arm, Mapping[int, Result]], references: Collection[str] = BASELINES) -> list[str]:
    """Markdown of every panel: outcomes, with a row for each arm, best first, compared with the best of the references
    in the panel; then `inside` of the same arms."""
    out = []
    for title, here in panels(arms):
        ordered = sorted(here, key=lambda arm: -mean_reward(here[arm]))
        best = next((arm for arm in ordered if arm[1] in references), None)
        names = " / ".join(domain_means(next(iter(here[ordered[0]].values()))))
        out += ["", f"### {title}", "", *rule([one.replace("by domain", names) for one in OUTCOME])]
        for arm in ordered:
            results = list(here[arm].values())
            domains = [domain_means(result) for result in results]
            averages = [np.mean([means[domain] for means in domains]) for domain in domains[0]]
            cells = [arm[1], f"{arm[2]:.1e}", str(len(results))]
            cells += [f"{np.mean([np.nanmean(rewards(result, 'before')) for result in results]):.3f}"]
            cells += [f"{mean_reward(here[arm]):.3f}", " / ".join(f"{value:.2f}" for value in averages)]
            cells += [f"{np.mean([min(domain_means(r)[name] for name in counted(r)) for r in results]):.3f}"]
            cells += [f"{np.mean([area(result) for result in results]):.3f}", steps_to_gain(results)]
            cells += [str(sum(map(collapsed, results)))]
            differences = paired(here[arm], here[best]) if best is not None and arm != best else []
            if differences:
                low, high = interval(differences, np.random.default_rng(0))
                mean = np.mean([np.nanmean(values) for values in differences])
                told = verdict(low, high) if len(differences) >= SEEDS else ""
                cells += [f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", told]
            else:
                cells += ["", "reference" if arm == best else ""]
            out.append(row(cells))
        out += ["", *inside({arm: list(here[arm].values()) for arm in ordered})]
    return out


def inside(arms: Mapping[Arm, Sequence[Result]]) -> list[str]:
    """Markdown of means over the last five RL steps: entropy, the share of tokens that their clip cuts, and by stratum
    the largest drift of a cell in nats."""
    curves = [name for results in arms.values() for result in results for name in result["curves"]]
    strata = sorted({name.split("/")[2] for name in curves if name.endswith("/drift_max")})
    out = rule(["objective", "entropy", "tokens cut", *(f"drift of {stratum}, up and down" for stratum in strata)])
    for arm, results in arms.items():
        cells = [arm[1], f"{last(results, 'train_rollouts/entropy'):.2f}"]
        cells += [f"{last(results, 'train_optim/gates/token/clipped'):.0%}"]
        for stratum in strata:
            drifts = [last(results, f"train_optim/gates/{stratum}/{sign}/drift_max") for sign in ("pos", "neg")]
            cells.append("" if np.isnan(drifts).all() else f"{drifts[0]:.2f}, {drifts[1]:.2f}")
        out.append(row(cells))
    return out


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rule(head: Sequence[str]) -> list[str]:
    return [row(head), "|---" * len(head) + "|"]


def mean_reward(of_seed: Mapping[int, Result]) -> float:
    return float(np.mean([np.nanmean(final(result)) for result in of_seed.values()]))


def steps_to_gain(results: Sequence[Result]) -> str:
    """The mean number of RL steps to `GAIN`, over the seeds that reach it, and how many do not."""
    reached = []
    for result in results:
        curve = list(enumerate(result["curves"].get("train_rollouts/rewards", []), 1))
        known = [(step, value) for step, value in curve if value is not None]
        reached.append(first_at(known, float(np.nanmean(rewards(result, "before"))) + GAIN))
    steps = [step for step in reached if step is not None]
    told = [f"{np.mean(steps):.1f}"] if steps else []
    return ", ".join(told + [f"{len(reached) - len(steps)} never"] * (len(steps) < len(reached)))


def last(results: Sequence[Result], metric: str, width: int = 5) -> float:
    """The mean of a metric over seeds and the last RL steps; nan without any."""
    curves = [result["curves"].get(metric, [])[-width:] for result in results]
    values = np.array([value for curve in curves for value in curve if value is not None])
    return float(values.mean()) if len(values) else float("nan")


def picture(arms: Mapping[Arm, Mapping[int, Result]], path: Path) -> None:
    """Reward of the sampled responses over RL steps, the mean of five: the mean over seeds, and their range."""
    shown = panels(arms)
    figure, axes = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 4.2), squeeze=False, sharey=True)
    objectives = sorted({objective for _, objective, _ in arms})
    shades = plt.get_cmap("tab10" if len(objectives) <= 10 else "tab20")
    colours = {objective: shades(index) for index, objective in enumerate(objectives)}
    for axis, (title, here) in zip(axes[0], shown, strict=True):
        for (_, objective, _), of_seed in sorted(here.items()):
            curves = [result["curves"].get("train_rollouts/rewards", []) for result in of_seed.values()]
            length = max(map(len, curves))
            values = np.array([[*smooth(curve), *[np.nan] * (length - len(curve))] for curve in curves], dtype=float)
            steps = np.arange(1, length + 1)
            style = "-" if objective not in BASELINES else "--"
            axis.plot(
                steps,
                np.nanmean(values, axis=0),
                style,
                color=colours[objective],
                label=f"{objective}, {count(of_seed)}",
            )
            axis.fill_between(steps, np.nanmin(values, 0), np.nanmax(values, 0), color=colours[objective], alpha=0.1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("RL step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("training reward, mean of 5 RL steps")
    entries = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = sorted(entries)
    figure.legend(
        [entries[label] for label in labels], labels, fontsize=8, loc="center left", bbox_to_anchor=(0.91, 0.5)
    )
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def count(of_seed: Mapping[int, Result]) -> str:
    return f"{len(of_seed)} seed" + "s" * (len(of_seed) > 1)


def smooth(curve: Sequence[float | None], width: int = 5) -> list[float]:
    """The mean of each value and those before it, at most `width`; null values left out."""
    values = np.array(curve, dtype=float)
    return [float(np.nanmean(values[max(0, at + 1 - width) : at + 1])) for at in range(len(values))]


def read_results(folder: Path) -> dict[str, Result]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def of_stage(runs: Sequence[Run], results: Mapping[str, Result]) -> dict[Arm, dict[int, Result]]:
    """The results that there are, by arm and seed."""
    arms: dict[Arm, dict[int, Result]] = defaultdict(dict)
    for run in runs:
        if run.name in results:
            arms[run.setting, run.objective, run.lr][run.seed] = results[run.name]
    return dict(arms)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tables and pictures of the study.")
    parser.add_argument("--results", type=Path, default=STUDY / "results", help="folder of the results")
    parser.add_argument("--out", type=Path, default=STUDY, help="folder to write into")
    args = parser.parse_args()
    results = read_results(args.results)
    lines = [
        "# Tables of the study",
        "",
        "Made by `python examples/study/results.py`, explained in [study.md](../study.md).",
    ]
    references = read_references()
    for stage, runs in read_study().items():
        arms = of_stage(runs, results)
        if not arms:
            continue
        done = sum(map(len, arms.values()))
        lines += ["", f"## {stage}", "", f"{done} of {len(runs)} runs."]
        lines += [*tables(arms, references.get(stage, BASELINES)), "", f"![{stage}]({stage}.png)"]
        picture(arms, args.out / f"{stage}.png")
    (args.out / "tables.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
