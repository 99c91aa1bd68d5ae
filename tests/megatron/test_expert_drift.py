"""The demonstration of docs/experts.md, smaller: experts of one partition are perturbed, and that partition's cells
leave pass-through while no other does; without the stratum nothing but the token clip reacts."""

import importlib.util
import sys
from pathlib import Path

from tests.support.distributed import run

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"


def demonstration(rank: int, world_size: int):
    sys.path.insert(0, str(FIGURES))
    spec = importlib.util.spec_from_file_location("experts_figure", FIGURES / "experts.py")
    figure = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = figure
    spec.loader.exec_module(figure)
    figure.NOISE = [0.0, 0.5]
    with figure.one_process():
        model = figure.make_model()
        figure.train(model, steps=120)
        courses, shares = figure.measure(model)
    return figure.PERTURBED, courses, shares


def test_a_perturbed_partition_leaves_pass_through_and_no_other_does():
    ((perturbed, courses, shares),) = run(demonstration, 1, init=False, timeout=240)
    assert min(shares.values()) > 0.05, "every partition has tokens"
    (rest, moved), (_, plain) = courses["expert_coarsest"], courses["domain"]
    assert not any(value for name, value in rest.items() if name.endswith("budget_used")), "nothing has moved yet"

    def used(metrics, stratum, figure):
        return max(metrics[f"{stratum}/{channel}/{figure}"] for channel in ("pos", "neg"))

    for name in shares:
        beyond = used(moved, f"expert_partition.{name}", "budget_used") > 1.0
        assert beyond == (name == perturbed), name
    for stratum in ("domain", "prompt_group", "trajectory"):
        assert used(plain, stratum, "budget_used_max") < 1.0, stratum
    assert plain["token/clipped"] > 0.01
