"""Models that mcsd cannot run are refused when an engine is made of them, by the true reason; and limits of length."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

import mcsd
from mcsd import errors
from support.families import noisy_copy, scaled, tiny_family
from support.tiny import tiny

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
LINEAR = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8},
    **{"shared_expert_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"]},
}
CHUNKED = {"head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 8}
LOCAL = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "hidden_size": 32}
RECURRENT = "keeps a recurrent state"
POSITIONS = "derives positions from cache slots"

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "mamba": (lambda: hf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8), RECURRENT),
    "rwkv": (lambda: hf.RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2), RECURRENT),
    "lfm2": (lambda: hf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]), RECURRENT),
    "qwen3-next": (lambda: hf.Qwen3NextConfig(**GROUPED, **LINEAR), RECURRENT),
    "llama4": (lambda: hf.Llama4TextConfig(**GROUPED, **CHUNKED), "has layers of another kind .*: chunked_attention"),
    "bloom": (lambda: hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4), POSITIONS),
    "mpt": (lambda: hf.MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4), POSITIONS),
    "falcon-alibi": (lambda: hf.FalconConfig(**SIZES, alibi=True), POSITIONS),
    "gpt-neo": (lambda: hf.GPTNeoConfig(vocab_size=97, **LOCAL), "has local attention over cache slots"),
    "openai-gpt": (lambda: hf.OpenAIGPTConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4), "cannot read a tree"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_is_true(name: str) -> None:
    config, reason = REFUSED[name]
    network = hf.AutoModelForCausalLM.from_config(config())
    for models in ((network, "ngram"), (tiny("llama"), network)):
        with pytest.raises(errors.UnsupportedModel, match=reason) as info:
            mcsd.Engine(*models, tree="2x1")
        assert info.value.hint


def test_an_encoder_decoder_model_is_refused() -> None:
    network = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=1))
    with pytest.raises(errors.UnsupportedModel, match="is an encoder-decoder model"):
        mcsd.Engine(network, "ngram")


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "paged|sdpa"])
def test_attention_without_an_additive_mask_is_refused(attention: str) -> None:
    network: Any = tiny("llama")
    network.config._attn_implementation = attention
    with pytest.raises(errors.UnsupportedModel, match="attention, which takes no tree mask"):
        mcsd.Engine(network, "ngram")


def test_attention_of_the_user_is_checked_not_refused_by_its_name() -> None:
    def masked(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        return hf.AttentionInterface()["sdpa"](module, query, key, value, mask, **options)

    def maskless(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        return hf.AttentionInterface()["sdpa"](module, query, key, value, causal, **options)

    for name, attention in (("masked", masked), ("maskless", maskless)):
        hf.AttentionInterface.register(name, attention)
        hf.AttentionMaskInterface.register(name, hf.AttentionMaskInterface()["sdpa"])
    network = tiny_family("llama")
    network.set_attn_implementation("masked")
    mcsd.Engine(network, "ngram")
    network.set_attn_implementation("maskless")
    with pytest.raises(errors.UnsupportedModel, match="ignores the mask of a tree"):
        mcsd.Engine(network, "ngram")


def longrope() -> Any:
    """LongRoPE: short factors up to 64 positions, long ones for the whole of a longer text."""
    rope = {
        **{"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
        **{"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]},
    }
    torch.manual_seed(0)
    return scaled(hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, rope_parameters=rope)))


def test_rotary_embeddings_that_depend_on_the_longest_text_limit_the_length() -> None:
    network = longrope()
    with pytest.raises(
        errors.InvalidOption, match=r"max_length=100: the rotary embeddings of .* beyond 64 tokens"
    ) as info:
        mcsd.Engine(network, "ngram", max_length=100)
    assert info.value.hint == "give max_length=64 or less"
    with pytest.warns(errors.McsdWarning, match="texts are limited to 64 tokens"):
        assert mcsd.Engine(network, "ngram").max_length == 64


def test_texts_up_to_that_length_depend_on_no_neighbour_and_no_tree() -> None:
    network = longrope()
    prompts = [[i % 90 + 3 for i in range(length)] for length in (4, 51, 62)]
    engine = mcsd.Engine(network, noisy_copy(network), tree="3x2x2x1", max_batch=3, max_length=64)
    done = engine.generate(prompts, temperature=0, max_new_tokens=30, logprobs=0)
    for prompt, completion in zip(prompts, done, strict=True):
        assert len(completion.token_ids) == min(30, 64 - len(prompt))
        with torch.no_grad():
            logits = network(torch.tensor([prompt + list(completion.token_ids)])).logits[0, len(prompt) - 1 : -1]
        best = logits.log_softmax(-1).max(-1)
        assert list(completion.token_ids) == best.indices.tolist()
        assert completion.logprobs is not None
        logprobs = torch.tensor([each.logprob for each in completion.logprobs])
        torch.testing.assert_close(logprobs, best.values, atol=1e-4, rtol=1e-4)
