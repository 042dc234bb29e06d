"""Int8 layers: what they compute, and that a token's result depends on no other token."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

import mcsd
from mcsd import kernels
from mcsd.cpu.native_linear import NativeLinear
from mcsd.cpu.onednn_linear import Int8Linear
from mcsd.cpu.packed_linear import PackedLinear
from mcsd.cpu.packing import pack
from mcsd.cpu.weight_plan import Role, has_int8_gemm, plan_weights
from mcsd.kernels.gemm import WeightFormat
from mcsd.models import TransformersModel
from mcsd.models.draft_vocabulary import dense_weight
from support.tiny import FAMILIES, tiny

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not has_int8_gemm(CPU), reason="this CPU has no fast int8 products")

Made = Callable[[nn.Linear, bool], PackedLinear]


def in_our_kernels(linear: nn.Linear, fine: bool) -> PackedLinear:
    return NativeLinear.packed(linear, WeightFormat.W8A16 if fine else WeightFormat.W8A8)


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
    plan = plan_weights(CPU, torch.float32, Role.TARGET, "int8")
    pack(target, plan, lambda name, linear: made(linear, True))
    pack(draft, plan, lambda name, linear: made(linear, False))
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
        return model.forward(tokens, mcsd.models.TokenLayout.chain(3), cache).logits.softmax(-1)

    before = law()
    torch.testing.assert_close(before, network(tokens).logits.softmax(-1))
    pack(network, plan_weights(CPU, torch.float32, Role.TARGET, "int8"))
    after = law()
    assert not torch.equal(before, after)
    assert (before - after).abs().sum(-1).max() < 0.1
