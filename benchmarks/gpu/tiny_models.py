"""Tiny random models for the checks of correctness, in float32."""

import copy
from typing import Any

import torch
import transformers
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

VOCABULARY = 96
HIDDEN = 32

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = _COMMON | {"intermediate_size": 64, "num_key_value_heads": 2}
FAMILIES = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=16),
    "mistral, sliding window": lambda: MistralConfig(**_GROUPED, sliding_window=7),
    "gpt2": lambda: GPT2Config(**_COMMON),
}


def tiny_model(family: str, device: torch.device) -> Any:
    """A random model whose weights are large enough for clear preferences."""
    model: Any = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25, generator=generator)
    return model.eval().to(device)


def near_copy(model: Any, amount: float = 0.05) -> Any:
    """A draft that often agrees with a model."""
    draft = copy.deepcopy(model)
    generator = torch.Generator(model.device).manual_seed(7)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                parameter.add_(noise * parameter.std() * amount)
    return draft


def random_texts(lengths: list[int], vocabulary: int = VOCABULARY, seed: int = 3) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
