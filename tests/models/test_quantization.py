"""Int8 layers: what they compute, and that a token's result depends on no other token."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

import mcsd
from conftest import FAMILIES, tiny
from mcsd import errors, kernels
from mcsd.models import TransformersModel
from mcsd.models.native import Kind, NativeLinear
from mcsd.models.packing import dense_weight, int8_layer, layer_for, pack
from mcsd.models.product import Product
from mcsd.models.quantization import Int8Linear, check_quantize, quantizable

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not quantizable(CPU), reason="this CPU does not multiply bytes")

Made = Callable[[nn.Linear, bool], Product]


def in_our_kernels(linear: nn.Linear, fine: bool) -> Product:
    return NativeLinear(linear, Kind.FINE_BYTES if fine else Kind.BYTES)


@pytest.fixture(
    params=[
        Int8Linear,
        pytest.param(
            in_our_kernels, marks=pytest.mark.skipif(not kernels.available(), reason="no kernels for this CPU")
        ),
    ],
    ids=["library", "native"],
)
def made(request: pytest.FixtureRequest) -> Made:
    """A linear layer in int8, by a library's kernels or by ours."""
    found: Made = request.param
    return found


def layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 40, bias=bias).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("fine", "steps"), [(False, 127), (True, 127 * 254)])
def test_it_is_the_product_of_rounded_numbers(made: Made, bias: bool, fine: bool, steps: int) -> None:
    """Off from the product with the same weights by no more than half a step of each state allows."""
    linear = layer(bias)
    rounded = made(linear, fine)
    states = torch.randn(2, 7, 48) * torch.logspace(-3, 3, 7)[:, None]
    weight = dense_weight(rounded).double()
    expected = states.double() @ weight.t() + (linear.bias.double() if bias else 0)
    error = (rounded(states).double() - expected).abs()
    half = states.abs().amax(-1, keepdim=True).double() / steps / 2
    # Beside it the float32 of the sums.
    assert (error <= half * weight.abs().sum(1) + 1e-6 * (expected.abs() + states.abs().sum(-1, keepdim=True))).all()
    assert (error > 0.02 * half * weight.abs().sum(1)).any()


def test_weights_are_rounded_to_the_nearest_of_255_steps(made: Made) -> None:
    linear = layer()
    error = (dense_weight(made(linear, False)) - linear.weight).abs()
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    assert (error <= step * 0.5001).all()
    assert error.max() > 0


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_s_result_depends_on_no_other_token(made: Made, dtype: torch.dtype, fine: bool) -> None:
    rounded = made(layer(dtype=dtype), fine)
    states = (torch.randn(33, 48) * torch.logspace(-2, 3, 33)[:, None]).to(dtype)
    together = rounded(states)
    assert together.dtype == dtype
    for i in range(33):
        assert torch.equal(rounded(states[i : i + 1]), together[i : i + 1])
    assert torch.equal(rounded(states.flip(0)).flip(0), together)


@pytest.mark.parametrize("fine", [False, True])
def test_what_is_not_a_number_stays_in_its_row_and_zeros_give_the_bias(made: Made, fine: bool) -> None:
    linear = layer()
    rounded = made(linear, fine)
    states = torch.randn(4, 48)
    alone = rounded(states)
    states[1, 3] = torch.nan
    states[2] = 0.0
    broken = rounded(states)
    assert broken[1].isnan().all()
    assert torch.equal(broken[2], linear.bias)
    assert torch.equal(broken[[0, 3]], alone[[0, 3]])


@pytest.mark.parametrize("fine", [False, True])
def test_no_rows_give_no_rows(made: Made, fine: bool) -> None:
    assert made(layer(), fine)(torch.zeros(2, 0, 48)).shape == (2, 0, 40)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_trees_and_plain_decoding_say_the_same(made: Made, family: str) -> None:
    """At temperature 0, with a quantized target and a quantized draft that is often wrong."""
    target, draft = deepcopy(tiny(family)), deepcopy(tiny(family, seed=1))
    pack(target, lambda linear: made(linear, True))
    pack(draft, lambda linear: made(linear, False))
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
    params = mcsd.SamplingParams(temperature=0, max_new_tokens=30)
    texts = [
        [done.token_ids for done in mcsd.Engine(target, draft, tree=tree, max_batch=batch).generate(prompts, params)]
        for tree, batch in [("none", 1), ("2x2x1", 1), ("4x2", 3)]
    ]
    assert texts[0] == texts[1] == texts[2]


def test_a_quantized_law_is_near_the_law_before() -> None:
    """How far they may be apart is measured on real weights (docs/precision.md); here that the layers are in use."""
    network = deepcopy(tiny("qwen2"))
    tokens = torch.tensor([[3, 1, 4]])

    def law() -> torch.Tensor:
        model = TransformersModel(network)
        cache = model.new_cache(1, 8)
        cache.add()
        return model.forward(tokens, mcsd.models.Block.chain(3), cache).logits.softmax(-1)

    before = law()
    torch.testing.assert_close(before, network(tokens).logits.softmax(-1))
    pack(network, int8_layer(fine=True))
    after = law()
    assert not torch.equal(before, after)
    assert (before - after).abs().sum(-1).max() < 0.1


def test_drafts_in_bfloat16_are_quantized_and_targets_only_if_asked() -> None:
    linear = layer(dtype=torch.bfloat16)

    def bytes_of(dtype: torch.dtype, draft: bool, quantize: str | None) -> int:
        """Of a state that is multiplied in int8; 0 where it is not."""
        found = layer_for(CPU, dtype, draft, quantize)
        one = found(linear) if found else linear
        if isinstance(one, NativeLinear):
            return {Kind.BYTES: 1, Kind.FINE_BYTES: 2, Kind.SHORTS: 0, Kind.NIBBLES: 1}[one.kind]
        return 1 + one.fine if isinstance(one, Int8Linear) else 0

    assert bytes_of(torch.bfloat16, True, None) == 1
    assert bytes_of(torch.bfloat16, False, "int8") == 2
    assert bytes_of(torch.float32, True, "int8") == 1
    assert bytes_of(torch.bfloat16, False, None) == 0
    assert bytes_of(torch.float32, True, None) == 0


def test_a_machine_that_cannot_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    check_quantize("int8", CPU)
    monkeypatch.setattr("mcsd.models.quantization.quantizable", lambda device: False)
    check_quantize(None, CPU)
    with pytest.raises(errors.InvalidOption, match="AVX-512 VNNI"):
        check_quantize("int8", CPU)
