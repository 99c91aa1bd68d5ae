"""Log-probs that generation hands over, from decoding steps without a model; with one in test_layouts.py."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from nemo_fiberpo import nemo_cpu

nemo_cpu.install()
from nemo_fiberpo.aligner.generation import engine_log_probs  # noqa: E402
from nemo_fiberpo.aligner.generation.engine_log_probs import RecordsLogProbs  # noqa: E402

VOCABULARY, PADDED, SAMPLES, FIRST, WIDTH = 5, 8, 3, 2, 6


class Decoder:
    """In place of NeMo's strategy: logits of a step, of all positions or, from a cache, of the last."""

    def __init__(self, logits: list[torch.Tensor]):
        self.model = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=VOCABULARY))
        self._given = iter(logits)

    def forward_step(self, batch: None, tensor_shape: None) -> list[dict[str, torch.Tensor]]:
        return [{"logits": next(self._given)}]

    def post_process(self, tokens: torch.Tensor, new_tokens: torch.Tensor, context_length: int) -> None:
        pass


class Recording(RecordsLogProbs, Decoder):
    pass


def test_each_step_gives_the_log_prob_of_its_token_among_those_of_the_tokenizer(monkeypatch):
    monkeypatch.setattr(engine_log_probs.mpu, "is_pipeline_last_stage", lambda: True)
    monkeypatch.setattr(engine_log_probs.mpu, "get_tensor_model_parallel_group", lambda: None)
    monkeypatch.setattr(engine_log_probs.mpu, "get_pipeline_model_parallel_group", lambda: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(SAMPLES, FIRST if step == 0 else 1, PADDED, generator=generator) for step in range(5)]
    logits = [step[:, -1].clone() for step in steps]
    chosen = torch.randint(0, VOCABULARY, (5, SAMPLES), generator=generator)
    strategy = Recording(steps)
    for step, new_tokens in enumerate(chosen):
        output = strategy.forward_step(None, None)
        output[0]["logits"].fill_(float("nan"))  # as NeMo's loop writes to the logits of a step
        strategy.post_process(None, new_tokens, FIRST + step)
    found = strategy.log_probs(SAMPLES, WIDTH)  # NeMo may decode beyond the width that is kept
    assert found.shape == (SAMPLES, WIDTH - 1) and not found[:, : FIRST - 1].any()
    for step in range(WIDTH - FIRST):
        probability = logits[step][:, :VOCABULARY].double().softmax(-1)[torch.arange(SAMPLES), chosen[step]]
        assert torch.allclose(found[:, FIRST - 1 + step].double().exp(), probability, rtol=1e-6)
