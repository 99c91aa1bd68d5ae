"""A reward model that needs no GPU behind the real server: PyTriton, as NeMo-Aligner's serve_reward_model.py binds it.

REWARD_PORT and REWARD_NAME in the environment. The reward of a response is the share of its tokens with an even number.
"""

from __future__ import annotations

import os

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


@batch
def infer(tokens: np.ndarray, sequence_lengths: np.ndarray) -> dict[str, np.ndarray]:
    """tokens int64 [B, S] padded, sequence_lengths int64 [B, 1]: rewards float32 [B, 1]."""
    live = np.arange(tokens.shape[1]) < sequence_lengths
    return {"rewards": ((tokens % 2 == 0) & live).sum(1, keepdims=True).astype(np.float32) / sequence_lengths}


if __name__ == "__main__":
    config = TritonConfig(
        http_port=int(os.environ["REWARD_PORT"]), http_address="127.0.0.1", allow_grpc=False, allow_metrics=False
    )
    with Triton(config=config) as server:
        server.bind(
            os.environ["REWARD_NAME"],
            infer,
            inputs=[Tensor(name=name, shape=(-1,), dtype=np.int64) for name in ("tokens", "sequence_lengths")],
            outputs=[Tensor(name="rewards", shape=(1,), dtype=np.float32)],
            config=ModelConfig(max_batch_size=1024),
        )
        server.serve()
