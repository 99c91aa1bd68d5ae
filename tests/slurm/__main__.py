"""Whether a SLURM can be started here: `python -m tests.slurm FOLDER` starts one of two nodes, shows them, and ends it.

Exit status 0, or 1 with what its daemons wrote.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.slurm.cluster import Cluster, SlurmError


def main(folder: Path) -> int:
    try:
        with Cluster(folder, ("n1", "n2")) as cluster:
            print(cluster.command("srun", "--nodes=2", "--ntasks=2", "--label", "hostname"), end="")
    except (OSError, SlurmError, subprocess.SubprocessError) as error:  # TimeoutError is an OSError
        print(f"error: {error}")
        for log in sorted([*folder.glob("*.log"), *folder.glob("*.output")]):
            tail = log.read_text(errors="replace").splitlines()[-5:]
            print(*(f"{log.name}: {line}" for line in tail), sep="\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
