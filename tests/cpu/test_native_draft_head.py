"""Draft heads in our kernels: they compute what the torch module does."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mcsd import kernels
from mcsd.cpu.native_draft_head import NativeBoundHead, bind_head
from mcsd.kernels import WeightFormat
from mcsd.loading.published_heads import load_head
from mcsd.models import BoundHead, DraftHead, TokenLayout, TransformersModel
from mcsd.models.draft_head import HeadConfig
from mcsd.models.llama import LlamaConfig
from support import eagle
from support.decoders import SIBLINGS, assert_near, native_plan, with_bf16_weights
from support.eagle import VARIANTS, Published
from support.tiny import VOCABULARY

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no kernels for this CPU")


CONFIG = HeadConfig("tiny", VOCABULARY, hidden_size=32, hidden_layers=(0, 1, -1), num_layers=2, vocab_size=37)

EAGLE3 = HeadConfig(
    *("tiny", VOCABULARY, 32, (0, 1), 2, 37, "eagle3"),
    layer=LlamaConfig(VOCABULARY, 32, 64, 2, 6, 2, 16, 1 << 20, qkv_bias=True, qk_norm=True),
    feature_norm="each",
)
"""Its sizes are whole groups of all weight formats."""


def bound(head: DraftHead, network: torch.nn.Module) -> tuple[BoundHead, BoundHead]:
    """A head in float32 whose weights become exact in bfloat16: in the kernels, and in torch."""
    head = head.bfloat16().float()
    target = TransformersModel(network)
    plain = BoundHead(deepcopy(head), target, "head")
    ours = bind_head(head, target, "head", native_plan(WeightFormat.BFP16))
    assert isinstance(ours, NativeBoundHead)
    return ours, plain


def heads() -> tuple[BoundHead, BoundHead]:
    """A random head of mcsd."""
    torch.manual_seed(0)
    head = DraftHead(CONFIG)
    for parameter in head.parameters():
        parameter.data.normal_(0, 0.3) if parameter.dim() > 1 else parameter.data.uniform_(0.5, 1.5)
    return bound(head, with_bf16_weights("llama"))


def published_heads(published: Published, folder: Path) -> tuple[BoundHead, BoundHead]:
    """A published head with random weights."""
    published.write(folder)
    return bound(load_head(folder, eagle.target()), eagle.new_target_network().bfloat16().float())


def drafted(head: BoundHead) -> list[Tensor]:
    """Outputs of a head from the target's hidden states and its own, by level, for sequences of different lengths.

    One of them is still empty when the head drafts.
    """
    generator = torch.Generator().manual_seed(1)
    features, size = len(head.config.hidden_layers) * head.config.feature_size, head.config.hidden_size
    tokens = torch.randint(0, 60, (3, 10), generator=generator)
    states, own = torch.randn(3, 6, features, generator=generator), torch.randn(3, 4, size, generator=generator)
    cache = head.new_cache(3, 12)
    for _ in range(3):
        cache.add()
    outputs = [head.forward(tokens[:, :6], states.to(head.dtype), TokenLayout.chain(6), cache)]
    cache.commit(torch.arange(6).expand(3, -1), torch.tensor([6, 4, 0]))
    for layout, these in ((TokenLayout.chain(2), slice(0, 2)), (SIBLINGS, slice(2, 4))):
        outputs.append(head.forward(tokens[:, 6:][:, these], own[:, these].to(head.dtype), layout, cache, own=True))
    again, second = states[1:2, :2].to(head.dtype), slice(1, 2)
    outputs.append(head.forward(tokens[1:2, :2], again, TokenLayout.chain(2), cache, sequences=second, logits=False))
    assert outputs[-1].logits.shape == (1, 0, len(head.vocabulary))
    return [part for output in outputs for part in (output.logits, output.hidden) if part is not None]


def run_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run heads in our kernels as for many tokens."""
    monkeypatch.setattr("mcsd.cpu.native_draft_head.MAX_FUSED_TOKENS", 0)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_head_computes_the_same(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call and, as for many tokens, layer by layer."""
    ours, plain = heads()
    if not at_once:
        run_layer_by_layer(monkeypatch)
    for found, expected in zip(drafted(ours), drafted(plain), strict=True):
        assert_near(found, expected)


@pytest.mark.parametrize("published", VARIANTS, ids=str)
def test_a_published_head_computes_the_same(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call and layer by layer."""
    ours, plain = published_heads(published, tmp_path)
    outputs = drafted(plain)
    for found, expected in zip(drafted(ours), outputs, strict=True):
        assert_near(found, expected)
    run_layer_by_layer(monkeypatch)
    for found, expected in zip(drafted(ours), outputs, strict=True):
        assert_near(found, expected)


@pytest.mark.parametrize("config", [CONFIG, EAGLE3], ids=lambda config: config.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", list(WeightFormat))
def test_a_head_of_any_format_and_number_of_threads(
    format: WeightFormat, dtype: torch.dtype, config: HeadConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Close to layer by layer, where hidden states are rounded once more; the same bits from any number of threads."""
    network = with_bf16_weights("llama").to(dtype)
    torch.manual_seed(0)
    plan = native_plan(format, dtype)
    ours = bind_head(DraftHead(config), TransformersModel(network), "head", plan)
    alone = drafted(ours)
    try:
        for threads in [2, 3, 8] * 2:
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(drafted(ours), alone, strict=True))
    finally:
        torch.set_num_threads(1)
    run_layer_by_layer(monkeypatch)
    for found, expected in zip(alone, drafted(ours), strict=True):
        apart = (found - expected).float().norm() / expected.float().norm().clamp(min=1e-9)
        assert apart < (1e-2 if dtype == torch.float32 else 5e-2)


def test_large_numbers_among_the_hidden_states_hide_no_small_ones() -> None:
    """Some numbers of hidden states are hundreds of times larger than others: a head that reads them without a norm
    computes the same if they are scaled and its weights undo that, also with int8 weights and activations. With int8
    features the error would be 45 times larger."""
    config = replace(EAGLE3, feature_norm="none")
    scale = 2.0 ** torch.arange(64).remainder(9)
    generator = torch.Generator().manual_seed(2)
    tokens, states = torch.tensor([[5, 9, 2, 7]]), torch.randn(1, 4, 64, generator=generator)
    found = []
    for factor in (torch.ones(64), scale):
        torch.manual_seed(0)
        head = DraftHead(config)
        head.feature_proj.weight.data.div_(factor)  # type: ignore[operator, union-attr]
        target = TransformersModel(with_bf16_weights("llama"))
        plain = BoundHead(deepcopy(head), target, "head")
        outputs = []
        for bound in (plain, bind_head(head, target, "head", native_plan(WeightFormat.W8A8))):
            cache = bound.new_cache(1, 4)
            cache.add()
            hidden = bound.forward(tokens, states * factor, TokenLayout.chain(4), cache, logits=False).hidden
            assert hidden is not None
            outputs.append(hidden)
        found.append((outputs[0] - outputs[1]).norm() / outputs[0].norm())
    even, uneven = found
    assert uneven < 3 * even


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


def test_the_target_of_a_published_head_may_have_another_hidden_size(tmp_path: Path) -> None:
    """Then the hidden states of one do not serve as the other's."""
    head, _ = published_heads(VARIANTS[2], tmp_path)
    cache = head.new_cache(1, 2)
    cache.add()
    size, features = head.config.hidden_size, 3 * head.config.feature_size
    assert size != head.config.feature_size
    for width, own in ((features, True), (3 * size, False), (head.config.feature_size, True)):
        with pytest.raises(ValueError, match="numbers of"):
            head.forward(torch.tensor([[5, 9]]), torch.zeros(1, 2, width), TokenLayout.chain(2), cache, own=own)
