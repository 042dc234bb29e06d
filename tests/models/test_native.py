"""Our own kernels: they compute what the layers of transformers do, and every token by itself."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_fusion import BELOW, KNOWN, TREE, outputs
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from conftest import FAMILIES, VOCABULARY, tiny
from mcsd import errors, kernels
from mcsd.models import Block, BoundHead, DraftHead, TransformersModel
from mcsd.models.coarse import pack_coarsely
from mcsd.models.head import HeadConfig
from mcsd.models.loading import load, read
from mcsd.models.native import Kind, NativeHead, NativeLinear, reads_blocks
from mcsd.models.packing import fastest_form, int8_layer, pack
from mcsd.models.quantization import GROUP, Int8Linear
from mcsd.models.trimming import rows_of, trim

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no kernels for this CPU")

SHAPES = [(48, 40), (16, 32), (77, 33), (1, 1), (300, 1000)]
"""Inputs and outputs that fill the kernels' blocks and that do not."""

SHORTS = partial(NativeLinear, kind=Kind.SHORTS)


def of_halves(family: str) -> Any:
    """A model in float32 whose weights are numbers of bfloat16."""
    return tiny(family).bfloat16().float()


def check_near(found: Tensor, expected: Tensor) -> None:
    """What shorts round is some 1e-4 of a product; large random weights magnify that. One column too many or one
    position off is a tenth of a token's numbers."""
    assert ((found.double() - expected.double()).norm(dim=-1) <= 1e-2 * expected.double().norm(dim=-1)).all()


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_shorts_are_as_near_as_their_steps(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    ours = SHORTS(linear)
    weight, states = linear.weight.bfloat16().double(), torch.randn(2, 29, inputs) * torch.logspace(-3, 3, 29)[:, None]
    expected: Tensor = linear.bias.double() if bias else torch.zeros(outputs)
    error: Tensor = 2**-22 * expected.abs()
    for start in range(0, inputs, 128):
        stretch = slice(start, start + 128)
        own, kept, part = weight[:, stretch], ours.dense()[:, stretch].double(), states[..., stretch].double()
        least = torch.maximum(own.abs().sum(1) / 131000, own.abs().amax(1) / 32767)[:, None]
        step = 2 ** least.log2().floor() * 2
        # Eight bits are kept of all that are not small.
        assert torch.equal(kept[own.abs() >= 128 * step], own[own.abs() >= 128 * step])
        assert ((kept - own).abs() <= step / 2).all()
        assert ((kept / step).abs().sum(1) * 16383 < 2**31).all()
        # Half a step of each state, and of float32's last places for what is added.
        half = part.abs().amax(-1, keepdim=True) / 16383 / 2
        expected = expected + part @ kept.t()
        error = error + 1.001 * half * kept.abs().sum(1) + 2**-20 * (part.abs() @ kept.abs().t())
    assert ((ours(states).double() - expected).abs() <= error + 1e-30).all()


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("fine", [False, True])
def test_bytes_are_multiplied_as_the_library_does(inputs: int, outputs: int, fine: bool) -> None:
    """Codes are the same, but where a state is halfway between two: there it may be one step further."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs)
    ours, theirs = NativeLinear(linear, Kind.FINE_BYTES if fine else Kind.BYTES), Int8Linear(linear, fine)
    assert torch.equal(ours.dense(), theirs.dense())
    states = torch.randn(29, inputs)
    step = states.abs().amax(-1, keepdim=True) / (127 * 254 if fine else 127)
    apart = (ours(states) - theirs(states)).abs()
    assert (apart <= step * ours.dense().abs().amax(1) + 1e-5).all()
    assert apart.median() < 1e-6


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_half_bytes_are_as_near_as_their_steps_and_multiplied_as_they_are(
    inputs: int, outputs: int, bias: bool
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    linear.weight.data[:, ::7] *= 30
    linear.weight.data[-1] = 0
    ours = NativeLinear(linear, Kind.NIBBLES)
    filled = nn.functional.pad(linear.weight, (0, -inputs % GROUP)).view(outputs, -1, GROUP)
    step = (filled.amax(-1).clamp(min=0) - filled.amin(-1).clamp(max=0)) / 15
    apart = nn.functional.pad(ours.dense() - linear.weight, (0, -inputs % GROUP)).view(filled.shape).abs()
    # Half a step, and what float16 makes of a step and of the least number, which is up to 15 of them.
    assert (apart <= step[..., None] * (0.5 + 30 * 2**-11) + 2**-24).all()
    states = torch.randn(2, 29, inputs) * torch.logspace(-3, 3, 29)[:, None]
    weight, largest = ours.dense().double(), states.abs().amax(-1, keepdim=True).double()
    codes = (states.double() / largest * 127).round()
    expected = codes / 127 * largest @ weight.t() + (linear.bias.double() if bias else 0)
    # One code may be another where a state is halfway between two; sums are float32's.
    bound = largest / 127 * weight.abs().amax(1) + 2**-22 * inputs * largest * weight.abs().amax(1) + 1e-6
    assert ((ours(states).double() - expected).abs() <= bound).all()
    for row in (0, 13):
        assert torch.equal(ours(states[1, row : row + 1]), ours(states)[1, row : row + 1])
    states[0, 7] = torch.nan
    assert ours(states)[0, 7].isnan().all()
    assert ours(states)[0, 8].isfinite().all()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [((2.6, 1.34, 1.36), 1), ((2.6, 1.36, 1.34), 1), ((2.6, 1.4, 1.0), 2), ((1.0, 0.9, 0.95), 0), ((1.0, 2.0, 0.5), 2)],
)
def test_of_forms_that_take_as_long_it_is_always_the_same(
    seconds: tuple[float, ...], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that is written in it is repeatable."""
    times = iter(seconds)
    monkeypatch.setattr("mcsd.models.packing._product_seconds", lambda dtype, layer: next(times))
    forms = [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "int8")]
    assert fastest_form(CPU) == forms[expected]


def test_a_draft_that_is_loaded_has_half_bytes_and_a_target_has_not(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)

    def kinds(dtype: torch.dtype, draft: bool) -> set[Kind]:
        modules = load(tmp_path, CPU, dtype, draft).model.network.modules()
        return {module.kind for module in modules if isinstance(module, NativeLinear)}

    assert kinds(torch.bfloat16, draft=True) == {Kind.NIBBLES}
    assert Kind.NIBBLES not in kinds(torch.bfloat16, draft=False)
    assert not kinds(torch.float32, draft=True)


@pytest.mark.parametrize("trimmed", [False, True])
def test_a_draft_that_half_bytes_make_another_has_bytes(trimmed: bool, tmp_path: Path) -> None:
    """So large an output matrix makes of a few per cent of a weight another law."""
    made = tiny("llama", seed=3)
    made.get_output_embeddings().weight.data *= 1000
    made.save_pretrained(tmp_path)
    network, chosen = read(tmp_path, torch.bfloat16)[0], None
    if trimmed:
        chosen = torch.arange(0, VOCABULARY, 2)
        save_file({"vocabulary": chosen.int()}, tmp_path / "vocabulary.safetensors")
        trim(network, chosen)
    pack(network, int8_layer(fine=False))
    draft = load(tmp_path, CPU, torch.bfloat16, draft=True).model
    assert {module.kind for module in draft.network.modules() if isinstance(module, NativeLinear)} == {Kind.BYTES}
    tokens = torch.arange(20)[None]
    logits = []
    for model in (draft, TransformersModel(network, vocabulary=chosen)):
        cache = model.new_cache(1, 20)
        cache.add()
        logits.append(model.forward(tokens, Block.chain(20), cache).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("tokenizer", [None, lambda text: {"input_ids": []}, lambda text: {}])
def test_half_bytes_are_tried_without_a_tokenizer_that_knows_the_text(tokenizer: Any) -> None:
    network = tiny("llama").bfloat16()
    assert pack_coarsely(network, tokenizer)
    assert {module.kind for module in network.modules() if isinstance(module, NativeLinear)} == {Kind.NIBBLES}


def test_half_bytes_of_any_weight() -> None:
    """Transposed, zero, and larger than float16 knows: then the largest it knows, and a number in any case."""
    weight = torch.zeros(64, 64)
    weight[0, 0], weight[5, 1], weight[40] = -7e4, 1e7, 1e-9
    for each in (weight, weight.t()):
        linear = nn.Linear(64, 64, bias=False)
        linear.weight = nn.Parameter(each, requires_grad=False)
        ours = NativeLinear(linear, Kind.NIBBLES)
        assert ours.dense().isfinite().all()
        assert ours(torch.ones(1, 64)).isfinite().all()
        untouched = (each.abs() < 1).all(1)
        torch.testing.assert_close(ours.dense()[untouched], each[untouched], rtol=0, atol=2**-20)


@pytest.mark.parametrize("kind", list(Kind))
def test_rows_of_a_layer_are_a_layer(kind: Kind) -> None:
    """As drafts have it that are trimmed to some tokens."""
    whole, chosen = nn.Linear(48, 40), torch.tensor([3, 39, 7])
    states = torch.randn(5, 48)
    few = NativeLinear(rows_of(whole, chosen), kind)
    assert torch.equal(few(states), NativeLinear(whole, kind)(states)[:, chosen])
    again = NativeLinear(rows_of(NativeLinear(whole, kind), torch.arange(40)), kind)
    torch.testing.assert_close(again.dense(), NativeLinear(whole, kind).dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_token_s_result_depends_on_no_other_token_and_what_is_not_a_number_stays_in_its_row(
    dtype: torch.dtype,
) -> None:
    """Kinds of bytes have this test in ``test_quantization``."""
    torch.manual_seed(0)
    ours = SHORTS(nn.Linear(48, 40))
    states = (torch.randn(33, 48) * torch.logspace(-2, 3, 33)[:, None]).to(dtype)
    together = ours(states)
    assert together.dtype == dtype
    for i in range(33):
        assert torch.equal(ours(states[i : i + 1]), together[i : i + 1])
    states[7, 3] = torch.nan
    broken = ours(states)
    assert broken[7].isnan().all()
    assert torch.equal(broken[:7], together[:7])
    assert torch.equal(broken[8:], together[8:])


@pytest.mark.parametrize("kind", list(Kind))
def test_rows_do_not_know_how_many_they_are(kind: Kind) -> None:
    """One tile, several that share weights, and so many that they share none; and several stretches of inputs."""
    torch.manual_seed(0)
    ours = NativeLinear(nn.Linear(600, 40), kind)
    states = torch.randn(100, 600)
    together = ours(states)
    for rows in (1, 7, 12, 13, 24, 25, 48, 49):
        assert torch.equal(ours(states[17 : 17 + rows]), together[17 : 17 + rows])
    states[40, 500] = torch.nan
    broken = ours(states)
    assert broken[40].isnan().all()
    others = torch.arange(100) != 40
    assert torch.equal(broken[others], together[others])


def test_shorts_round_less_than_a_tenth_of_what_states_in_bfloat16_do() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(1536, 512, bias=False)
    ours, weight, states = SHORTS(linear), linear.weight.bfloat16(), torch.randn(29, 1536)
    assert (ours.dense() == weight).float().mean() > 0.9
    exact = states.double() @ weight.double().t()
    apart = (ours(states) - exact).norm()
    assert apart < 0.1 * (states.bfloat16().double() @ weight.double().t() - exact).norm()


def test_shorts_of_any_weight() -> None:
    """Sums that are as large as they can be, zeros, one weight among small ones; no number fails its output only."""
    linear = nn.Linear(128, 5, bias=False)
    weight = linear.weight.detach()
    weight[0] = 255 / 256
    weight[1] = torch.tensor([1.0, -1.0]).repeat(64) * 255 / 256
    weight[2] = 0
    weight[3] = 2**-12
    weight[3, 7] = 2**13
    weight[4] = 1
    weight[4, 3] = torch.inf
    ours = SHORTS(linear)
    for states in (torch.ones(2, 128), torch.tensor([1.0, -1.0]).repeat(64)[None]):
        found = ours(states)
        assert found[:, 4].isnan().all()
        expected = states.double() @ weight[:4].double().t()
        # Beside 8192 the other 127 weights of 1/4096 are less than half a step.
        assert ((found[:, :4] - expected).abs() <= 1e-6 * expected.abs() + torch.tensor([0, 0, 0, 127 / 4096])).all()


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
def test_layers_of_any_size_compute_the_same(heads: int, shared: int, size: int) -> None:
    network = odd(heads, shared, size)
    ours = deepcopy(network)
    pack(ours, SHORTS)
    for found, expected in zip(outputs(ours), outputs(network.double()), strict=True):
        check_near(found, expected)


@pytest.mark.parametrize("fine", [True, False])
@pytest.mark.parametrize("family", KNOWN)
def test_layers_in_int8_compute_what_the_library_s_do(family: str, fine: bool) -> None:
    """Up to a step of a state here and there, which is a hundredth of what rounding did to the model."""
    network = of_halves(family)
    ours, theirs = deepcopy(network), deepcopy(network)
    pack(ours, int8_layer(fine))
    pack(theirs, partial(Int8Linear, fine=fine))
    apart = sum((a - b).abs().mean() for a, b in zip(outputs(ours), outputs(theirs), strict=True))
    rounding = sum((a - b).abs().mean() for a, b in zip(outputs(network), outputs(theirs), strict=True))
    assert apart < 0.01 * rounding


def test_any_number_of_threads_gives_the_same_bits() -> None:
    """More of them than cores, rows or blocks too; a thread that did not wait for another would show."""
    network = odd(6, 2, 34)
    for kind in Kind:
        ours = deepcopy(network)
        pack(ours, partial(NativeLinear, kind=kind))
        alone = outputs(ours)
        try:
            for threads in [2, 3, 8] * 4:
                torch.set_num_threads(threads)
                assert all(torch.equal(a, b) for a, b in zip(outputs(ours), alone, strict=True))
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("family", KNOWN)
def test_transformers_runs_our_layers_too(family: str) -> None:
    """With and without a cache, with and without padding; positions are then the same for all rows."""
    network = of_halves(family)
    ours = deepcopy(network)
    pack(ours, SHORTS)
    tokens = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    whole = torch.ones_like(tokens)
    padded = whole.clone()
    padded[0, 9:] = 0
    for mask in (None, whole, padded):
        for cached in (False, True):
            found, expected = (model(tokens, attention_mask=mask, use_cache=cached).logits for model in (ours, network))
            there = (whole if mask is None else mask).bool()
            check_near(found[there], expected[there])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_keys_that_are_no_numbers_fail_who_sees_them(value: float) -> None:
    network = of_halves("llama")
    pack(network, SHORTS)
    model = TransformersModel(network)
    cache = model.new_cache(1, 8)
    cache.add()
    model.forward(torch.tensor([[5, 9]]), Block.chain(2), cache)
    cache.commit(torch.tensor([[0, 1]]), torch.tensor([2]))
    assert cache._store is not None
    cache._store[0, 0, 0, :, 1] = value
    assert model.forward(torch.tensor([[7]]), Block.chain(1), cache).logits.isnan().all()


def test_what_stands_behind_the_keys_is_not_read() -> None:
    """Nor by a token beside one whose scores are no numbers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=96, num_hidden_layers=1, sliding_window=5, max_position_embeddings=64, **sizes)
    network: Any = MistralForCausalLM(config).eval()
    pack(network, SHORTS)
    model = TransformersModel(network)
    found = []
    for broken in (False, True):
        cache = model.new_cache(1, 30)
        cache.add()
        model.forward(torch.tensor([[5, 9, 2, 3]]), Block.chain(4), cache)
        cache.commit(torch.arange(4)[None], torch.tensor([4]))
        assert cache._store is not None
        if broken:
            cache._store[:, 0, ..., 0, :] = torch.nan
            cache._store[..., 6:, :] = torch.nan
        found.append(model.forward(torch.tensor([[7, 8]]), Block.chain(2), cache).logits)
    # The first of both sees the broken key, the second no longer.
    assert found[1][0, 0].isnan().all()
    assert torch.equal(found[1][0, 1], found[0][0, 1])


def test_what_does_not_fit_is_refused_and_not_written() -> None:
    network = of_halves("llama")
    pack(network, SHORTS)
    model = TransformersModel(network)
    cache = model.new_cache(1, 2)
    cache.add()
    with pytest.raises(IndexError, match="3 slots"):
        model.forward(torch.tensor([[5, 9, 2]]), Block.chain(3), cache)
    with pytest.raises(ValueError, match="2 tokens in 1 rows"):
        model.forward(torch.tensor([[5, 9, 2]]), Block.chain(2), cache)
    with pytest.raises(ValueError, match="2 tokens in 1 rows"):
        model.forward(torch.tensor([[5, 9], [5, 9]]), Block.chain(2), cache)
    for offsets in (torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.tensor([0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match=r"offsets|positions"):
            model.forward(torch.tensor([[5, 9]]), Block(offsets, torch.ones(2, 2).bool()), cache)
    with pytest.raises(ValueError, match="48 numbers of"):
        SHORTS(nn.Linear(48, 40))(torch.ones(2, 50))
    with pytest.raises(errors.UnsupportedModel, match="inputs"):
        SHORTS(nn.Linear(2**16 + 1, 1))


def heads(monkeypatch: pytest.MonkeyPatch) -> tuple[BoundHead, BoundHead]:
    """A random head in float32 whose weights are numbers of bfloat16, in the kernels and as it is."""
    torch.manual_seed(0)
    head = DraftHead(HeadConfig("tiny", VOCABULARY, hidden_size=32, states=(0, 1, -1), layers=2, vocabulary=37))
    for parameter in head.parameters():
        parameter.data.normal_(0, 0.3) if parameter.dim() > 1 else parameter.data.uniform_(0.5, 1.5)
    head = head.bfloat16().float()
    target = TransformersModel(of_halves("llama"))
    plain = BoundHead(deepcopy(head), target, "head")
    monkeypatch.setattr("mcsd.models.head.layer_for", lambda *_, **__: SHORTS)
    return BoundHead(head, target, "head"), plain


def drafted(head: BoundHead) -> list[Tensor]:
    """What a head gives: of the target's states and its own, in rows of different lengths, level by level."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 96, (2, 10), generator=generator)
    states, own = torch.randn(2, 6, 96, generator=generator), torch.randn(2, 4, 32, generator=generator)
    cache = head.new_cache(2, 12)
    for _ in range(2):
        cache.add()
    outputs = [head.forward(tokens[:, :6], states.to(head.dtype), Block.chain(6), cache)]
    cache.commit(torch.arange(6).expand(2, -1), torch.tensor([6, 4]))
    for block, these in ((Block.chain(2), slice(0, 2)), (BELOW, slice(2, 4))):
        outputs.append(head.forward(tokens[:, 6:][:, these], own[:, these].to(head.dtype), block, cache, own=True))
    again, second = states[1:, :2].to(head.dtype), slice(1, 2)
    outputs.append(head.forward(tokens[1:, :2], again, Block.chain(2), cache, rows=second, logits=False))
    assert outputs[-1].logits.shape == (1, 0, 37)
    return [part for output in outputs for part in (output.logits, output.hidden) if part is not None]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_head_computes_the_same(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call and, as of many tokens, not."""
    ours, plain = heads(monkeypatch)
    assert isinstance(ours._native, NativeHead)
    if not at_once:
        monkeypatch.setattr("mcsd.models.head.MOST_TOKENS", 0)
    for found, expected in zip(drafted(ours), drafted(plain), strict=True):
        check_near(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(Kind))
def test_a_head_of_any_kind_and_number_of_threads(
    kind: Kind, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As good as layer by layer, where states are rounded once more; and the same bits from any number of threads."""
    network = of_halves("llama").to(dtype)
    torch.manual_seed(0)
    head = DraftHead(HeadConfig("tiny", VOCABULARY, hidden_size=32, states=(0, 1, -1), layers=2, vocabulary=37))
    monkeypatch.setattr("mcsd.models.head.layer_for", lambda *_, **__: partial(NativeLinear, kind=kind))
    ours = BoundHead(head, TransformersModel(network), "head")
    alone = drafted(ours)
    try:
        for threads in [2, 3, 8] * 2:
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(drafted(ours), alone, strict=True))
    finally:
        torch.set_num_threads(1)
    monkeypatch.setattr("mcsd.models.head.MOST_TOKENS", 0)
    for found, expected in zip(alone, drafted(ours), strict=True):
        apart = (found - expected).float().norm() / expected.float().norm().clamp(min=1e-9)
        assert apart < (1e-2 if dtype == torch.float32 else 5e-2)


def test_what_does_not_fit_a_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    head, _ = heads(monkeypatch)
    cache = head.new_cache(1, 2)
    cache.add()
    tokens, states = torch.tensor([[5, 9, 2]]), torch.zeros(1, 3, 96)
    with pytest.raises(IndexError, match="3 slots"):
        head.forward(tokens, states, Block.chain(3), cache)
    for wrong, own in ((states, True), (states[..., :50], False), (states[:, :1], False)):
        with pytest.raises(ValueError, match="numbers of"):
            head.forward(tokens[:, :2], wrong, Block.chain(2), cache, own=own)


def test_layers_of_several_kinds_and_the_end_of_the_context() -> None:
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
    ours = deepcopy(network)
    pack(ours, SHORTS)
    assert reads_blocks(ours, 20)
    found: list[list[Tensor]] = []
    tokens = torch.randint(0, 96, (2, 11 + len(TREE) + 1), generator=torch.Generator().manual_seed(1))
    for one in (ours, network.double()):
        model = TransformersModel(one)
        cache = model.new_cache(2, 30)
        for _ in range(2):
            cache.add()
        read = model.forward(tokens[:, :11], Block.chain(11), cache)
        cache.commit(torch.arange(11).expand(2, -1), torch.tensor([11, 7]))
        found.append([read.logits, model.forward(tokens[:, 11:], Block.tree(TREE), cache).logits])
    for part, expected in zip(*found, strict=True):
        check_near(part, expected)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("family", KNOWN)
def test_layers_compute_the_same(family: str, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of different lengths, trees, windows; in one call and, as many tokens are, in halves around attentions."""
    if not at_once:
        monkeypatch.setattr("mcsd.models.native.layers.MOST_TOKENS", 0)
    network = of_halves(family)
    ours = deepcopy(network)
    pack(ours, SHORTS)
    assert all("forward" in vars(part) for part in (ours.model, *ours.model.layers))
    for found, expected in zip(outputs(ours), outputs(network.double()), strict=True):
        check_near(found, expected)


@pytest.mark.parametrize("family", KNOWN)
def test_in_bfloat16_layers_are_nearer_to_the_exact_law_than_transformers_are(family: str) -> None:
    network = of_halves(family)
    exact = outputs(deepcopy(network).double())
    theirs = network.bfloat16()
    ours = deepcopy(theirs)
    pack(ours, SHORTS)

    def away(found: list[Tensor]) -> float:
        return sum(float((one.double() - other).square().sum()) for one, other in zip(found, exact, strict=True))

    assert away(outputs(ours)) < away(outputs(theirs))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(KNOWN)))
def test_layers_of_other_kinds_have_our_products_only(family: str) -> None:
    network = of_halves(family)
    ours = deepcopy(network)
    pack(ours, SHORTS)
    assert any(isinstance(module, NativeLinear) for module in ours.modules())
    for found, expected in zip(outputs(ours), outputs(network), strict=True):
        check_near(found, expected)


@pytest.mark.parametrize("family", KNOWN)
def test_a_layer_s_token_depends_on_no_other_row(family: str) -> None:
    """To the last bit, and one row that is no number leaves the others what they are."""
    network = of_halves(family)
    pack(network, SHORTS)
    model = TransformersModel(network)
    prompts = torch.randint(0, 96, (7, 9), generator=torch.Generator().manual_seed(1))
    tree = Block.chain(3)

    def run(rows: Tensor, poison: int | None = None) -> Tensor:
        cache = model.new_cache(len(rows), 16)
        for _ in rows:
            cache.add()
        model.forward(rows[:, :6], Block.chain(6), cache)
        cache.commit(torch.arange(6).expand(len(rows), -1), torch.full((len(rows),), 6))
        if poison is not None:
            assert cache._store is not None
            cache._store[0, :, poison, :, 2] = torch.nan
        return model.forward(rows[:, 6:], tree, cache).logits

    together = run(prompts)
    for i in range(7):
        assert torch.equal(run(prompts[i : i + 1])[0], together[i])
    broken = run(prompts, poison=3)
    assert broken[3].isnan().all()
    assert torch.equal(broken[[0, 1, 2, 4, 5, 6]], together[[0, 1, 2, 4, 5, 6]])


def test_a_prompt_longer_than_goes_through_a_layer_at_once() -> None:
    network = of_halves("llama")
    ours = deepcopy(network)
    pack(ours, SHORTS)
    tokens = torch.randint(0, 96, (2, 250), generator=torch.Generator().manual_seed(1))
    found = []
    for one in (ours, network):
        model = TransformersModel(one)
        cache = model.new_cache(2, 256)
        for _ in range(2):
            cache.add()
        found.append(model.forward(tokens, Block.chain(250), cache).logits)
    check_near(*found)
