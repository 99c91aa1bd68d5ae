"""A tiny Qwen3-MoE under verl's TrainingWorker on CPUs, a batch as verl's trainer makes it, and one optimizer step."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

VOCABULARY, PROMPT, RESPONSE, GROUPS, SAMPLES = 64, 6, 10, 4, 4
DOMAINS = ("code", "math")
HIERARCHY = {
    "token_clip": 0.06,
    "strata": {
        "domain": {"budget": {"pos": 0.02, "neg": 0.015}, "budgets": {"code": {"pos": 0.05, "neg": 0.01}}},
        "prompt_group": {"budget": {"pos": 0.03, "neg": 0.02}},
        "trajectory": {"budget": {"pos": 0.05, "neg": 0.04}},
    },
    "branches": {"language": {"beside": "domain", "budget": {"pos": 0.012, "neg": 0.01}}},
}


def save_model(folder: Any, **config: Any) -> None:
    """A Qwen3-MoE of two layers with random weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(1)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4,
        "num_experts_per_tok": 2, "tie_word_embeddings": False, "initializer_range": 0.2,
    }  # fmt: skip
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **config)).save_pretrained(folder)


@dataclass
class Batch:
    """Rows of a rollout: prompts padded on the left, responses on the right. The weights are rollout_correction's."""

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    uid: list[str]
    data_source: list[str]
    extra_info: list[dict[str, str]]
    ref_log_prob: Tensor
    rollout_is_weights: Tensor | None = None
    rollout_log_probs: Tensor | None = None

    def rows(self, index: list[int]) -> Batch:
        def of(values: Any) -> Any:
            return values[index] if isinstance(values, Tensor) else values and [values[i] for i in index]

        return Batch(*map(of, vars(self).values()))

    def tensordict(self, **settings: Any) -> Any:
        """As verl's trainer hands it to `update_actor`: without padding."""
        from verl.utils import tensordict_utils as tu
        from verl.workers.utils.padding import left_right_2_no_padding

        mask = self.attention_mask
        tensors = {
            "input_ids": self.input_ids,
            "prompts": self.input_ids[:, :PROMPT],
            "responses": self.input_ids[:, PROMPT:],
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
            "response_mask": self.response_mask,
            "old_log_probs": self.old_log_probs,
            "advantages": self.advantages,
            "ref_log_prob": self.ref_log_prob,
        }
        for name in ("rollout_is_weights", "rollout_log_probs"):
            if (value := getattr(self, name)) is not None:
                tensors[name] = value
        columns = {"uid": self.uid, "data_source": self.data_source, "extra_info": self.extra_info}
        data = tu.get_tensordict({name: value.clone() for name, value in tensors.items()} | columns)
        return tu.assign_non_tensor(left_right_2_no_padding(data), temperature=1.0, **settings)


def make_batch(folder: Any, drift: float = 0.1) -> Batch:
    """A batch whose old policy is the saved one with noise in its log-probs, so that gates act in every stratum."""
    g = torch.Generator().manual_seed(2)
    rows = GROUPS * SAMPLES
    ids = torch.randint(2, VOCABULARY, (rows, PROMPT + RESPONSE), generator=g)
    before, after = (
        torch.randint(0, PROMPT - 1, (rows, 1), generator=g),
        torch.randint(2, RESPONSE + 1, (rows, 1), generator=g),
    )
    place = torch.arange(PROMPT + RESPONSE)
    attention = ((place >= before) & (place < PROMPT + after)).long()
    live = attention[:, PROMPT:].clone()
    live[3, :2] = 0  # as of a tool's answer in a conversation
    group = torch.arange(rows) // SAMPLES
    batch = Batch(
        input_ids=ids * attention,
        attention_mask=attention,
        response_mask=live,
        old_log_probs=torch.zeros(rows, RESPONSE),
        advantages=torch.randn(rows, 1, generator=g).expand(-1, RESPONSE) * live,
        uid=[f"prompt-{index}" for index in group.tolist()],
        data_source=[DOMAINS[index % 2] for index in group.tolist()],
        extra_info=[{"language": ("en", "de", "fr")[row % 3]} for row in range(rows)],
        ref_log_prob=torch.zeros(rows, RESPONSE),
    )
    log_probs = log_probs_of(load_model(folder), batch).detach()
    # Domains and prompt groups drift as a whole, and every token a little.
    shift = 0.3 * drift * torch.randn(GROUPS, 1, generator=g)[group] + drift * torch.randn(rows, RESPONSE, generator=g)
    batch.ref_log_prob = ((log_probs.float() + 0.1) * live).float()
    batch.old_log_probs = ((log_probs.float() - shift) * live).float()
    return batch


def load_model(folder: Any) -> Any:
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **eager)


def log_probs_of(model: Any, batch: Batch) -> Tensor:
    """[b, R], float64, row by row without padding."""
    out = []
    for ids, mask in zip(batch.input_ids, batch.attention_mask.bool(), strict=True):
        real = ids[mask]
        logits = model(real[None]).logits[0, :-1].log_softmax(-1)
        taken = logits.gather(1, real[1:, None])[:, 0]
        number = int(mask[PROMPT:].sum())
        out.append(torch.nn.functional.pad(taken[len(taken) - number :], (0, RESPONSE - number)))
    return torch.stack(out)


def worker_config(
    folder: Any, micro_batch_size: int, policy_loss: dict[str, Any], **actor: Any
) -> tuple[Any, Callable[..., Any]]:
    """The config of verl's worker, and the actor's loss, as ActorRolloutRefWorker makes them."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import (
        FSDPActorConfig,
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
        TrainingWorkerConfig,
    )
    from verl.workers.utils.losses import ppo_loss

    from nemo_fiberpo.integrations.verl import FiberPOConfig

    engine = FSDPEngineConfig(
        strategy="fsdp2", use_torch_compile=False, use_dynamic_bsz=actor.get("use_dynamic_bsz", False),
        micro_batch_size_per_gpu=micro_batch_size, max_token_len_per_gpu=actor.get("ppo_max_token_len_per_gpu", 64),
        mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}, dtype="fp32",
    )  # fmt: skip
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=SAMPLES, ppo_micro_batch_size_per_gpu=micro_batch_size, fsdp_config=engine,
        policy_loss=FiberPOConfig(**policy_loss), **actor,
    )  # fmt: skip
    model = HFModelConfig(
        path=str(folder), load_tokenizer=False, use_remove_padding=False, enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "eager"},
    )  # fmt: skip
    worker = TrainingWorkerConfig(
        model_type="language_model",
        model_config=model,
        engine_config=engine,
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, clip_grad=1e9),
        checkpoint_config=CheckpointConfig(),
    )
    return worker, partial(ppo_loss, config=config)


def make_worker(folder: Any, *arguments: Any, **actor: Any) -> Any:
    """verl's own worker, ready to train; arguments as of `worker_config`."""
    from verl.workers.engine_workers import TrainingWorker

    os.environ.setdefault("LOCAL_RANK", "0")
    config, loss = worker_config(folder, *arguments, **actor)
    worker = TrainingWorker(config)
    worker.flops_counter = None  # knows GPUs only
    worker.reset()
    worker.set_loss_fn(loss)
    return worker


def full(value: Any) -> Tensor:
    """A copy of a parameter or gradient, all shards together. Every rank calls this."""
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


def recorded_gradients(engine: Any) -> dict[str, Tensor]:
    """Is filled with the gradients at the engine's next optimizer step."""
    gradients: dict[str, Tensor] = {}
    step = engine.optimizer_step

    def recording() -> Any:
        gradients.update({name: full(p.grad) for name, p in engine.module.named_parameters()})
        return step()

    engine.optimizer_step = recording
    return gradients


def parameters(engine: Any) -> dict[str, Tensor]:
    return {name: full(p) for name, p in engine.module.named_parameters()}


def mini_batch(batch: Batch, rows: int, **settings: Any) -> Any:
    """`batch` as `train_mini_batch` takes it, for one optimizer step over `rows` rows of all ranks."""
    sizes = {"mini_batch_size": rows, "global_batch_size": rows}
    return batch.tensordict(**sizes, epochs=1, seed=0, dataloader_kwargs={"shuffle": False}, **settings)


def one_step(
    worker: Any, batch: Batch, rank: int, world_size: int, without: str | None = None, **settings: Any
) -> dict[str, Any]:
    """verl's `train_mini_batch` of this rank's rows: gradients before the optimizer, parameters after, metrics.

    without   a column that is taken out of the rows
    """
    gradients = recorded_gradients(worker.engine)
    rows = len(batch.uid)
    data = mini_batch(batch.rows(list(range(rank, rows, world_size))), rows, **settings)
    if without:
        del data[without]
    output = worker.train_mini_batch(data)
    return {"gradients": gradients, "parameters": parameters(worker.engine), "metrics": output["metrics"]}
