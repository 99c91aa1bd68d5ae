"""Small random models of the families that can be imported, and tokenizers for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from nemo_fiberpo.conversion import tensors

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0, "attn_implementation": "eager", "bos_token_id": 3, "eos_token_id": 7,
}  # fmt: skip
LLAMA31 = {"rope_type": "llama3", **tensors.LLAMA3_SCALING}
LLAMA32 = LLAMA31 | {"factor": 32.0}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "llama with Llama 3.1's positions": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {"rope_scaling": LLAMA31, "rope_theta": 500000.0, "max_position_embeddings": 16384},
    ),
    "llama with Llama 3.2's positions": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {
            "rope_scaling": LLAMA32,
            "rope_theta": 500000.0,
            "max_position_embeddings": 131072,
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
    ),
    "llama with wide heads": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"head_dim": 16}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen2, tied": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "mixtral": (
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
}


def make(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A model with weights large enough, and biases and norms far enough from their defaults, that each matters."""
    config, kind, changes = MODELS[name]
    torch.manual_seed(4)
    model = kind(config(**(SIZES | changes | more)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model.to(dtype).eval()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def write_tokenizer(
    folder: Path, eos: str = "<1>", size: int = 45, bos: bool = False, chat_template: str | None = None
) -> None:
    """Words "<n>" between spaces are the tokens n. Of fewer tokens than the model has rows, as Qwen2's. With `bos`,
    every text begins with <3>."""
    words = tokenizers.models.WordLevel({f"<{number}>": number for number in range(size)}, unk_token="<0>")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special: dict[str, Any] = {"unk_token": "<0>", "eos_token": eos, "pad_token": "<2>"}
    if bos:
        made.post_processor = tokenizers.processors.TemplateProcessing(single="<3> $A", special_tokens=[("<3>", 3)])
        special["bos_token"] = "<3>"
    if chat_template is not None:
        special["chat_template"] = chat_template
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
