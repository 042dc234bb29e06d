"""Linear layers on the matrices of GGUF files: the file's own weights, products nearly exact, every token by itself."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from torch import Tensor

from mcsd import kernels
from mcsd.cpu.gguf_linear import GgufEmbedding, GgufLinear, GgufTensor
from mcsd.models.draft_vocabulary import output_rows
from support.gguf_files import TYPES, random_blocks

pytestmark = pytest.mark.skipif(not kernels.has_kernels(), reason="no kernels for this CPU")

SMALL = [kind for kind in TYPES if not kind.name.endswith("K")]
SHAPES = [(kind, inputs, outputs) for kind in TYPES for inputs, outputs in ((256, 40), (1536, 17), (768, 1))]
SHAPES += [(kind, inputs, 33) for kind in SMALL for inputs in (32, 96, 576)]
"""Inputs that fill the chunks of 256 and, where the type allows it, that do not; outputs of whole tasks and less."""


def matrix(kind: Type, outputs: int, inputs: int, rope_size: int = 0, seed: int = 0) -> GgufTensor:
    blocks = random_blocks(kind, outputs, inputs, np.random.default_rng(seed))
    return GgufTensor(torch.from_numpy(blocks), int(kind), outputs, inputs, rope_size)


def exact(tensor: GgufTensor) -> Tensor:
    """The weights in float64, by the gguf package; rows in the order of the file."""
    return torch.from_numpy(dequantize(tensor.data.numpy(), Type(tensor.type))).double()


def quantized_to_q8_k(states: Tensor) -> Tensor:
    """Activations as llama.cpp rounds them for these types, at best: int8 with a scale for each 32 inputs."""
    groups = states.double().unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale).round() * scale).flatten(-2)


@pytest.mark.parametrize(("kind", "inputs", "outputs"), SHAPES)
def test_weights_are_those_of_the_file(kind: Type, inputs: int, outputs: int) -> None:
    tensor = matrix(kind, outputs, inputs)
    # Products with the minimum are rounded once less than in the package.
    torch.testing.assert_close(tensor.dense().double(), exact(tensor), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("kind", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_within_the_rounding_of_activations(kind: Type, inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    tensor = matrix(kind, outputs, inputs)
    shift = torch.randn(outputs) if bias else None
    states = torch.randn(2, 29, inputs) * torch.logspace(-3, 3, 29)[:, None]
    found, weight = GgufLinear([tensor], shift)(states).double(), exact(tensor)
    expected = states.double() @ weight.t() + (0 if shift is None else shift.double())
    bound = torch.zeros_like(expected)
    for start in range(0, inputs, 256):
        part, own = states[..., start : start + 256].double(), weight[:, start : start + 256]
        # Half a step of each activation, and the rounding of float32 sums of the weights' two parts.
        bound += part.abs().amax(-1, keepdim=True) / 16383 / 2 * own.abs().sum(1) * 1.001
        bound += 2**-20 * part.abs().sum(-1, keepdim=True) * own.abs().amax()
    assert ((found - expected).abs() <= bound + 2**-20 * expected.abs()).all()


@pytest.mark.parametrize("kind", TYPES)
def test_the_error_is_far_below_that_of_int8_activations(kind: Type) -> None:
    torch.manual_seed(0)
    tensor = matrix(kind, 64, 1536)
    states, weight = torch.randn(29, 1536), exact(tensor)
    expected = states.double() @ weight.t()
    ours = (GgufLinear([tensor], None)(states).double() - expected).norm(dim=-1)
    theirs = (quantized_to_q8_k(states) @ weight.t() - expected).norm(dim=-1)
    assert (ours < theirs / 20).all()


@pytest.mark.parametrize("kind", TYPES)
def test_a_token_does_not_depend_on_the_others(kind: Type) -> None:
    torch.manual_seed(0)
    linear, states = GgufLinear([matrix(kind, 50, 768)], None), torch.randn(41, 768)
    together = linear(states)
    states[7] = torch.nan
    states[8, 3] = torch.inf
    assert torch.equal(linear(states)[9:], together[9:])
    assert linear(states)[7].isnan().all()
    for start, stop in pairwise([9, 10, 12, 15, 20, 41]):
        assert torch.equal(linear(states[start:stop]), together[start:stop])


def test_matrices_of_several_types_are_one_layer() -> None:
    torch.manual_seed(0)
    tensors = [matrix(kind, 19 + i, 512, seed=i) for i, kind in enumerate(TYPES)]
    bias, states = torch.randn(sum(one.outputs for one in tensors)), torch.randn(5, 512)
    expected = torch.cat([GgufLinear([one], None)(states) for one in tensors], dim=-1) + bias
    torch.testing.assert_close(GgufLinear(tensors, bias)(states), expected)


def test_rows_of_rotated_pairs_are_put_in_the_order_of_the_network() -> None:
    """As transformers does it: rows [heads, size / 2, 2] of the file are rows [heads, 2, size / 2] of the network."""
    torch.manual_seed(0)
    tensor = matrix(Type.Q4_K, 3 * 16, 256, rope_size=16)
    expected = exact(tensor).view(3, 8, 2, 256).transpose(1, 2).flatten(0, 2)
    linear = GgufLinear([tensor], None)
    torch.testing.assert_close(linear.dense().double(), expected, rtol=1e-6, atol=1e-8)
    states = torch.randn(4, 256)
    torch.testing.assert_close(linear(states).double(), states.double() @ expected.t(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_and_rows_of_the_output_matrix(dtype: torch.dtype) -> None:
    tensor = matrix(Type.Q6_K, 90, 256)
    chosen = torch.tensor([[3, 89], [0, 3]])
    assert torch.equal(GgufEmbedding(tensor, dtype)(chosen), tensor.dense()[chosen].to(dtype))
    assert torch.equal(output_rows(GgufLinear([tensor], None), chosen[0]).weight, tensor.dense()[chosen[0]])


def test_activations_in_bfloat16() -> None:
    torch.manual_seed(0)
    linear, states = GgufLinear([matrix(Type.Q5_K, 30, 256)], torch.randn(30)), torch.randn(3, 256).bfloat16()
    assert torch.equal(linear(states), linear(states.float()).bfloat16())
