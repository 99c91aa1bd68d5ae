"""The ranks of `fiberpo verify`: process groups on the device there is, the comparison, and the table."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from nemo_fiberpo.verification.model import float64_softmax
from nemo_fiberpo.verification.plans import PRECISIONS, Sizes, number_of_samples, variants
from nemo_fiberpo.verification.steps import Errors, Tolerance, Variant, compare, random_batch

TIMEOUT = timedelta(minutes=5)
_IMPORTED_FIRST = (
    "torch._dynamo", "megatron.core", "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model", "megatron.core.distributed", "megatron.core.pipeline_parallel",
)  # fmt: skip
"""torch.compile, which their imports call, must not meet what stands in for CUDA on a CPU."""


@dataclasses.dataclass(frozen=True)
class Verification:
    """What is compared, and how; spec and tolerance None for those that suit the device and the precision."""

    sizes: Sizes
    on_cpu: bool
    precision: str | None = None
    spec: str | None = None
    tolerance: float | None = None

    @property
    def precision_name(self) -> str:
        return self.precision or ("float64" if self.on_cpu else "bf16")

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision_name][0]

    @property
    def bounds(self) -> Tolerance:
        if self.tolerance is not None:
            return Tolerance(self.tolerance, self.tolerance, self.tolerance)
        return PRECISIONS[self.precision_name][1]

    @property
    def layers(self) -> str:
        """Transformer Engine's where training would have them."""
        if self.spec is not None:
            return self.spec
        return "transformer_engine" if self.dtype == torch.bfloat16 and _has_transformer_engine() else "local"


def _has_transformer_engine() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception:  # a build for another CUDA or torch fails in many ways
        return False
    return True


def verify(verification: Verification, say: Callable[[str], None]) -> bool:
    """Whether all errors are within the tolerance; the first rank prints the table as it goes.

    SPMD: every rank calls it, with the variables that torchrun sets. ValueError, on every rank alike, for a layout that
    its ranks do not make.
    """
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    for problem in verification.sizes.problems(ranks):
        raise ValueError(problem)
    say = say if rank == 0 else lambda _text: None
    with _distributed(verification) as device:
        every = variants(verification.sizes, ranks, verification.dtype, verification.layers)
        batch = random_batch(number_of_samples(every, ranks), every[0].layout.shape.vocab)
        say(_head(verification, every, ranks, len(batch["tokens"])))
        found = []
        for errors in compare(every, batch, device):
            say(_line(errors, verification.bounds))
            found.append(errors)
        say(_conclusion(found, verification.bounds))
    return all(errors.within(verification.bounds) for errors in found)


@contextlib.contextmanager
def _distributed(verification: Verification) -> Iterator[torch.device]:
    for name in _IMPORTED_FIRST:
        importlib.import_module(name)
    default = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if verification.on_cpu:
            from nemo_fiberpo.megatron.cpu import megatron_on_cpu

            device = torch.device("cpu")
            dist.init_process_group("gloo", timeout=TIMEOUT)
            stack.callback(dist.destroy_process_group)
            stack.enter_context(megatron_on_cpu())
        else:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", timeout=TIMEOUT)
            stack.callback(dist.destroy_process_group)
        if verification.dtype == torch.float64:
            stack.enter_context(float64_softmax())
        torch.set_default_dtype(torch.float64 if verification.dtype == torch.float64 else torch.float32)
        stack.callback(torch.set_default_dtype, default)
        yield device


_ROW = "{:<34} {:>9} {:>10} {:>9}  {}"


def _head(verification: Verification, every: Sequence[Variant], ranks: int, samples: int) -> str:
    import megatron.core

    layout, bounds = every[0].layout, verification.bounds
    data = ranks // (layout.tp * layout.pp * layout.cp)
    sizes = f"tp {layout.tp}, pp {layout.pp}, cp {layout.cp}, dp {data}, ep {layout.ep}, etp {layout.etp}"
    where = "CPU, gloo" if verification.on_cpu else f"{torch.cuda.get_device_name()}, NCCL"
    return (
        f"{sizes}{f', vpp {layout.vpp}' if layout.vpp > 1 else ''}: {ranks} ranks against one ({where})\n"
        f"megatron-core {megatron.core.__version__}, {verification.precision_name}, layers: {verification.layers}; "
        f"{samples} samples, {layout.microbatches} micro-batches on every rank\n\n"
        + _ROW.format("largest error of", "loss", "log-probs", "gradient", "worst parameter")
        + "\n"
        + _ROW.format("tolerance", *(f"{bound:.0e}" for bound in dataclasses.astuple(bounds)), "")
        + "\n"
    )


def _line(errors: Errors, bounds: Tolerance) -> str:
    loss = "-" if errors.loss is None else f"{errors.loss:.1e}"
    name = errors.parameter if errors.within(bounds) else f"{errors.parameter}  TOO LARGE"
    return _ROW.format(errors.variant, loss, f"{errors.log_probs:.1e}", f"{errors.gradient:.1e}", name) + "\n"


def _conclusion(found: Sequence[Errors], bounds: Tolerance) -> str:
    wrong = [errors.variant for errors in found if not errors.within(bounds)]
    if wrong:
        return f"\nDIFFERENT: {'; '.join(wrong)}. This layout does not compute what one rank does.\n"
    return "\nequal within the tolerance: this layout computes what one rank does\n"
