"""A `Policy` for Megatron's GPTModel (and modules called like it) whose micro-batches are `Rows`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_fiberpo.logits import check_choice
from nemo_fiberpo.megatron.logprobs import vocab_parallel_log_probs
from nemo_fiberpo.megatron.output_layer import is_chunked, output_layer, returning_log_probs
from nemo_fiberpo.megatron.schedule import Policy
from nemo_fiberpo.megatron.sequences import Rows


def gpt_policy(
    model: torch.nn.Module | list[torch.nn.Module],
    rows: Sequence[Rows],
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    logprobs: str = "auto",
) -> Policy:
    """The policy that runs `model(tokens, positions, None)` on micro-batches {"rows": Rows, ...}.

    Args
        model       the module under Megatron's DDP, or the list of its virtual pipeline chunks
        rows        those of every micro-batch of the step, all of one shape
        tp_group    the tensor-parallel group, over which the vocabulary is sharded
        vocab_size  of the tokenizer, from which responses are sampled; None: all rows of the embedding
        logprobs    `logits`: from the model's logits. `chunked`: from its hidden states, without them; they agree to
                    rounding. `auto`: chunked where a micro-batch's logits would take `logits.AUTO_BYTES` on a
                    rank. All passes whose log-probs are compared should have the same

    Its log-probs are [r, t] in rows: `Rows.put` brings them back to samples. Raises ValueError for rows of different
    shapes, which pipeline stages could not exchange, and for `chunked` where the output layer is not Megatron's.

    SPMD: rows are sharded over cp and dp, log-probs likewise; replicated over tp and pp.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    shapes = sorted({tuple(entry.tokens.shape) for entry in rows})
    if len(shapes) != 1:
        raise ValueError(f"rows: all micro-batches of a step must have one shape, got {shapes}")

    check_choice(logprobs)
    number = rows[0].tokens.numel()

    def forward(batch: Mapping[str, Any], module: torch.nn.Module) -> Tensor:
        layer = output_layer(module)
        if not is_chunked(logprobs, layer, number):
            return _forward(batch, module)
        with returning_log_probs(layer, batch["rows"].targets, tp_group, vocab_size):
            return _forward(batch, module)

    def log_probs(output: Tensor, batch: Mapping[str, Any]) -> Tensor:
        if output.dim() == 2:  # `chunked` has made them in the model
            return output
        return vocab_parallel_log_probs(output, batch["rows"].targets.to(output.device), tp_group, vocab_size)

    return Policy(
        model=model,
        forward_backward_func=get_forward_backward_func(),
        forward=forward,
        log_probs=log_probs,
        seq_length=rows[0].seq_length,
        micro_batch_size=rows[0].tokens.shape[0],
        routed=lambda batch: batch["rows"].routed,
    )


def _forward(batch: Mapping[str, Any], module: torch.nn.Module) -> Tensor:
    rows: Rows = batch["rows"]
    # No mask is passed: attention is causal, and padding is behind every live token.
    more = {} if rows.packed is None else {"packed_seq_params": rows.packed}
    output: Tensor = module(rows.tokens, rows.positions, None, **more)
    return output
