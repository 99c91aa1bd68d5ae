"""The tiny float64 GPT of `nemo_fiberpo.verification` on CPU, for any layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from nemo_fiberpo import logits
from nemo_fiberpo.megatron import cpu
from nemo_fiberpo.verification import model
from nemo_fiberpo.verification.model import EXPERTS, MAX_POSITIONS, Layout, make_model

__all__ = ["EXPERTS", "HEADS", "HIDDEN", "MAX_POSITIONS", "VOCAB", "Layout", "make_model", "megatron"]

HIDDEN, HEADS, VOCAB = model.TINY.hidden, model.TINY.heads, model.TINY.vocab


@contextlib.contextmanager
def megatron(layout: Layout) -> Iterator[None]:
    """Megatron on CPU in float64, with initialised process groups."""
    torch.set_default_dtype(torch.float64)
    logits.LEAST_COLUMNS = 5  # several blocks of the small vocabulary, and a narrower one at the end
    with cpu.megatron_on_cpu(), model.float64_softmax(), model.process_groups(layout):
        yield
