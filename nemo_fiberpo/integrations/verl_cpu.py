"""verl's trainer side on CPUs over gloo, for tests and first steps: `VERL_PLATFORM=cpu` and `install()`.

verl has platforms for GPUs and NPUs only, and no engine for CPUs. What it lacks is registered through its own
registries; nothing is patched. Rollouts are not part of it: vLLM, SGLang and TRT-LLM need a GPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry, set_platform

from nemo_fiberpo.integrations import verl as host


class PlatformCPU(PlatformBase):
    """The CPU as a platform of verl."""

    device_name = "cpu"  # type: ignore[assignment]
    vendor_name = "cpu"  # type: ignore[assignment]

    @property
    def device_module(self) -> ModuleType:
        return torch.cpu

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {"num_cpus": num_gpus}

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None


def install() -> None:
    """Make this process's platform the CPU, and the engines here those of CPUs."""
    if PlatformRegistry.get("cpu") is not PlatformCPU:
        PlatformRegistry.register("cpu")(PlatformCPU)
        set_platform(PlatformCPU())
        host.register("cpu", None)


def init_process_group() -> None:
    """Over gloo, by torchrun's variables: verl's own would be "cpu:gloo,cpu:gloo", which torch refuses."""
    if not dist.is_initialized():
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        dist.init_process_group("gloo", rank=rank, world_size=size, init_method=os.environ.get("DIST_INIT_METHOD"))
