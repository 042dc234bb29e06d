"""Tiny random models of every family that the tests cover."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 96

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = _COMMON | {"intermediate_size": 64, "num_key_value_heads": 2}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=16),
    "opt": lambda: OPTConfig(**_COMMON, ffn_dim=64, word_embed_proj_dim=32),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=None
    ),
    "mistral-window": lambda: MistralConfig(**_GROUPED, head_dim=8, sliding_window=7),
    "gemma3-window": lambda: transformers.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=7),
}


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model, its weights large enough for clear preferences."""
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.25)
    return model.eval()
