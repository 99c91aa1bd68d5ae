"""Memory of the fullest rank, item by item: what stays, the peaks of training, of old log-probs and of generation.

Per parameter: its weight, its gradient in float32, and Adam's state with the float32 copy of the weight, which
Megatron's distributed optimizer shards over data x context parallel ranks (dense), or over the ranks that hold the same
experts. Activations: see `layer_bytes`. What is not counted item by item is in `Assumptions.reserve_gib`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_fiberpo.logits import CHUNK_ELEMENTS, CHUNKS, block_width, chosen

from .layout import Layout
from .shape import ModelShape

GIB = 2**30
MIB = 2**20
LOGIT_CHUNK = 4 * CHUNK_ELEMENTS  # what `vocab_parallel_log_probs` works on at a time in its forward pass, in float32
GUARD_ROWS = 2  # rows that keep expert-parallel ranks in lockstep during generation


@dataclass(frozen=True)
class Run:
    """The inputs of memory besides shape and layout.

    prompt, response   maximum lengths in tokens
    rows, forward      samples per micro-batch, of training and of old log-probs
    generated          samples per generation batch; 0 if another program generates
    microbatches       per optimizer step and data-parallel rank
    weight_bytes, gradient_bytes, optimizer_bytes   of one parameter
    recompute          layers of a stage whose activations are recomputed; -1 for all
    checkpoint_every   layers per checkpoint
    flash              attention never materializes [s, s] scores
    allgather          the dispatcher of tokens to experts gathers all of them
    logprobs           as `model.logprobs`
    all_forward        all forward passes of a step come before its backward passes
    on_host            what they need is kept in host memory
    """

    prompt: int
    response: int
    rows: int
    forward: int
    generated: int
    microbatches: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    recompute: int
    checkpoint_every: int
    flash: bool
    allgather: bool
    logprobs: str = "auto"
    all_forward: bool = False
    on_host: bool = False

    @classmethod
    def from_config(
        cls,
        model: Mapping[str, Any],
        precision: Any,
        prompt: int,
        response: int,
        rows: int,
        forward: int,
        generated: int,
        micro: int,
        all_forward: bool = False,
        on_host: bool = False,
    ) -> Run:
        """From NeMo's `model` section; `micro` is the number of micro-batches."""
        half = str(precision) in ("bf16", "bf16-mixed", "16", "16-mixed")
        o2 = half and bool(model.get("megatron_amp_O2", False))
        full = model.get("activations_checkpoint_granularity") == "full"
        every = model.get("activations_checkpoint_num_layers") or 1
        block = model.get("activations_checkpoint_method") == "block"
        return cls(
            prompt=prompt,
            response=response,
            rows=rows,
            forward=forward,
            generated=generated,
            microbatches=micro,
            weight_bytes=2 if o2 else 4,
            gradient_bytes=2 if (model.get("optim") or {}).get("grad_sync_dtype", "fp32") == "bf16" else 4,
            optimizer_bytes=12 if o2 else 8,
            recompute=(every if block else -1) if full else 0,
            checkpoint_every=1 if block else every,
            flash=bool(model.get("transformer_engine", True)),
            allgather=model.get("moe_token_dispatcher_type", "allgather") == "allgather",
            logprobs=model.get("logprobs") or "auto",
            all_forward=all_forward,
            on_host=on_host,
        )

    @property
    def length(self) -> int:
        return self.prompt + self.response


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank, which is on pipeline stage `stage`.

    static      by item: what stays
    training, log_probs, generation   by item: they take turns. log_probs, the pass of old ones, is empty where its
                micro-batches are no larger than those of training, which needs more then
    on_host     in host memory for the backward passes
    """

    stage: int
    static: dict[str, int]
    training: dict[str, int]
    log_probs: dict[str, int]
    generation: dict[str, int]
    on_host: int = 0

    @property
    def peak(self) -> int:
        phases = self.training, self.log_probs, self.generation
        return sum(self.static.values()) + max(sum(part.values()) for part in phases)


def layer_bytes(shape: ModelShape, layout: Layout, run: Run, tokens: float, imbalance: float, split: bool) -> float:
    """Activations that one layer keeps for its backward pass, for `tokens` of this rank's tensor-parallel group.

    split   whether sequence parallelism splits what tensor-parallel ranks would hold in common

    In elements per token: inputs and outputs of two norms 4 h; q, k, v (a + 2 g) d and the context a d, over t; a dense
    MLP 3 f / t, gated (2 f without a gate). Of experts, for each of the k copies of a token and `imbalance` times the
    mean: input and output 2 h and the MLP's 3 f_e / t_e; with the all-gather dispatcher the tokens of all
    expert-parallel ranks. Without a flash kernel the scores and probabilities a s, twice, over t.
    """
    h, t = shape.hidden, layout.tp
    common = 4 * h / (t if split else 1)
    attention = (2 * shape.heads + 2 * shape.groups) * shape.head_dim / t
    if not run.flash:
        attention += 2 * shape.heads * run.length / t
    wide = 3 if shape.gated else 2
    if not shape.experts:
        mlp = wide * shape.ffn / t
    else:
        copies = shape.topk * imbalance * layout.etp / t
        mlp = copies * (2 * h + wide * shape.expert_ffn / layout.etp) + wide * shape.shared_ffn / t
        mlp += h * layout.ep if run.allgather and layout.ep * layout.etp > 1 else 0
    return tokens * (common + attention + mlp) * max(2, run.weight_bytes)


def _log_probs(shape: ModelShape, layout: Layout, run: Run, tokens: float, backward: bool) -> dict[str, int]:
    """By item: what log-probs of `tokens` need on the last stage, by their logits in float32 or by blocks of them, see
    `megatron.logprobs` and `megatron.linear_logprobs`. The gradient of the output layer's weight is not counted."""
    columns = shape.vocab / layout.tp
    if _chunked(shape, layout, run):
        width = block_width(math.ceil(columns))
        # Logits of a block in bf16 and float32; hidden states of all ranks, and their gradient in both.
        return {"log-probs in blocks": round(tokens * (6 * width + (8 if backward else 2) * shape.hidden))}
    if backward:
        return {"logits and their gradient": round(8 * tokens * columns)}
    return {"logits": round(4 * tokens * columns + min(LOGIT_CHUNK, 4 * tokens * columns / CHUNKS))}


def _chunked(shape: ModelShape, layout: Layout, run: Run) -> bool:
    sizes = {"vocabulary": shape.vocab, "tensor_parallel": layout.tp, "context_parallel": layout.cp}
    return chosen(run.logprobs, samples=max(run.rows, run.forward), length=run.length, **sizes) == "chunked"


def _kept_after_layers(shape: ModelShape, layout: Layout, run: Run, tokens: float, last: bool) -> dict[str, int]:
    """By item: what all but one of the micro-batches keep after their layers where forward passes come first: on the
    last stage the inputs of the final norm and of the log-probs, on the others what was sent to the next stage."""
    if not run.all_forward:
        return {}
    others, hidden = run.microbatches - 1, tokens * shape.hidden * max(2, run.weight_bytes)
    split = layout.tp if layout.sequence_parallel else 1
    if not last:
        return {"outputs of the stage kept": round(others * hidden / split)}
    if _chunked(shape, layout, run):  # hidden states of all tensor-parallel ranks
        return {"inputs of log-probs kept": round(others * (hidden / split + hidden))}
    return {
        "inputs of log-probs kept": round(others * 2 * hidden / split),
        "logits kept": round(others * 4 * tokens * shape.vocab / layout.tp),
    }


def memory(shape: ModelShape, layout: Layout, run: Run, imbalance: float) -> Memory:
    """Memory of the rank that needs most, among one rank of each pipeline stage."""
    stages = [_stage(shape, layout, run, imbalance, stage) for stage in range(layout.pp)]
    return max(stages, key=lambda entry: entry.peak)


def _stage(shape: ModelShape, layout: Layout, run: Run, imbalance: float, stage: int) -> Memory:
    own = shape.stage(stage, layout.pp, layout.tp, layout.ep, layout.etp)
    layers, element = shape.layers_of(stage, layout.pp), max(2, run.weight_bytes)
    length = math.ceil(run.length / layout.length_multiple) * layout.length_multiple
    tokens = run.rows * length / layout.cp
    split = layout.tp if layout.sequence_parallel else 1
    static = {
        "weights": own.total * run.weight_bytes,
        "gradients": own.total * run.gradient_bytes,
        "optimizer": round(run.optimizer_bytes * (own.dense / (layout.dp * layout.cp) + own.expert / layout.expert_dp)),
    }
    kept = run.microbatches if run.all_forward else min(layout.pp - stage, run.microbatches)
    flight = 1.0 if run.on_host else float(kept)
    if layout.vpp > 1 and not run.all_forward:
        flight *= 1 + (layout.pp - 1) / (layout.pp * layout.vpp)
    one = layer_bytes(shape, layout, run, tokens, imbalance, layout.sequence_parallel)
    again = layers if run.recompute < 0 else min(run.recompute, layers)
    checkpoints = flight * again / run.checkpoint_every * tokens * shape.hidden * element / split
    training = {
        "activation checkpoints": round(checkpoints),
        "activations kept": round(flight * (layers - again) * one),
        # The layers between two checkpoints computed again, and gradients of one layer beside them.
        "a layer's backward pass": round((run.checkpoint_every if again else 0) * one + one),
    }
    if stage == layout.pp - 1:
        training |= _log_probs(shape, layout, run, tokens, backward=True)
    after, on_host = _kept_after_layers(shape, layout, run, tokens, stage == layout.pp - 1), 0
    if run.on_host:  # outputs of a stage stay, as the schedule wants them
        on_host = kept * (training["activation checkpoints"] + training["activations kept"])
        if stage == layout.pp - 1:
            on_host, after = on_host + sum(after.values()), {}
    training |= after
    scoring = {}
    if run.forward > run.rows:
        tokens = run.forward * length / layout.cp
        one = layer_bytes(shape, layout, run, tokens, imbalance, layout.sequence_parallel)
        scoring["a layer's activations"] = round(one)
        if stage == layout.pp - 1:
            scoring |= _log_probs(shape, layout, run, tokens, backward=False)
    if not run.generated:
        return Memory(stage, static, training, scoring, {}, on_host)
    rows = run.generated + (GUARD_ROWS if layout.ep > 1 else 0)
    cache = 2 * rows * run.length * shape.groups * shape.head_dim / layout.tp * layers * element
    prefill = layer_bytes(shape, layout, run, rows * run.prompt, imbalance, False)
    generation = {"keys and values": round(cache), "prompts through a layer": round(prefill)}
    if stage == layout.pp - 1:
        generation["logits of the prompts"] = round(rows * run.prompt * shape.vocab / layout.tp * 6)
    return Memory(stage, static, training, scoring, generation, on_host)
