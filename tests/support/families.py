"""Tiny random models of the families that `tests/models/test_families.py` compares with transformers.

With the weights that transformers draws, attention hardly changes the logits, and faults of masks and positions stay
hidden. So layers have weights 8 times as large, and the output matrix 20 times.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCABULARY = 97
_WINDOW = 7

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = _COMMON | {"intermediate_size": 64, "num_key_value_heads": 2}
_HEADS = _GROUPED | {"head_dim": 8}
_WINDOWS = {"sliding_window": _WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_OF_GPT2 = {
    **{"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    **{"bos_token_id": None, "eos_token_id": None},
}
_LATENT = _COMMON | {
    **{"intermediate_size": 64, "num_key_value_heads": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    **{"q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 8},
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_IMAGES = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
_VISION = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 16, "patch_size": 8},
}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**_GROUPED),
    "mistral": lambda: hf.MistralConfig(**_HEADS, sliding_window=_WINDOW),
    "mixtral": lambda: hf.MixtralConfig(**_GROUPED, num_local_experts=4, sliding_window=_WINDOW),
    "qwen2": lambda: hf.Qwen2Config(**_GROUPED, use_sliding_window=True, sliding_window=_WINDOW, max_window_layers=1),
    "qwen3": lambda: hf.Qwen3Config(**_GROUPED, head_dim=16),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**_GROUPED, **_EXPERTS, head_dim=16),
    "gemma2": lambda: hf.Gemma2Config(**_HEADS, **_WINDOWS, query_pre_attn_scalar=8, attn_logit_softcapping=2.0),
    "gemma3": lambda: hf.Gemma3TextConfig(**_HEADS, **_WINDOWS),
    # Global layers have heads of another size.
    "gemma4": lambda: hf.Gemma4TextConfig(
        **_HEADS, **_WINDOWS, global_head_dim=16, hidden_size_per_layer_input=0, vocab_size_per_layer_input=VOCABULARY
    ),
    "gpt-oss": lambda: hf.GptOssConfig(**_HEADS, **_WINDOWS, num_local_experts=4, num_experts_per_tok=2),
    "phi3": lambda: hf.Phi3Config(**_GROUPED, sliding_window=_WINDOW),
    "falcon": lambda: hf.FalconConfig(**_COMMON, multi_query=True, new_decoder_architecture=False),
    "stablelm": lambda: hf.StableLmConfig(**_GROUPED),
    "granite": lambda: hf.GraniteConfig(**_GROUPED, attention_multiplier=0.3, residual_multiplier=0.8),
    "olmo2": lambda: hf.Olmo2Config(**_GROUPED),
    "cohere": lambda: hf.CohereConfig(**_GROUPED, logit_scale=1.0),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**_COMMON, intermediate_size=64),
    "starcoder2": lambda: hf.Starcoder2Config(**_GROUPED, sliding_window=_WINDOW),
    "opt": lambda: hf.OPTConfig(**_COMMON, ffn_dim=64, word_embed_proj_dim=32),
    "gpt2": lambda: hf.GPT2Config(**_OF_GPT2),
    # Keys and values have different sizes.
    "deepseek2": lambda: hf.DeepseekV2Config(**_LATENT),
    "deepseek3": lambda: hf.DeepseekV3Config(**_LATENT),
    "qwen2-vl": lambda: hf.Qwen2VLConfig(
        text_config=_GROUPED | _MROPE,
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        **_IMAGES,
    ),
    "gemma3-vision": lambda: hf.Gemma3Config(
        text_config=_HEADS | _WINDOWS, vision_config=_VISION, mm_tokens_per_image=4, image_token_index=90
    ),
}


def tiny_family(name: str, seed: int = 0) -> Any:
    """A random model of a family."""
    config = FAMILIES[name]()
    torch.manual_seed(seed)
    text_only = config.get_text_config() is config
    cls = hf.AutoModelForCausalLM if text_only else hf.AutoModelForImageTextToText
    return scaled(cls.from_config(config))


def scaled(network: Any) -> Any:
    """A random model whose layers and output matter, changed in place; it ends no text."""
    output = network.get_output_embeddings().weight
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter is output:
                parameter.mul_(20)
            elif parameter.dim() > 1 and not any(part in name for part in ("norm", "embed", "wte", "wpe")):
                parameter.mul_(8)
            elif "sinks" in name:
                parameter.normal_()
    network.generation_config.eos_token_id, network.generation_config.pad_token_id = None, 0
    return network.eval()


def noisy_copy(network: Any, noise: float = 0.05) -> Any:
    """A draft that agrees with a model often, not always."""
    draft = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * noise * parameter.std())
    return draft
