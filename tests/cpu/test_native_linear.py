"""Linear layers in our kernels: products within the rounding bound of each format, every token by itself."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mcsd import errors, kernels
from mcsd.cpu.native_linear import NativeLinear
from mcsd.cpu.onednn_linear import Int8Linear
from mcsd.cpu.quantization import GROUP
from mcsd.kernels import WeightFormat
from mcsd.models.draft_vocabulary import output_rows
from support.decoders import PACKED_FORMATS

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no kernels for this CPU")

SHAPES = [(48, 40), (16, 32), (77, 33), (1, 1), (300, 1000)]
"""Inputs and outputs that fill the kernels' blocks and groups, and that do not."""

BFP16 = partial(NativeLinear.packed, format=WeightFormat.BFP16)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_bfp16_is_within_its_rounding_bound(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    ours = BFP16(linear)
    weight, states = linear.weight.bfloat16().double(), torch.randn(2, 29, inputs) * torch.logspace(-3, 3, 29)[:, None]
    expected: Tensor = linear.bias.double() if bias else torch.zeros(outputs)
    error: Tensor = 2**-22 * expected.abs()
    for start in range(0, inputs, 128):
        group = slice(start, start + 128)
        own, kept, part = weight[:, group], ours.dense()[:, group].double(), states[..., group].double()
        least = torch.maximum(own.abs().sum(1) / 131000, own.abs().amax(1) / 32767)[:, None]
        scale = 2 ** least.log2().floor() * 2
        # All weights that are not small keep their eight bits.
        assert torch.equal(kept[own.abs() >= 128 * scale], own[own.abs() >= 128 * scale])
        assert ((kept - own).abs() <= scale / 2).all()
        assert ((kept / scale).abs().sum(1) * 16383 < 2**31).all()
        # Half the scale of each activation, and the rounding of float32 sums.
        half = part.abs().amax(-1, keepdim=True) / 16383 / 2
        expected = expected + part @ kept.t()
        error = error + 1.001 * half * kept.abs().sum(1) + 2**-20 * (part.abs() @ kept.abs().t())
    assert ((ours(states).double() - expected).abs() <= error + 1e-30).all()


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("fine", [False, True])
def test_int8_products_are_those_of_onednn(inputs: int, outputs: int, fine: bool) -> None:
    """Quantized values are the same, but an activation halfway between two may be rounded either way."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs)
    ours, theirs = (
        NativeLinear.packed(linear, WeightFormat.W8A16 if fine else WeightFormat.W8A8),
        Int8Linear(linear, fine),
    )
    assert torch.equal(ours.dense(), theirs.dense())
    states = torch.randn(29, inputs)
    scale = states.abs().amax(-1, keepdim=True) / (127 * 254 if fine else 127)
    difference = (ours(states) - theirs(states)).abs()
    assert (difference <= scale * ours.dense().abs().amax(1) + 1e-5).all()
    assert difference.median() < 1e-6


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_int4_weights_and_products_are_within_their_rounding_bounds(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    linear.weight.data[:, ::7] *= 30
    linear.weight.data[-1] = 0
    ours = NativeLinear.packed(linear, WeightFormat.W4A8)
    filled = nn.functional.pad(linear.weight, (0, -inputs % GROUP)).view(outputs, -1, GROUP)
    scale = (filled.amax(-1).clamp(min=0) - filled.amin(-1).clamp(max=0)) / 15
    apart = nn.functional.pad(ours.dense() - linear.weight, (0, -inputs % GROUP)).view(filled.shape).abs()
    # Half a scale, and the rounding to float16 of the scale and the minimum, which is up to 15 scales.
    assert (apart <= scale[..., None] * (0.5 + 30 * 2**-11) + 2**-24).all()
    states = torch.randn(2, 29, inputs) * torch.logspace(-3, 3, 29)[:, None]
    weight, largest = ours.dense().double(), states.abs().amax(-1, keepdim=True).double()
    quantized = (states.double() / largest * 127).round()
    expected = quantized / 127 * largest @ weight.t() + (linear.bias.double() if bias else 0)
    # An activation halfway between two quantized values may be rounded either way; sums are in float32.
    bound = largest / 127 * weight.abs().amax(1) + 2**-22 * inputs * largest * weight.abs().amax(1) + 1e-6
    assert ((ours(states).double() - expected).abs() <= bound).all()
    for row in (0, 13):
        assert torch.equal(ours(states[1, row : row + 1]), ours(states)[1, row : row + 1])
    states[0, 7] = torch.nan
    assert ours(states)[0, 7].isnan().all()
    assert ours(states)[0, 8].isfinite().all()


def test_int4_of_any_weight() -> None:
    """Transposed, zero, and beyond the range of float16: it saturates, and results are finite."""
    weight = torch.zeros(64, 64)
    weight[0, 0], weight[5, 1], weight[40] = -7e4, 1e7, 1e-9
    for each in (weight, weight.t()):
        linear = nn.Linear(64, 64, bias=False)
        linear.weight = nn.Parameter(each, requires_grad=False)
        ours = NativeLinear.packed(linear, WeightFormat.W4A8)
        assert ours.dense().isfinite().all()
        assert ours(torch.ones(1, 64)).isfinite().all()
        untouched = (each.abs() < 1).all(1)
        torch.testing.assert_close(ours.dense()[untouched], each[untouched], rtol=0, atol=2**-20)


@pytest.mark.parametrize("weight_format", PACKED_FORMATS)
def test_selected_outputs_of_a_layer_are_a_layer(weight_format: WeightFormat) -> None:
    """As in drafts with a draft vocabulary."""
    whole, chosen = nn.Linear(48, 40), torch.tensor([3, 39, 7])
    states = torch.randn(5, 48)
    few = NativeLinear.packed(output_rows(whole, chosen), weight_format)
    assert torch.equal(few(states), NativeLinear.packed(whole, weight_format)(states)[:, chosen])
    again = NativeLinear.packed(output_rows(NativeLinear.packed(whole, weight_format), torch.arange(40)), weight_format)
    torch.testing.assert_close(again.dense(), NativeLinear.packed(whole, weight_format).dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_token_s_result_depends_on_no_other_token_and_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    """The int8 formats have this test in ``test_quantization``."""
    torch.manual_seed(0)
    ours = BFP16(nn.Linear(48, 40))
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


@pytest.mark.parametrize("weight_format", PACKED_FORMATS)
def test_a_token_s_result_does_not_depend_on_the_batch_size(weight_format: WeightFormat) -> None:
    """One tile, several that share weights, and too many to share; and several slices of inputs."""
    torch.manual_seed(0)
    ours = NativeLinear.packed(nn.Linear(600, 40), weight_format)
    states = torch.randn(100, 600)
    together = ours(states)
    for rows in (1, 7, 12, 13, 24, 25, 48, 49):
        assert torch.equal(ours(states[17 : 17 + rows]), together[17 : 17 + rows])
    states[40, 500] = torch.nan
    broken = ours(states)
    assert broken[40].isnan().all()
    others = torch.arange(100) != 40
    assert torch.equal(broken[others], together[others])


def test_bfp16_rounds_less_than_a_tenth_of_bf16_activations() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(1536, 512, bias=False)
    ours, weight, states = BFP16(linear), linear.weight.bfloat16(), torch.randn(29, 1536)
    assert (ours.dense() == weight).float().mean() > 0.9
    exact = states.double() @ weight.double().t()
    apart = (ours(states) - exact).norm()
    assert apart < 0.1 * (states.bfloat16().double() @ weight.double().t() - exact).norm()


def test_bfp16_of_any_weight() -> None:
    """The largest sums, zeros, one large weight among small ones; infinity makes only its own output NaN."""
    linear = nn.Linear(128, 5, bias=False)
    weight = linear.weight.detach()
    weight[0] = 255 / 256
    weight[1] = torch.tensor([1.0, -1.0]).repeat(64) * 255 / 256
    weight[2] = 0
    weight[3] = 2**-12
    weight[3, 7] = 2**13
    weight[4] = 1
    weight[4, 3] = torch.inf
    ours = BFP16(linear)
    for states in (torch.ones(2, 128), torch.tensor([1.0, -1.0]).repeat(64)[None]):
        found = ours(states)
        assert found[:, 4].isnan().all()
        expected = states.double() @ weight[:4].double().t()
        # Beside 8192 the other 127 weights of 1/4096 are less than half the scale.
        assert ((found[:, :4] - expected).abs() <= 1e-6 * expected.abs() + torch.tensor([0, 0, 0, 127 / 4096])).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="48 numbers of"):
        BFP16(nn.Linear(48, 40))(torch.ones(2, 50))
    with pytest.raises(errors.UnsupportedModel, match="inputs"):
        BFP16(nn.Linear(2**16 + 1, 1))
