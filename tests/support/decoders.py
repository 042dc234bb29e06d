"""Decoders of the kinds that are fused, and everything a model computes for trees, batches and caches."""

from typing import Any

import torch
from torch import Tensor

import mcsd
from mcsd.cpu.native_decoder import NativeDecoder
from mcsd.cpu.packing import pack
from mcsd.cpu.weight_plan import WeightPlan
from mcsd.kernels import WeightFormat
from mcsd.models import TokenLayout
from mcsd.models.compatibility import as_model
from support.tiny import tiny

PACKED_FORMATS = [format for format in WeightFormat if format is not WeightFormat.GGUF]
KNOWN = ["llama", "mistral-window", "qwen2", "qwen3"]
TREE = mcsd.TreeShape.parse("3x2x1")
SIBLINGS = TokenLayout(torch.tensor([0, 1, 2, 2]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]]).bool())
"""Two siblings below two tokens that are already in flight."""


def native_plan(format: WeightFormat, dtype: torch.dtype = torch.float32) -> WeightPlan:
    """A plan for our kernels."""
    return WeightPlan(dtype, format, packed=True, native=True)


def native_decoder(network: Any, format: WeightFormat = WeightFormat.BFP16) -> NativeDecoder:
    """A network, which is changed, in our kernels."""
    pack(network, native_plan(format, network.dtype))
    assert NativeDecoder.is_native(network)
    return NativeDecoder(network, "tiny", None, str(format), lambda: None)


def outputs(model: Any) -> list[Tensor]:
    """Logits and hidden states of two texts of different lengths, trees after them, one token, and a draft's levels."""
    model = as_model(model)
    cache = model.new_cache(2, 40)
    for _ in range(2):
        cache.add()
    generator = torch.Generator().manual_seed(3)
    found = []
    layouts = [
        (TokenLayout.chain(11), [11, 4]),
        (TokenLayout.tree(TREE), [3, 2]),
        (TokenLayout.chain(1), [1, 1]),
        (TokenLayout.chain(2), [0, 0]),
        (SIBLINGS, [3, 1]),
        (TokenLayout.chain(2), [2, 1]),
    ]
    for layout, kept in layouts:
        tokens = torch.randint(0, 96, (2, layout.new), generator=generator)
        output = model.forward(tokens, layout, cache, hidden_layers=(0, 1, -1))
        assert output.hidden is not None
        found += [output.logits, output.hidden]
        if any(kept):
            cache.commit(torch.arange(max(kept)).expand(2, -1), torch.tensor(kept))
    return found


def with_bf16_weights(family: str) -> Any:
    """A model in float32 whose weights are exact in bf16."""
    return tiny(family).bfloat16().float()


def assert_near(found: Tensor, expected: Tensor) -> None:
    """BFP16 rounds a product by about 1e-4 of itself; large random weights magnify that. One column too many or one
    position off changes a token's output by a tenth."""
    assert ((found.double() - expected.double()).norm(dim=-1) <= 1e-2 * expected.double().norm(dim=-1)).all()
