"""What `fiberpo plan` cannot see in a run's configuration: the machine, and figures that data decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HOSTS = ("nemo_aligner", "megatron")


@dataclass(frozen=True)
class Assumptions:
    """The `cluster` section of a run's configuration.

    host                who trains: nemo_aligner, this package's actor; megatron, a trainer of one's own on
                        `nemo_fiberpo.megatron`, which the training script refuses
    gpu_memory_gib      of one GPU, as its driver shows it
    reserve_gib         of it, for the CUDA context, NCCL's buffers, workspaces and fragmentation
    host_memory_gib     of one node; the initial policy is kept there where a KL penalty needs it
    peak_tflops         dense bf16 peak of one GPU
    mfu                 share of it that forward and backward passes reach, recomputation not counted as useful
    latency_us          of one hop of an all-reduce between nodes
    bandwidth_gb_per_s  of the network, per GPU
    expert_imbalance    tokens of the busiest rank's experts over the mean
    vocab_size          of the tokenizer; null: `model.override_vocab_size` has it
    labels              number of label values per stratum of prompts, where data.train is not there to be counted
    """

    host: str = "nemo_aligner"
    gpu_memory_gib: float = 79.6
    reserve_gib: float = 6.0
    host_memory_gib: float = 1024.0
    peak_tflops: float = 989.0
    mfu: float = 0.35
    latency_us: float = 20.0
    bandwidth_gb_per_s: float = 25.0
    expert_imbalance: float = 1.5
    vocab_size: int | None = None
    labels: Mapping[str, int] = field(default_factory=lambda: {"domain": 8})

    def __post_init__(self) -> None:
        if self.host not in HOSTS:
            raise ValueError(f"host: must be {' or '.join(HOSTS)}, got {self.host!r}")
        positive = ("gpu_memory_gib", "host_memory_gib", "peak_tflops", "mfu", "bandwidth_gb_per_s", "expert_imbalance")
        for name in (*positive, "reserve_gib", "latency_us"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or not value < float("inf"):
                raise ValueError(f"{name}: must be a finite number, at least 0, got {value!r}")
            if name in positive and value == 0:
                raise ValueError(f"{name}: must be above 0")
        if self.mfu > 1:
            raise ValueError(f"mfu: is a share of the peak, at most 1, got {self.mfu}")
        counts: dict[str, Any] = {f"labels.{name}": count for name, count in self.labels.items()}
        if self.vocab_size is not None:
            counts["vocab_size"] = self.vocab_size
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}: must be a whole number of at least 1, got {count!r}")
