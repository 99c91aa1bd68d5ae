"""Time that the graders' worker processes add to grading, for short answers that a reasoning-gym task grades.

    python benchmarks/graders.py [--workers 2]

A pair is the same answers graded in this process and by `RuleRewards` with its workers, in turns of either order.
Printed are the medians and the median of the pairs' ratios; the rewards of both are compared. What the workers buy is
that an answer that hangs, crashes or eats memory costs only itself.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

from nemo_fiberpo.graders.builtin import reasoning_gym
from nemo_fiberpo.prompts.records import PromptRecord
from nemo_fiberpo.rewards import RuleRewards

ENTRY = {"answer": "5", "metadata": {}, "question": "2 - 4 + 7 ="}
RECORD = PromptRecord("p", "d", "reasoning_gym", {"task": "chain_sum", "entry": ENTRY}, "benchmark:1")


def timed(grade: Callable[[], list[float]]) -> tuple[float, list[float]]:
    """Seconds of wall clock, and the rewards."""
    begun = time.perf_counter()
    rewards = grade()
    return time.perf_counter() - begun, rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=800)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    answers = ["5", "6"] * (options.answers // 2)

    with RuleRewards([RECORD], workers=options.workers) as pool:

        def here() -> list[float]:
            return [float(reasoning_gym(RECORD.fields, answer) >= 1.0) for answer in answers]

        def there() -> list[float]:
            return pool.score([0] * len(answers), answers).rewards.tolist()

        here(), there()
        pairs = []
        for number in range(options.pairs):
            order = (here, there) if number % 2 else (there, here)
            measured = {grade: timed(grade) for grade in order}
            assert measured[here][1] == measured[there][1], "the rewards differ"
            pairs.append((measured[here][0], measured[there][0]))
    direct, pooled = (statistics.median(column) / len(answers) * 1e6 for column in zip(*pairs, strict=True))
    ratio = statistics.median(there / here for here, there in pairs)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {options.workers} workers")
    print(f"{len(answers)} answers, {len(pairs)} pairs: {direct:.0f} us an answer in this process, {pooled:.0f} us by")
    print(f"the workers; ratio of the pairs {ratio:.2f}")


if __name__ == "__main__":
    main()
