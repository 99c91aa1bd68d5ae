"""What autograd graphs hold for their backward passes, kept in host memory until then."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

LEAST_BYTES = 1 << 20  # smaller tensors stay where they are: there are many of them, and they take little


@contextlib.contextmanager
def saved_on_host(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Tensors that graphs save within this context go to host memory, which is pinned where they come from a GPU, and
    come back when a backward pass asks for them.

    Parameters of the modules stay: `torch.autograd.graph.save_on_cpu` would copy the output layer's weight for every
    micro-batch. A backward pass gets them as tensors without the attributes that Megatron gives a parameter.
    """
    storages = {weight.untyped_storage().data_ptr() for module in modules for weight in module.parameters()}

    def pack(value: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if value.nbytes < LEAST_BYTES or value.untyped_storage().data_ptr() in storages:
            return value
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        # Both copies are in the order of the stream, so neither has to be waited for.
        return value.device, host.copy_(value, non_blocking=True)

    def unpack(saved: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        device, host = saved
        return host.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
