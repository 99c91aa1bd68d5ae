"""verl's trainer side on CPUs over gloo, for tests and first steps: set VERL_PLATFORM=cpu.

verl has platforms for GPUs and NPUs only. This one is registered through verl's own registry, so nothing is patched.
Rollouts are not part of it: vLLM, SGLang and TRT-LLM need a GPU.
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
from verl.plugin.platform.platform_manager import PlatformRegistry

# `torch.cpu`, and the figures of memory that verl logs of every device.
_DEVICE = ModuleType("torch.cpu")
_DEVICE.__dict__.update(vars(torch.cpu))
for _figure in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
    setattr(_DEVICE, _figure, lambda *_: 0)
_DEVICE.mem_get_info = lambda *_: (0, 0)  # type: ignore[attr-defined]
_DEVICE.empty_cache = lambda: None  # type: ignore[attr-defined]


@PlatformRegistry.register("cpu")
class PlatformCPU(PlatformBase):
    """The CPU as a platform of verl."""

    device_name = "cpu"
    vendor_name = "cpu"

    @property
    def device_module(self) -> ModuleType:
        return _DEVICE

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # never chosen unless VERL_PLATFORM names it: a Ray driver may have no GPU of its own

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


def init_process_group() -> None:
    """Over gloo, by torchrun's variables: verl's own would be "cpu:gloo,cpu:gloo", which torch refuses."""
    if not dist.is_initialized():
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        dist.init_process_group("gloo", rank=rank, world_size=size, init_method=os.environ.get("DIST_INIT_METHOD"))
