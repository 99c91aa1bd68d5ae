"""These tests run in verl's environment: `bash tests/run.sh verl`. Elsewhere they are not collected."""

from __future__ import annotations

import importlib.util
import os

from tests.support import distributed


def prepare() -> None:
    """Before verl is imported: CPUs, and processes that begin with its imports done."""
    os.environ["VERL_PLATFORM"] = "cpu"
    distributed.PRELOAD[:] = [
        "nemo_fiberpo.integrations.verl",
        "verl.workers.engine_workers",
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
        "mbridge",
        "verl.workers.engine.megatron",
    ]


collect_ignore_glob: list[str] = []
if importlib.util.find_spec("verl") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    prepare()
