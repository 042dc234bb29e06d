"""The kernel for linear layers on bfloat16 weights as they are."""

import pytest
import torch
from torch import Tensor, nn

from mcsd import kernels
from mcsd.kernels.bf16_linear import MAX_TOKENS

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no kernels for this CPU")

SHAPES = [(1, 1), (7, 3), (32, 4), (33, 5), (896, 130), (4864, 97)]
"""Inputs and outputs: whole vectors and tiles, and parts of them."""


def layer(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(inputs)
    made = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    return made[0].bfloat16(), made[1].bfloat16()


def tokens_of(count: int, inputs: int) -> Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(count)).bfloat16()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_result_is_the_exact_product_rounded_to_bfloat16(shape: tuple[int, int], biased: bool) -> None:
    weight, bias = layer(*shape)
    for count in range(1, MAX_TOKENS + 1):
        x = tokens_of(count, shape[0])
        found = kernels.bf16_linear(x[None], weight, bias if biased else None)
        terms = x.double()[:, None] * weight.double()
        exact = terms.sum(-1) + (bias.double() if biased else 0)
        # Half a unit in the last of 8 bits, and one in the last of float32's 24 for each sum.
        allowed = exact.abs() * 2**-8 + (terms.abs().sum(-1) + 1) * shape[0] * 2**-24
        assert found.shape == (1, count, shape[1])
        assert ((found[0].double() - exact).abs() <= allowed).all()


def test_the_result_of_a_token_depends_neither_on_others_nor_on_threads() -> None:
    weight, bias = layer(896, 130)
    x = tokens_of(MAX_TOKENS, 896)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([kernels.bf16_linear(x[i : i + 1], weight, bias) for i in range(len(x))])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for count in range(1, MAX_TOKENS + 1):
                assert torch.equal(kernels.bf16_linear(x[:count], weight, bias), alone[:count])
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finite_stays_so_in_its_own_outputs_only() -> None:
    weight, _ = layer(33, 5)
    x = tokens_of(3, 33)
    x[1, 32] = torch.nan
    weight[4, 2] = torch.inf
    found = kernels.bf16_linear(x, weight, None)
    assert found[1].isnan().all()
    assert found[[0, 2], 4].isinf().all()
    assert found[[0, 2], :4].isfinite().all()


class Subclass(Tensor):
    """Of a library that keeps its weights otherwise."""


@torch.no_grad()
def test_other_tensors_are_left_to_pytorch() -> None:
    weight, bias = layer(32, 4)
    x = tokens_of(2, 32)
    assert kernels.bf16_linear_supported(x, weight, bias)
    assert kernels.bf16_linear_supported(x, nn.Parameter(weight), None)
    others = [
        (x.float(), weight, bias),
        (x, weight.float(), bias),
        (x, weight, bias.float()),
        (x, weight.as_subclass(Subclass), bias),
        (x, tokens_of(32, 4).t(), bias),
        (x, weight, bias[:3]),
        (x[:, :16], weight, bias),
        (x[:0], weight, bias),
        (tokens_of(MAX_TOKENS + 1, 32), weight, bias),
        (x.to("meta"), weight, bias),
    ]
    assert not any(kernels.bf16_linear_supported(*each) for each in others)
    with torch.enable_grad():
        assert not kernels.bf16_linear_supported(x, weight, bias)
