"""The device that the checks run on: the GPU where there is one, else the CPU."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator

import torch
import torch._dynamo

from nemo_fiberpo.objective import kernels

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
ON_GPU = DEVICE.type == "cuda"


def describe() -> str:
    if ON_GPU:
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return f"no GPU: {platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


def no_compiler() -> str | None:
    """Why torch.compile cannot run here; None where it can. Triton and Inductor both call a C compiler."""
    named = os.environ.get("CC") or os.environ.get("CXX")
    if not named and not any(map(shutil.which, ("cc", "gcc", "clang", "g++"))):
        return "torch.compile needs a C compiler, and there is none"
    if ON_GPU:
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return f"torch.compile needs Triton: {error}"
    return None


@contextlib.contextmanager
def passes(mode: str) -> Iterator[None]:
    """Run the passes over tokens "eager" or "compiled": the latter with as many graphs as asked for, whereas torch runs
    a function eagerly that was compiled for more than a few kinds of arguments."""
    before = kernels.run.mode, os.environ.pop("NEMO_FIBERPO_COMPILE", None)
    kernels.compile_passes({"eager": "0", "compiled": "1"}[mode])
    kernels.run.failed = False
    config = torch._dynamo.config
    wanted = {"recompile_limit": 100, "cache_size_limit": 100, "fail_on_recompile_limit_hit": True}
    known = {name: value for name, value in wanted.items() if hasattr(config, name)}  # names differ between versions
    try:
        with config.patch(**known):
            yield
    finally:
        kernels.run.mode = before[0]
        if before[1] is not None:
            os.environ["NEMO_FIBERPO_COMPILE"] = before[1]
