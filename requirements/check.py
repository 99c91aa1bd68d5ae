"""Checks that the environment is what a lock file says: every version, torch's build, and the imports that matter.

It is called by setup.sh: `python requirements/check.py requirements/cpu.lock`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from pathlib import Path

IMPORTS = {
    "cpu.lock": (
        "megatron.core",
        "megatron.core.dist_checkpointing.strategies.tensorstore",
        "nemo.collections.nlp.models.language_modeling.megatron_gpt_model",
        "nemo_aligner.utils.distributed",
        "reasoning_gym",
        "math_verify",
        "matplotlib.figure",
        "torch.utils.tensorboard",
    ),
    "test.lock": ("pytest", "hypothesis"),
    "mcore-newest.lock": ("megatron.core.parallel_state", "megatron.core.models.gpt"),
    "mcore312.lock": ("megatron.core.parallel_state", "megatron.core.models.gpt", "nemo_fiberpo.megatron"),
    "verl.lock": ("verl.workers.engine_workers", "nemo_fiberpo.integrations.verl"),
}


def pins(lock: Path) -> dict[str, str]:
    """The `name==version` lines of a lock file."""
    lines = (line.strip() for line in lock.read_text().splitlines())
    return dict(line.split("==", 1) for line in lines if line and not line.startswith("#"))


def wrong_versions(lock: Path) -> list[str]:
    """What is missing or of another version; a local part (`+cpu`) is no difference."""
    problems = []
    for name, wanted in pins(lock).items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "nothing"
        if found.split("+")[0] != wanted:
            problems.append(f"{name}: {lock} pins {wanted}, installed is {found}")
    return problems


def stray_gpu_packages() -> list[str]:
    """NVIDIA packages beside a torch that is a CPU build: something resolved dependencies that it should not have."""
    import torch

    if torch.version.cuda is not None:
        return []
    names = (distribution.metadata["Name"] for distribution in importlib.metadata.distributions())
    # nvidia-ml-py is pure Python, which verl's loggers want; it brings no library.
    stray = (name for name in names if name.startswith("nvidia-") and name != "nvidia-ml-py")
    return [f"{name} is installed beside a CPU build of torch" for name in stray]


def failed_imports(lock: Path) -> list[str]:
    """The modules of IMPORTS that do not import, with the error."""
    problems = []
    for module in IMPORTS[lock.name]:
        try:
            importlib.import_module(module)
        except Exception as error:
            problems.append(f"import {module}: {type(error).__name__}: {error}")
    return problems


def main() -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    lock = Path(sys.argv[1])
    problems = wrong_versions(lock)
    problems += stray_gpu_packages() if not problems else []
    problems += failed_imports(lock) if not problems else []
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
