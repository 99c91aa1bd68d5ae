"""These tests run in verl's environment: `bash tests/run.sh verl`."""

from __future__ import annotations

import importlib.util
import os

from tests import distributed

collect_ignore_glob = [] if importlib.util.find_spec("verl") else ["test_*.py"]
os.environ["VERL_PLATFORM"] = "cpu"
distributed.PRELOAD[:] = [
    "nemo_fiberpo.integrations.verl",
    "verl.workers.engine_workers",
    "transformers.models.qwen3_moe",
]
