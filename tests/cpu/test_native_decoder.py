"""Decoders in our kernels: they compute what the layers of transformers do, and every token by itself."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mcsd import kernels
from mcsd.cpu.native_decoder import NativeDecoder
from mcsd.cpu.native_linear import NativeLinear
from mcsd.cpu.packing import pack
from mcsd.cpu.weight_plan import WeightPlan
from mcsd.kernels import WeightFormat
from mcsd.models import TokenLayout, TransformersModel
from support.decoders import KNOWN, TREE, assert_near, native_decoder, native_plan, outputs, with_bf16_weights
from support.tiny import FAMILIES

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no kernels for this CPU")


def odd(heads: int, shared: int, size: int) -> Any:
    """A model in float32 whose sizes fill no block of the kernels, with biases, and weights of bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=11 * heads,
        intermediate_size=75,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        head_dim=size,
        attention_bias=True,
        mlp_bias=True,
        max_position_embeddings=256,
    )
    model: Any = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.25) if "norm" not in name else parameter.data.uniform_(0.5, 1.5)
    return model.eval().bfloat16().float()


@pytest.mark.parametrize(("heads", "shared", "size"), [(6, 1, 6), (7, 7, 34), (4, 2, 80), (10, 2, 96), (2, 1, 128)])
def test_decoders_of_any_size_compute_the_same(heads: int, shared: int, size: int) -> None:
    network = odd(heads, shared, size)
    ours = native_decoder(deepcopy(network))
    for found, expected in zip(outputs(ours), outputs(network.double()), strict=True):
        assert_near(found, expected)


@pytest.mark.parametrize("format", [WeightFormat.W8A16, WeightFormat.W8A8])
@pytest.mark.parametrize("family", KNOWN)
def test_int8_layers_compute_what_those_of_onednn_do(family: str, format: WeightFormat) -> None:
    """Up to a step of an activation here and there: a hundredth of the change by quantization."""
    network = with_bf16_weights(family)
    theirs = deepcopy(network)
    pack(theirs, WeightPlan(torch.float32, format, packed=True, native=False))
    ours = native_decoder(deepcopy(network), format)
    apart = sum((a - b).abs().mean() for a, b in zip(outputs(ours), outputs(theirs), strict=True))
    rounding = sum((a - b).abs().mean() for a, b in zip(outputs(network), outputs(theirs), strict=True))
    assert apart < 0.01 * rounding


def test_any_number_of_threads_gives_the_same_bits() -> None:
    """More of them than cores, rows or blocks too; a thread that did not wait for another would show."""
    for format in WeightFormat:
        # Q8_0 has groups of 32 inputs.
        network = with_bf16_weights("llama") if format is WeightFormat.GGUF else odd(6, 2, 34)
        ours = native_decoder(network, format)
        alone = outputs(ours)
        try:
            for threads in [2, 3, 8] * 4:
                torch.set_num_threads(threads)
                assert all(torch.equal(a, b) for a, b in zip(outputs(ours), alone, strict=True))
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_keys_give_nan_to_tokens_that_attend_to_them(value: float) -> None:
    network = with_bf16_weights("llama")
    model = native_decoder(network)
    cache = model.new_cache(1, 8)
    cache.add()
    model.forward(torch.tensor([[5, 9]]), TokenLayout.chain(2), cache)
    cache.commit(torch.tensor([[0, 1]]), torch.tensor([2]))
    assert cache._store is not None
    cache._store[0, 0, 0, :, 1] = value
    assert model.forward(torch.tensor([[7]]), TokenLayout.chain(1), cache).logits.isnan().all()


def test_slots_outside_the_mask_are_not_read() -> None:
    """Nor by a token beside one whose scores are no numbers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=96, num_hidden_layers=1, sliding_window=5, max_position_embeddings=64, **sizes)
    network: Any = MistralForCausalLM(config).eval()
    model = native_decoder(network)
    found = []
    for broken in (False, True):
        cache = model.new_cache(1, 30)
        cache.add()
        model.forward(torch.tensor([[5, 9, 2, 3]]), TokenLayout.chain(4), cache)
        cache.commit(torch.arange(4)[None], torch.tensor([4]))
        assert cache._store is not None
        if broken:
            cache._store[:, 0, ..., 0, :] = torch.nan
            cache._store[..., 6:, :] = torch.nan
        found.append(model.forward(torch.tensor([[7, 8]]), TokenLayout.chain(2), cache).logits)
    # The first of both sees the broken key, the second no longer.
    assert found[1][0, 0].isnan().all()
    assert torch.equal(found[1][0, 1], found[0][0, 1])


def test_shapes_that_do_not_fit_are_refused() -> None:
    network = with_bf16_weights("llama")
    model = native_decoder(network)
    cache = model.new_cache(1, 2)
    cache.add()
    with pytest.raises(IndexError, match="3 slots"):
        model.forward(torch.tensor([[5, 9, 2]]), TokenLayout.chain(3), cache)
    with pytest.raises(ValueError, match="2 tokens of 1 sequences"):
        model.forward(torch.tensor([[5, 9, 2]]), TokenLayout.chain(2), cache)
    with pytest.raises(ValueError, match="2 tokens of 1 sequences"):
        model.forward(torch.tensor([[5, 9], [5, 9]]), TokenLayout.chain(2), cache)
    for offsets in (torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.tensor([0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match=r"offsets|positions"):
            model.forward(torch.tensor([[5, 9]]), TokenLayout(offsets, torch.ones(2, 2).bool()), cache)


def test_mixed_windows_and_the_end_of_the_context() -> None:
    """Windows on some layers only; a tree that hangs over the end, where positions stand still."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        max_position_embeddings=12,
    )
    network: Any = Qwen2ForCausalLM(config).eval()
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.25)
    network = network.bfloat16().float()
    ours = native_decoder(deepcopy(network))
    found: list[list[Tensor]] = []
    tokens = torch.randint(0, 96, (2, 11 + len(TREE) + 1), generator=torch.Generator().manual_seed(1))
    for model in (ours, TransformersModel(network.double())):
        cache = model.new_cache(2, 30)
        for _ in range(2):
            cache.add()
        read = model.forward(tokens[:, :11], TokenLayout.chain(11), cache)
        cache.commit(torch.arange(11).expand(2, -1), torch.tensor([11, 7]))
        found.append([read.logits, model.forward(tokens[:, 11:], TokenLayout.tree(TREE), cache).logits])
    for part, expected in zip(*found, strict=True):
        assert_near(part, expected)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("family", KNOWN)
def test_decoders_compute_the_same(family: str, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of different lengths, trees, windows; in one call and, as many tokens are, in halves around attentions."""
    if not at_once:
        monkeypatch.setattr("mcsd.cpu.native_layers.MAX_FUSED_TOKENS", 0)
    network = with_bf16_weights(family)
    ours = native_decoder(deepcopy(network))
    for found, expected in zip(outputs(ours), outputs(network.double()), strict=True):
        assert_near(found, expected)


@pytest.mark.parametrize("family", KNOWN)
def test_bfloat16_is_closer_to_the_exact_distribution_than_transformers(family: str) -> None:
    network = with_bf16_weights(family)
    exact = outputs(deepcopy(network).double())
    theirs = network.bfloat16()
    ours = native_decoder(deepcopy(theirs))

    def away(found: list[Tensor]) -> float:
        return sum(float((one.double() - other).square().sum()) for one, other in zip(found, exact, strict=True))

    assert away(outputs(ours)) < away(outputs(theirs))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(KNOWN)))
def test_other_architectures_have_native_linear_layers_only(family: str) -> None:
    network = with_bf16_weights(family)
    ours = deepcopy(network)
    pack(ours, native_plan(WeightFormat.BFP16))
    assert not NativeDecoder.is_native(ours)
    assert any(isinstance(module, NativeLinear) for module in ours.modules())
    for found, expected in zip(outputs(ours), outputs(network), strict=True):
        assert_near(found, expected)


@pytest.mark.parametrize("family", KNOWN)
def test_a_token_depends_on_no_other_sequence(family: str) -> None:
    """To the last bit, and one row that is no number leaves the others what they are."""
    network = with_bf16_weights(family)
    model = native_decoder(network)
    prompts = torch.randint(0, 96, (7, 9), generator=torch.Generator().manual_seed(1))
    tree = TokenLayout.chain(3)

    def run(sequences: Tensor, poison: int | None = None) -> Tensor:
        cache = model.new_cache(len(sequences), 16)
        for _ in sequences:
            cache.add()
        model.forward(sequences[:, :6], TokenLayout.chain(6), cache)
        cache.commit(torch.arange(6).expand(len(sequences), -1), torch.full((len(sequences),), 6))
        if poison is not None:
            assert cache._store is not None
            cache._store[0, :, poison, :, 2] = torch.nan
        return model.forward(sequences[:, 6:], tree, cache).logits

    together = run(prompts)
    for i in range(7):
        assert torch.equal(run(prompts[i : i + 1])[0], together[i])
    broken = run(prompts, poison=3)
    assert broken[3].isnan().all()
    assert torch.equal(broken[[0, 1, 2, 4, 5, 6]], together[[0, 1, 2, 4, 5, 6]])


def test_a_prompt_of_more_tokens_than_one_call() -> None:
    network = with_bf16_weights("llama")
    ours = native_decoder(deepcopy(network))
    tokens = torch.randint(0, 96, (2, 250), generator=torch.Generator().manual_seed(1))
    found = []
    for model in (ours, TransformersModel(network)):
        cache = model.new_cache(2, 256)
        for _ in range(2):
            cache.add()
        found.append(model.forward(tokens, TokenLayout.chain(250), cache).logits)
    assert_near(*found)
