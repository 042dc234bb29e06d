"""Draft heads in our kernels: they compute what the torch module does."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from mcsd import kernels
from mcsd.cpu.native_draft_head import NativeBoundHead, bind_head
from mcsd.kernels import WeightFormat
from mcsd.models import BoundHead, DraftHead, TokenLayout, TransformersModel
from mcsd.models.draft_head import HeadConfig
from support.decoders import SIBLINGS, assert_near, native_plan, with_bf16_weights
from support.tiny import VOCABULARY

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no kernels for this CPU")


CONFIG = HeadConfig("tiny", VOCABULARY, hidden_size=32, hidden_layers=(0, 1, -1), num_layers=2, vocab_size=37)


def heads() -> tuple[BoundHead, BoundHead]:
    """A random head in float32 whose weights are exact in bfloat16: in the kernels, and in torch."""
    torch.manual_seed(0)
    head = DraftHead(CONFIG)
    for parameter in head.parameters():
        parameter.data.normal_(0, 0.3) if parameter.dim() > 1 else parameter.data.uniform_(0.5, 1.5)
    head = head.bfloat16().float()
    target = TransformersModel(with_bf16_weights("llama"))
    plain = BoundHead(deepcopy(head), target, "head")
    return bind_head(head, target, "head", native_plan(WeightFormat.BFP16)), plain


def drafted(head: BoundHead) -> list[Tensor]:
    """Outputs of a head from the target's hidden states and its own, for sequences of different lengths, by level."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 96, (2, 10), generator=generator)
    states, own = torch.randn(2, 6, 96, generator=generator), torch.randn(2, 4, 32, generator=generator)
    cache = head.new_cache(2, 12)
    for _ in range(2):
        cache.add()
    outputs = [head.forward(tokens[:, :6], states.to(head.dtype), TokenLayout.chain(6), cache)]
    cache.commit(torch.arange(6).expand(2, -1), torch.tensor([6, 4]))
    for layout, these in ((TokenLayout.chain(2), slice(0, 2)), (SIBLINGS, slice(2, 4))):
        outputs.append(head.forward(tokens[:, 6:][:, these], own[:, these].to(head.dtype), layout, cache, own=True))
    again, second = states[1:, :2].to(head.dtype), slice(1, 2)
    outputs.append(head.forward(tokens[1:, :2], again, TokenLayout.chain(2), cache, sequences=second, logits=False))
    assert outputs[-1].logits.shape == (1, 0, 37)
    return [part for output in outputs for part in (output.logits, output.hidden) if part is not None]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_head_computes_the_same(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call and, as for many tokens, layer by layer."""
    ours, plain = heads()
    assert isinstance(ours, NativeBoundHead)
    if not at_once:
        monkeypatch.setattr("mcsd.cpu.native_draft_head.MAX_FUSED_TOKENS", 0)
    for found, expected in zip(drafted(ours), drafted(plain), strict=True):
        assert_near(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", list(WeightFormat))
def test_a_head_of_any_format_and_number_of_threads(
    format: WeightFormat, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Close to layer by layer, where hidden states are rounded once more; the same bits from any number of threads."""
    network = with_bf16_weights("llama").to(dtype)
    torch.manual_seed(0)
    plan = native_plan(format, dtype)
    ours = bind_head(DraftHead(CONFIG), TransformersModel(network), "head", plan)
    alone = drafted(ours)
    try:
        for threads in [2, 3, 8] * 2:
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(drafted(ours), alone, strict=True))
    finally:
        torch.set_num_threads(1)
    monkeypatch.setattr("mcsd.cpu.native_draft_head.MAX_FUSED_TOKENS", 0)
    for found, expected in zip(alone, drafted(ours), strict=True):
        apart = (found - expected).float().norm() / expected.float().norm().clamp(min=1e-9)
        assert apart < (1e-2 if dtype == torch.float32 else 5e-2)


def test_shapes_that_do_not_fit_are_refused() -> None:
    head, _ = heads()
    cache = head.new_cache(1, 2)
    cache.add()
    tokens, states = torch.tensor([[5, 9, 2]]), torch.zeros(1, 3, 96)
    with pytest.raises(IndexError, match="3 slots"):
        head.forward(tokens, states, TokenLayout.chain(3), cache)
    for wrong, own in ((states, True), (states[..., :50], False), (states[:, :1], False)):
        with pytest.raises(ValueError, match="numbers of"):
            head.forward(tokens[:, :2], wrong, TokenLayout.chain(2), cache, own=own)
