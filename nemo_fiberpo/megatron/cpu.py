"""Megatron-core on CPU over gloo: one explicit, reversible place.

Megatron-core asks for `device="cuda"`, for streams and for the CUDA generator by name. `install()` answers those
requests with the CPU, for the whole process, until `uninstall()`; `megatron_on_cpu()` is the same as a context manager.
Nothing is patched unless one of them is called, and a symbol that is gone is named before anything is changed.

What it does not do: it does not claim that CUDA is available (`torch.cuda.is_available()` stays False), it does not
choose Megatron options (Transformer Engine, fusions and `use_cpu_initialization` are the caller's), and it knows
nothing of NeMo.

Scope: the attributes below are process-wide; the function mode is per thread, as all of PyTorch's modes are, so a
thread that runs model code enters `CpuDeviceMode()` itself. A forked child inherits both, a spawned one calls
`install()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from nemo_fiberpo.megatron.cpu_collectives import (
    averaging_all_reduce,
    averaging_reduce_scatter,
    uneven_all_gather,
    uneven_reduce_scatter,
)
from nemo_fiberpo.megatron.patching import Patch, Patches

CPU = torch.device("cpu")


def _to_cpu(device: Any) -> Any:
    """The CPU for a device that means a GPU ("cuda", "cuda:1", an index, a torch.device), anything else unchanged."""
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return CPU if device.startswith("cuda") else device
    if isinstance(device, int) and not isinstance(device, bool):
        return CPU
    return device


def _cuda_method(tensor: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    return tensor


def _to_method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if "device" in kwargs:
        kwargs["device"] = _to_cpu(kwargs["device"])
    if args and not isinstance(args[0], (torch.dtype, torch.Tensor)):
        args = (_to_cpu(args[0]), *args[1:])
    return tensor.to(*args, **kwargs)


def _type_method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """`tensor.type()` answers "torch.cuda.FloatTensor": Megatron's optimizers sort parameters by that name."""
    if args or kwargs:
        args = tuple(a.replace("torch.cuda.", "torch.") if isinstance(a, str) else a for a in args)
        return tensor.type(*args, **kwargs)
    return tensor.type().replace("torch.", "torch.cuda.", 1)


_METHODS: dict[Callable, Callable] = {
    torch.Tensor.cuda: _cuda_method,
    torch.Tensor.to: _to_method,
    torch.Tensor.type: _type_method,
}


class CpuDeviceMode(TorchFunctionMode):
    """Maps every GPU device that is passed to a torch function or tensor method to the CPU (in the entering thread)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        method = _METHODS.get(func)
        if method is not None:
            return method(*args, **(kwargs or {}))
        if kwargs:
            if "device" in kwargs:
                kwargs["device"] = _to_cpu(kwargs["device"])
            if "pin_memory" in kwargs:
                kwargs["pin_memory"] = False  # pinning is for copies to a GPU, and needs one
            return func(*args, **kwargs)
        return func(*args)


class _Stream:
    """A CPU runs one stream; waiting for it is no work."""

    cuda_stream = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_exc: Any) -> None:
        return None

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def _done(self, *_args: Any, **_kwargs: Any) -> None:
        return None

    synchronize = wait_stream = wait_event = record = wait = _done


class _Event(_Stream):
    """An event of that stream: always past. `elapsed_time` is 0: there is no device clock."""

    def elapsed_time(self, _end: _Event) -> float:
        return 0.0


def _nothing() -> Callable[..., None]:
    """A function of its own for each name: torch.compile refuses one that stands for several."""

    def nothing(*_args: Any, **_kwargs: Any) -> None:
        return None

    return nothing


def _stream(*_args: Any, **_kwargs: Any) -> _Stream:
    return _Stream()


def _get_rng_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _with_device_mode(engine: Callable) -> Callable:
    """`backward` is itself a torch function, so the mode is suspended while it runs hooks, recomputation and the
    backward of custom functions, all of which may ask for a device."""

    def wrapped(*args, **kwargs):
        if any(isinstance(mode, CpuDeviceMode) for mode in _get_current_function_mode_stack()):
            return engine(*args, **kwargs)
        with CpuDeviceMode():
            return engine(*args, **kwargs)

    return wrapped


def _numpy_on_cpu_too(move: Callable) -> Callable:
    def wrapped(tensor, as_numpy=False, record_stream=False):
        if as_numpy and torch.is_tensor(tensor):
            return tensor.cpu().numpy()
        return move(tensor, as_numpy, record_stream)

    return wrapped


_RNG = "megatron.core.tensor_parallel.random"
_BUFFER = "megatron.core.distributed.param_and_grad_buffer"

# The CUDA generator is the CPU's: Megatron's RNG tracker swaps its state in and out, which works for any generator.
_PATCHES = (
    Patch("torch.cuda", "current_device", "the one device; CpuDeviceMode reads an index as the CPU", lambda: 0),
    Patch("torch.cuda", "set_device", "there is nothing to select", _nothing()),
    Patch("torch.cuda", "synchronize", "CPU operations are synchronous", _nothing()),
    Patch("torch.cuda", "Stream", "constructing one needs a driver", _Stream),
    Patch("torch.cuda", "Event", "constructing one needs a driver", _Event),
    Patch("torch.cuda", "current_stream", "token dispatchers synchronise it", _stream),
    Patch("torch.cuda", "default_stream", "DDP waits for it", _stream),
    Patch("torch.cuda", "stream", "context manager around side-stream work", _stream),
    Patch("torch.cuda", "set_stream", "there is nothing to select", _nothing()),
    Patch("torch.cuda", "device", "context manager that selects a device", _stream),
    Patch("torch.cuda", "ipc_collect", "would initialise CUDA", _nothing()),
    Patch("torch.cuda", "reset_peak_memory_stats", "would initialise CUDA; the counters read 0 without it", _nothing()),
    Patch("torch.cuda", "mem_get_info", "would initialise CUDA", lambda device=None: (0, 0)),
    Patch("torch.cuda", "manual_seed", "seeds the generator that CPU kernels draw from", _manual_seed),
    Patch("torch.cuda", "get_rng_state", "that generator's state", _get_rng_state),
    Patch("torch.cuda", "set_rng_state", "that generator's state", _set_rng_state),
    *(
        Patch("torch.cuda", f"{name}Tensor", "legacy constructor and isinstance check", getattr(torch, f"{name}Tensor"))
        for name in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    ),
    Patch("torch.cuda.nvtx", "range_push", "profiler ranges need a driver", _nothing()),
    Patch("torch.cuda.nvtx", "range_pop", "profiler ranges need a driver", _nothing()),
    Patch(_RNG, "_get_cuda_rng_state", "reads the CUDA generator by index", _get_rng_state),
    Patch(_RNG, "_set_cuda_rng_state", "queues a callback for a CUDA start that never comes", _set_rng_state),
    Patch("torch.autograd", "_engine_run_backward", "backward passes suspend function modes", wrap=_with_device_mode),
    Patch("torch.distributed", "all_reduce", "gloo has no AVG", wrap=averaging_all_reduce),
    Patch("torch.distributed", "reduce_scatter_tensor", "gloo has no AVG", wrap=averaging_reduce_scatter),
    Patch("torch.distributed", "all_gather", "gloo gathers equal shapes alone", wrap=uneven_all_gather),
    Patch("torch.distributed", "reduce_scatter", "gloo scatters equal shapes alone", wrap=uneven_reduce_scatter),
    Patch(_BUFFER, "dist_reduce_scatter_func", "DDP's own alias of the same", wrap=averaging_reduce_scatter),
    Patch("megatron.core.transformer.moe.moe_utils", "te_general_gemm",
          "0.16 tests it without defining it where Transformer Engine is absent", None, missing_ok=True),
    Patch("megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu",
          "leaves split sizes that are on the CPU already as tensors", wrap=_numpy_on_cpu_too, missing_ok=True),
)  # fmt: skip


@dataclass
class _Installed:
    patches: Patches
    mode: CpuDeviceMode
    stance: Any


_installed: _Installed | None = None


def installed() -> bool:
    """Whether the CPU stands in for CUDA in this process."""
    return _installed is not None


def install() -> None:
    """Let the CPU stand in for CUDA in this process, until `uninstall()`. Does nothing where it is installed already.

    Raises ImportError that names the symbol if torch or megatron-core no longer has one of those replaced.
    """
    global _installed
    if _installed is not None:
        return
    patches = Patches(_PATCHES)
    patches.apply()
    # Megatron decorates small functions with torch.compile, whose CPU back end would need a C++ compiler at run time.
    stance = torch.compiler.set_stance("force_eager")
    mode = CpuDeviceMode()
    mode.__enter__()
    _installed = _Installed(patches, mode, stance)


def uninstall() -> None:
    """Undo `install()`: every attribute is the object it was. Does nothing where nothing is installed."""
    global _installed
    if _installed is None:
        return
    stack = _get_current_function_mode_stack()
    if not stack or stack[-1] is not _installed.mode:
        raise RuntimeError(
            "uninstall() must be called in the thread of install(), with the modes entered since left again"
        )
    _installed.mode.__exit__(None, None, None)
    _installed.patches.undo()
    _installed.stance.__exit__(None, None, None)
    _installed = None


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """`install()` for a block. Inside an installation it changes nothing, at its end neither."""
    if installed():
        yield
        return
    install()
    try:
        yield
    finally:
        uninstall()
