"""Log-probs of sampled tokens as the generating passes gave them, which decode token by token from a cache.

They differ from those of training, which reads whole sequences in another layout, by rounding: what
`algorithm.rollout_correction` corrects for.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as mpu
from nemo_aligner.utils.text_generation_utils import TrackLengthGPTModelTextGenerationStrategy
from torch import Tensor

from nemo_fiberpo.aligner.generation.lockstep import Lockstep
from nemo_fiberpo.megatron.logprobs import vocab_parallel_log_probs

ENGINE = "rollout_logprobs"
"""The column of a rollout, [b, s - 1], that an actor returns with its samples."""


class RecordsLogProbs:
    """Mixin before one of NeMo's strategies: keeps each decoding step's log-prob of the token that it chose.

    SPMD: on the ranks of the last pipeline stage; two all-reduces over tensor-parallel ranks per decoding step.
    """

    model: Any

    def __init__(self, *args: Any, **named: Any):
        super().__init__(*args, **named)
        self._logits: Tensor | None = None
        self._found: dict[int, Tensor] = {}

    def forward_step(self, batch: Any, tensor_shape: Any) -> Any:
        """The strategy's; its logits of the last position are those of the token that is chosen next."""
        output = super().forward_step(batch, tensor_shape)  # type: ignore[misc]
        if mpu.is_pipeline_last_stage():
            self._logits = output[0]["logits"][:, -1].clone()  # NeMo writes to them
        return output

    def post_process(self, tokens: Tensor, new_tokens: Tensor, context_length: int) -> None:
        """Called with the chosen tokens, which come to position `context_length`."""
        super().post_process(tokens, new_tokens, context_length)  # type: ignore[misc]
        assert self._logits is not None
        group, vocabulary = mpu.get_tensor_model_parallel_group(), self.model.tokenizer.vocab_size
        self._found[context_length] = vocab_parallel_log_probs(self._logits, new_tokens, group, vocabulary)
        self._logits = None

    def log_probs(self, samples: int, width: int) -> Tensor:
        """The column of `samples` sequences of `width` tokens, float32 [b, s - 1] on every rank of the model; 0 at
        prompts that are shorter than all others, and behind a response what the loop put there. SPMD: one all-reduce
        over pipeline stages."""
        out = torch.zeros(samples, width - 1, device=torch.cuda.current_device())
        for place, value in self._found.items():
            if place < width:
                out[:, place - 1] = value
        torch.distributed.all_reduce(out, group=mpu.get_pipeline_model_parallel_group())
        return out


class RecordingStrategy(RecordsLogProbs, TrackLengthGPTModelTextGenerationStrategy):
    """NeMo-Aligner's own strategy."""


class RecordingLockstep(RecordsLogProbs, Lockstep):
    """The strategy of expert-parallel ranks."""
