"""What `fiberpo plan` cannot derive from a run's configuration: the machine, and figures that depend on data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..fields import check, setting
from ..values import whole_number


@dataclass(frozen=True)
class Assumptions:
    """Machine and data, for `fiberpo plan`. Training reads only `host`."""

    host: str = setting("nemo_aligner", choices=("nemo_aligner", "megatron"))
    """What runs the training. `nemo_aligner`: this package's actor. `megatron`: a custom trainer on
    `nemo_fiberpo.megatron`, which the training script refuses."""

    gpu_memory_gib: float = setting(79.6, above=0)
    """Memory of one GPU, as its driver shows it."""

    reserve_gib: float = setting(6.0, at_least=0)
    """Part of it for the CUDA context, NCCL's buffers, workspaces and fragmentation."""

    host_memory_gib: float = setting(1024.0, above=0)
    """Memory of one node. The initial policy of a KL penalty is kept there."""

    peak_tflops: float = setting(989.0, above=0)
    """Dense bf16 peak of one GPU."""

    mfu: float = setting(0.35, above=0, at_most=1)
    """Share of the peak that forward and backward passes reach; recomputation does not count as useful."""

    latency_us: float = setting(20.0, at_least=0)
    """Latency of one hop of an all-reduce between nodes."""

    bandwidth_gb_per_s: float = setting(25.0, above=0)
    """Bandwidth of the network, per GPU."""

    expert_imbalance: float = setting(1.5, above=0)
    """Tokens of the experts on the busiest rank, over the mean."""

    vocab_size: int | None = setting(None, at_least=1)
    """Vocabulary of the tokenizer; null where `model.override_vocab_size` has it."""

    labels: Mapping[str, int] = setting(default_factory=lambda: {"domain": 8}, form="{stratum: whole number}")
    """Number of labels of each stratum of prompts, if `data.train` does not exist."""

    def __post_init__(self) -> None:
        check(self)
        for name, count in self.labels.items():
            whole_number(count, f"labels.{name}", 1)
