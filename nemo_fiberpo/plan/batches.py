"""The constraints on a run's batch sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Batches:
    """Batch sizes, in samples (responses) but for `prompts`.

    prompts     per rollout, over all ranks; `group` samples of each
    steps       optimizer steps per pass over a rollout
    micro       per micro-batch of training, on one data-parallel rank
    forward     per micro-batch of old and initial log-probs, likewise
    generation  per generation batch, on one data- or context-parallel rank
    """

    prompts: int
    group: int
    steps: int
    micro: int
    forward: int
    generation: int

    @property
    def rollout(self) -> int:
        """Samples of a rollout, over all ranks."""
        return self.prompts * self.group

    @property
    def per_step(self) -> int:
        """Samples of an optimizer step, over all ranks: NeMo's global batch size."""
        return self.rollout // self.steps

    def microbatches(self, data_parallel_size: int) -> int:
        """Micro-batches of an optimizer step on every data-parallel rank, one at least."""
        return max(1, self.per_step // (self.micro * data_parallel_size))

    def problems(self, data_parallel_size: int, context_parallel_size: int = 1) -> Iterator[str]:
        """A message per batch size that does not fit, naming the field. Context-parallel ranks generate their own
        responses, and train on those of their data-parallel rank."""
        generating = data_parallel_size * context_parallel_size
        sizes = (
            ("model.micro_batch_size", self.micro),
            ("model.ppo.forward_micro_batch_size", self.forward),
            ("model.ppo.rollout_micro_batch_size", self.generation),
        )
        wrong = [
            entry for entry in sizes if isinstance(entry[1], bool) or not isinstance(entry[1], int) or entry[1] < 1
        ]
        yield from (f"{name}: must be a whole number of at least 1, got {size!r}" for name, size in wrong)
        if wrong:
            return
        wanted = (
            ("model.ppo.rollout_micro_batch_size", self.generation, self.group, "algorithm.samples_per_prompt"),
            (
                "algorithm.prompts_per_rollout x samples_per_prompt",
                self.rollout,
                self.generation * generating,
                f"model.ppo.rollout_micro_batch_size x {generating} data- and context-parallel ranks",
            ),
            (
                "samples per optimizer step (algorithm.prompts_per_rollout x samples_per_prompt / optimizer_steps)",
                self.per_step,
                self.micro * data_parallel_size,
                f"model.micro_batch_size x {data_parallel_size} data-parallel ranks",
            ),
            (
                "samples per rank and rollout",
                self.rollout // data_parallel_size,
                self.forward,
                "model.ppo.forward_micro_batch_size",
            ),
        )
        for name, value, divisor, meaning in wanted:
            if value % divisor:
                yield f"{name}: {value} is not a multiple of {meaning} = {divisor}"
