"""Networks of `mcsd.models.llama` compute what transformers' networks of the same weights do."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mcsd import TreeShape
from mcsd.models import TokenLayout, TransformersModel
from mcsd.models.llama import LlamaConfig, LlamaForCausalLM
from mcsd.models.prefill import prefill
from support.tiny import VOCABULARY

# Largest difference of float32 logits of size about 10, summed in another order.
CLOSE = {"atol": 2e-4, "rtol": 1e-4}

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 3e-2,
    "bos_token_id": None,
    "eos_token_id": [5, 9],
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**_SIZES),
    "llama-biases": transformers.LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True, head_dim=16),
    "llama-tied": transformers.LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**_SIZES),
}


def network_of(config: Any) -> Any:
    """A random network of transformers whose every weight counts, biases and norms included."""
    torch.manual_seed(3)
    network: Any = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in network.parameters():
        parameter.data.normal_(1 if parameter.dim() == 1 else 0, 0.3)
    return network.eval()


def fields_of(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return fields


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_logits_and_hidden_states(name: str, tmp_path: Path) -> None:
    theirs = network_of(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    config = LlamaConfig.from_transformers(fields_of(tmp_path))
    assert config is not None
    tensors = load_file(tmp_path / "model.safetensors")
    ours = LlamaForCausalLM.from_tensors(config, theirs.generation_config, tensors)
    shape = TreeShape.parse("3x2x1")
    generator = torch.Generator().manual_seed(4)
    nodes = torch.randint(VOCABULARY, (2, 1 + len(shape)), generator=generator)
    outputs = []
    for model in (TransformersModel(ours), TransformersModel(theirs)):
        cache = model.new_cache(2, 64)
        prefill(model, cache, cache.add(), list(range(3, 14)))
        prefill(model, cache, cache.add(), list(range(20, 25)))
        outputs.append(model.forward(nodes, TokenLayout.tree(shape), cache, hidden_layers=(0, 1, 2, -1)))
        assert model.eos_token_ids == {5, 9}
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, **CLOSE)
    torch.testing.assert_close(outputs[0].hidden, outputs[1].hidden, **CLOSE)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral"},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_parameters": None},
        {"use_sliding_window": True},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"quantization_config": {"bits": 4}},
    ],
    ids=lambda change: str(next(iter(change))),
)
def test_other_networks_are_left_to_transformers(change: dict[str, Any], tmp_path: Path) -> None:
    CONFIGS["qwen2"].save_pretrained(tmp_path)
    assert LlamaConfig.from_transformers(fields_of(tmp_path)) is not None
    assert LlamaConfig.from_transformers(fields_of(tmp_path) | change) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_key_value_heads": 4}, "cannot share 4"),
        ({"num_key_value_heads": 0}, "cannot share 0"),
        ({"head_dim": 7}, "of size 7"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_sizes_are_refused(change: dict[str, int], reason: str, tmp_path: Path) -> None:
    CONFIGS["llama"].save_pretrained(tmp_path)
    config = LlamaConfig.from_transformers(fields_of(tmp_path))
    assert config is not None
    with pytest.raises(ValueError, match=reason):
        replace(config, **change)
