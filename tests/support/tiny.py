"""Tiny random models of every family that the tests cover."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import (
    GPT2Config,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from mcsd.models.draft_head import HeadConfig
from mcsd.models.llama import LlamaConfig

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
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=16),
    "opt": lambda: OPTConfig(**_COMMON, ffn_dim=64, word_embed_proj_dim=32),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=None
    ),
    "mistral-window": lambda: MistralConfig(**_GROUPED, head_dim=8, sliding_window=7),
    "gemma3-window": lambda: transformers.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=7),
}


def published_head_config() -> HeadConfig:
    """Of an EAGLE-3 head for a model of `FAMILIES`, with rotary frequencies of its own."""
    layer = LlamaConfig(VOCABULARY, 32, 64, 1, 4, 2, 8, 256, frequencies=(1.0, 0.3, 0.1, 0.02), rope_scale=1.1)
    return HeadConfig("tiny", VOCABULARY, 32, (0, 1, 1), 1, VOCABULARY, kind="eagle3", layer=layer)


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model, its weights large enough for clear preferences."""
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.25)
    return model.eval()
