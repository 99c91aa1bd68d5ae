"""FiberPO in verl on a CPU: a tiny Qwen3-MoE learns two domains, under verl's own worker and FSDP2 engine.

    bash requirements/setup_verl.sh && .venv-verl/bin/python examples/verl/tiny_cpu.py

verl's rollout engines need a GPU, so that sampling is a loop here. Everything else is what verl's trainer does in an RL
step: old log-probs by `infer_batch`, advantages by prompt group, `train_mini_batch` over mini-batches and epochs.

A prompt is a domain's token and a few random ones; the reward is the fraction of the response's tokens that lie in the
domain's half of the vocabulary, so that chance gives 0.5.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial
from typing import Any

os.environ["VERL_PLATFORM"] = "cpu"  # before verl is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

from nemo_fiberpo.integrations.verl import FiberPOConfig
from nemo_fiberpo.integrations.verl_cpu import init_process_group

VOCABULARY, PROMPT, RESPONSE, SAMPLES, PROMPTS = 64, 4, 8, 8, 8
DOMAINS = ("low", "high")
HIERARCHY = {
    "token_clip": 0.2,
    "strata": {
        "domain": {"budget": {"pos": 0.1, "neg": 0.05}, "budgets": {"high": {"pos": 0.2, "neg": 0.1}}},
        "prompt_group": {"budget": {"pos": 0.2, "neg": 0.1}},
        "trajectory": {"budget": {"pos": 0.4, "neg": 0.3}},
    },
}


def make_worker(folder: str) -> TrainingWorker:
    """A model with random weights, and the worker that verl makes from a run's config."""
    model = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(model).save_pretrained(folder)
    engine = FSDPEngineConfig(
        strategy="fsdp2", use_torch_compile=False, use_dynamic_bsz=False, micro_batch_size_per_gpu=16,
        infer_micro_batch_size_per_gpu=64, mixed_precision={"param_dtype": "fp32"},
    )  # fmt: skip
    actor = FSDPActorConfig(
        strategy="fsdp2", rollout_n=SAMPLES, ppo_micro_batch_size_per_gpu=16, fsdp_config=engine,
        loss_agg_mode="seq-mean-token-mean", policy_loss=FiberPOConfig(loss_mode="fiberpo", hierarchy=HIERARCHY),
    )  # fmt: skip
    config = TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=folder, load_tokenizer=False, use_remove_padding=False, enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=engine,
        optimizer_config=FSDPOptimizerConfig(lr=3e-3),
        checkpoint_config=CheckpointConfig(),
    )  # fmt: skip
    worker = TrainingWorker(config)
    worker.flops_counter = None  # knows GPUs only
    worker.reset()
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    return worker


def sample(worker: TrainingWorker, generator: torch.Generator) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Token ids of prompts and responses, the domain of each row, and its reward."""
    domain = [group % len(DOMAINS) for group in range(PROMPTS) for _ in range(SAMPLES)]
    prompts = torch.randint(2, VOCABULARY, (PROMPTS, PROMPT), generator=generator).repeat_interleave(SAMPLES, 0)
    prompts[:, 0] = torch.tensor(domain)
    ids = prompts
    with torch.no_grad(), worker.engine.eval_mode():
        for _ in range(RESPONSE):
            probabilities = worker.engine.module(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
    upper = (ids[:, PROMPT:] >= VOCABULARY // 2).float().mean(1)
    return ids, domain, torch.where(torch.tensor(domain) == 1, upper, 1.0 - upper)


def train(worker: TrainingWorker, ids: torch.Tensor, domain: list[int], reward: torch.Tensor, step: int) -> Any:
    """Two epochs of two mini-batches, as verl's trainer has them; returns verl's metrics."""
    grouped = reward.view(PROMPTS, SAMPLES)
    advantage = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-6)
    ones = torch.ones_like(ids)
    rows = len(ids)
    data = tu.get_tensordict({
        "input_ids": ids, "attention_mask": ones, "position_ids": ones.cumsum(1) - 1,
        "prompts": ids[:, :PROMPT], "responses": ids[:, PROMPT:], "response_mask": ones[:, PROMPT:],
        "advantages": advantage.view(-1, 1).expand(-1, RESPONSE).contiguous(),
        "uid": [f"{step}-{row // SAMPLES}" for row in range(rows)],
        "data_source": [DOMAINS[index] for index in domain],
    })  # fmt: skip
    data = tu.assign_non_tensor(left_right_2_no_padding(data), temperature=1.0, compute_loss=False)
    old = worker.infer_batch(data)
    data["old_log_probs"] = no_padding_2_padding(old["log_probs"], data).float()
    for key in ("micro_batch_size_per_gpu", "use_dynamic_bsz", "max_token_len_per_gpu", "use_fused_kernels"):
        data.pop(key, None)  # those of inference
    sizes = {"mini_batch_size": rows // 2, "global_batch_size": rows // 2}
    tu.assign_non_tensor(data, **sizes, epochs=2, seed=step, dataloader_kwargs={"shuffle": False})
    return worker.train_mini_batch(data)["metrics"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    steps = parser.parse_args().steps
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29533")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    torch.manual_seed(0)
    init_process_group()
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        worker = make_worker(folder)
        for step in range(steps + 1):
            ids, domain, reward = sample(worker, generator)
            means = [float(reward[torch.tensor(domain) == index].mean()) for index in range(len(DOMAINS))]
            shown = "  ".join(f"{name} {mean:.3f}" for name, mean in zip(DOMAINS, means, strict=True))
            line = f"step {step:2d}  reward {float(reward.mean()):.3f}  {shown}"
            if step < steps:
                metrics = train(worker, ids, domain, reward, step)
                used = max(metrics["gates/domain/pos/budget_used_max"])
                line += f"  domain budget used {used:.2f}  tokens clipped {metrics['gates/token/clipped'][-1]:.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
