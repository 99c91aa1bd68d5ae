"""python -m tests.faults payloads | damage | fuzz | keys: see the modules of those names. Exit status 1 for faults."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("payloads", help="files that would run code")
    damage = commands.add_parser("damage", help="flips, truncations, swaps, deletions, FIFOs")
    damage.add_argument("--seed", type=int, default=0)
    fuzz = commands.add_parser("fuzz", help="made-up hierarchies, run configs and lines of data")
    fuzz.add_argument("--configs", type=int, default=5000)
    fuzz.add_argument("--lines", type=int, default=10000)
    fuzz.add_argument("--seed", type=int, default=0)
    commands.add_parser("keys", help="record which keys of NeMo's sections a run reads; writes nemo_config/keys.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if given.command == "keys":
            from tests.faults import keys

            keys.write(folder)
            return 0
        if given.command == "payloads":
            from tests.faults.payloads import payloads

            out = payloads(folder)
        elif given.command == "damage":
            from tests.faults.damage import damages

            out = damages(folder, given.seed)
        else:
            from tests.faults.fuzz import fuzz as made_up

            out = made_up(given.configs, given.lines, given.seed)
    print(out)
    return 1 if out.faults else 0


if __name__ == "__main__":
    sys.exit(main())
