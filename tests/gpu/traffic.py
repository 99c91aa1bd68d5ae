"""What the host and the device say to each other during a call: where the host waits, and how much is launched.

On a GPU torch tells (`torch.cuda.set_sync_debug_mode`, the profiler). On a CPU `Pretended` tensors stand on a device of
their own: their values are on the CPU, but every operation that would make the host wait for a GPU is seen, and mixing
them with tensors of the host is refused as a GPU refuses it. So the same count is checked without a GPU.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HERE = torch.device("meta")
"""What `Pretended` tensors say their device is: a type that needs no driver."""
_aten = torch.ops.aten
WAITS = {
    _aten._local_scalar_dense, _aten.is_nonzero, _aten.nonzero, _aten.masked_select, _aten.equal, _aten.bincount,
    _aten._unique2, _aten.unique_dim, _aten.repeat_interleave,
}  # fmt: skip
"""Operations whose result, or its shape, a GPU must tell to the host."""
INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
COPIES = {_aten._to_copy, _aten.copy_}


class Pretended(Tensor):
    """A tensor whose values are `inner` and whose device is `HERE`. Only under `watched`."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made: Pretended = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=HERE
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a pretended device, outside of `watched`")


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value


def _place() -> str:
    """File and line of this package or of Megatron that the current operation comes from."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if {"nemo_fiberpo", "megatron"} & set(path.parts) and "tests" not in path.parts and path.name != "cpu.py":
            return f"{'/'.join(path.parts[-4:])}:{frame.lineno}"
    return "elsewhere"


class _Functions(TorchFunctionMode):
    """Calls that never reach a dispatch mode on a tensor of Python's: `tolist`, and `torch.tensor` for the device."""

    def __init__(self, crossings: list[str]) -> None:
        super().__init__()
        self.crossings = crossings

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist and isinstance(args[0], Pretended):
            self.crossings.append(f"{_place()} tolist")
            return args[0].inner.tolist()
        if func is torch.tensor and kwargs.get("device") == HERE:
            self.crossings.append(f"{_place()} upload")
            return Pretended(torch.tensor(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, crossings: list[str]) -> None:
        super().__init__()
        self.crossings = crossings

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
        asked = kwargs.get("device")
        if not there and asked != HERE:
            return func(*args, **kwargs)
        packet = func.overloadpacket
        strangers = [tensor for tensor in tensors if not isinstance(tensor, Pretended) and tensor.dim()]
        leaves = packet in COPIES and asked is not None and asked != HERE
        if strangers and packet not in COPIES | INDEXING:
            raise RuntimeError(f"{func}: tensors of the host and of the device in one operation, at {_place()}")
        masks = packet in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if packet in WAITS or masks or leaves or strangers:
            self.crossings.append(f"{_place()} {packet.__name__}")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if leaves:
            return out
        if func._schema.name.endswith("_") and isinstance(args[0], Tensor):  # in place
            return args[0]
        return tree_map(lambda value: Pretended(value) if isinstance(value, Tensor) else value, out)


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[list[str]]:
    """The places where the host waits for the device within the block: on a GPU whatever torch warns of, elsewhere
    what `Pretended` tensors show."""
    crossings: list[str] = []
    if device.type != "cuda":
        with _Functions(crossings), _Operations(crossings):
            yield crossings
        return
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield crossings
        finally:
            torch.cuda.set_sync_debug_mode(before)
    told = [warning for warning in seen if "called a synchronizing" in str(warning.message)]
    crossings += [f"{'/'.join(Path(warning.filename).parts[-4:])}:{warning.lineno}" for warning in told]


def on_device(value: Any, device: torch.device) -> Any:
    """Tensors of a tree on the device that `watched` watches."""
    move = (lambda tensor: tensor.to(device)) if device.type == "cuda" else Pretended
    return tree_map(lambda leaf: move(leaf) if isinstance(leaf, Tensor) else leaf, value)


class _Launches(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def launches(work: Callable[[], Any], device: torch.device) -> tuple[int, float | None]:
    """Kernels that a call launches and the milliseconds that they take together; on a CPU its operations, and None."""
    if device.type != "cuda":
        with _Launches() as counted:
            work()
        return counted.number, None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        work()
        torch.cuda.synchronize()
    on_gpu = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in on_gpu if not getattr(event, "is_user_annotation", False)]
    kernels = [event for event in kernels if not event.name.startswith(("Memcpy", "Memset", "#"))]
    return len(kernels), sum(event.device_time for event in kernels) / 1000.0


@contextlib.contextmanager
def host_reads(device: torch.device) -> Iterator[list[str]]:
    """Where the host reads from the device within the block, also in code that knows no `Pretended` tensors. Without a
    GPU: what it would have to read, if the tensors of the CPU were on one."""
    if device.type == "cuda":
        with watched(device) as places:
            yield places
        return
    seen: list[str] = []
    inside = False
    methods = {name: getattr(Tensor, name) for name in ("tolist", "numpy")}

    def noted(name: str) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:  # a function mode calls what the name stands for once more
                return methods[name](*args, **kwargs)
            seen.append(f"{_place()} {name}")
            inside = True
            try:
                return methods[name](*args, **kwargs)
            finally:
                inside = False

        return method

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in WAITS:
                seen.append(f"{_place()} {func.overloadpacket.__name__}")
            return func(*args, **(kwargs or {}))

    for name in methods:
        setattr(Tensor, name, noted(name))
    try:
        with Reads():
            yield seen
    finally:
        for name, method in methods.items():
            setattr(Tensor, name, method)
