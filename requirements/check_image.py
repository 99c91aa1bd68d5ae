"""Checks that the NeMo container under the Dockerfile's gpu target has the versions that belong together.

It is called while the image is built: `python requirements/check_image.py`. Only release numbers are compared: the
container's packages carry suffixes of their own.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable

WANTED = {
    "nemo_toolkit": "2.2",
    "nemo_aligner": "0.7",
    "megatron_core": "0.11",
    "transformer_engine": "",
    "apex": "",
    "torch": "2",
    "hydra-core": "1.3",
}
"""Beginnings of versions; any will do where nothing stands."""


def problems(version: Callable[[str], str] = importlib.metadata.version) -> list[str]:
    """One line for every package that is missing or of another release."""
    found = []
    for name, wanted in WANTED.items():
        try:
            got = version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name}: is not in this image")
            continue
        if wanted and not f"{got}.".startswith(f"{wanted}."):
            found.append(f"{name}: is {got} in this image, but {wanted} is needed")
    return found


if __name__ == "__main__":
    lines = problems()
    if lines:
        sys.exit("\n".join([*lines, "NEMO_IMAGE must be NVIDIA's NeMo container of release 25.02"]))
