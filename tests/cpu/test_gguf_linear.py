"""Linear layers on the matrices of GGUF files: the file's own weights, activations in int8, every token by itself."""

from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from torch import Tensor

from mcsd import errors, kernels
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


def rounded(activations: Tensor, group: int) -> Tensor:
    """Activations in int8 with a scale for each group of inputs: ours have 32, llama.cpp's Q8_K has 256."""
    groups = activations.double().unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale).round() * scale).flatten(-2)


@pytest.mark.parametrize(("kind", "inputs", "outputs"), SHAPES)
def test_weights_are_those_of_the_file(kind: Type, inputs: int, outputs: int) -> None:
    tensor = matrix(kind, outputs, inputs)
    # Products with the minimum are rounded once less than in the package.
    torch.testing.assert_close(tensor.packed().dense().double(), exact(tensor), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("kind", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_within_the_rounding_of_activations(kind: Type, inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    tensor = matrix(kind, outputs, inputs)
    shift = torch.randn(outputs) if bias else None
    activations = torch.randn(2, 29, inputs) * torch.logspace(-3, 3, 29)[:, None]
    found, weight = GgufLinear([tensor.packed()], shift)(activations).double(), exact(tensor)
    expected = activations.double() @ weight.t() + (0 if shift is None else shift.double())
    bound = torch.zeros_like(expected)
    for start in range(0, inputs, 32):
        part, own = activations[..., start : start + 32].double(), weight[:, start : start + 32]
        # Half a step of each activation, and the rounding of float32 sums of the weights' two parts.
        bound += part.abs().amax(-1, keepdim=True) / 127 / 2 * own.abs().sum(1) * 1.001
        bound += 2**-20 * part.abs().sum(-1, keepdim=True) * own.abs().amax()
    assert ((found - expected).abs() <= bound + 2**-20 * expected.abs()).all()


@pytest.mark.parametrize("kind", TYPES)
def test_the_error_is_that_of_int8_activations_in_groups_of_32(kind: Type) -> None:
    """It is below that of llama.cpp's groups of 256."""
    torch.manual_seed(0)
    tensor = matrix(kind, 64, 1536)
    activations, weight = torch.randn(29, 1536), exact(tensor)
    expected = activations.double() @ weight.t()
    found = GgufLinear([tensor.packed()], None)(activations).double()
    torch.testing.assert_close(found, rounded(activations, 32) @ weight.t(), rtol=1e-5, atol=1e-5 * expected.std())
    theirs = rounded(activations, 256) @ weight.t() - expected
    assert (found - expected).norm() < theirs.norm()


@pytest.mark.parametrize("kind", TYPES)
def test_a_token_does_not_depend_on_the_others(kind: Type) -> None:
    torch.manual_seed(0)
    linear, activations = GgufLinear([matrix(kind, 50, 768).packed()], None), torch.randn(41, 768)
    together = linear(activations)
    activations[7] = torch.nan
    activations[8, 3] = torch.inf
    assert torch.equal(linear(activations)[9:], together[9:])
    assert linear(activations)[7].isnan().all()
    for start, stop in pairwise([9, 10, 12, 15, 20, 41]):
        assert torch.equal(linear(activations[start:stop]), together[start:stop])


def test_matrices_of_several_types_are_one_layer() -> None:
    torch.manual_seed(0)
    tensors = [matrix(kind, 19 + i, 512, seed=i) for i, kind in enumerate(TYPES)]
    bias, activations = torch.randn(sum(one.outputs for one in tensors)), torch.randn(5, 512)
    expected = torch.cat([GgufLinear([one.packed()], None)(activations) for one in tensors], dim=-1) + bias
    torch.testing.assert_close(GgufLinear([one.packed() for one in tensors], bias)(activations), expected)


def test_rows_of_rotated_pairs_are_put_in_the_order_of_the_network() -> None:
    """As transformers does it: rows [heads, size / 2, 2] of the file are rows [heads, 2, size / 2] of the network."""
    torch.manual_seed(0)
    tensor = matrix(Type.Q4_K, 3 * 16, 256, rope_size=16)
    expected = exact(tensor).view(3, 8, 2, 256).transpose(1, 2).flatten(0, 2)
    linear = GgufLinear([tensor.packed()], None)
    torch.testing.assert_close(linear.dense().double(), expected, rtol=1e-6, atol=1e-8)
    activations = torch.randn(4, 256)
    torch.testing.assert_close(
        linear(activations).double(), rounded(activations, 32) @ expected.t(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_and_rows_of_the_output_matrix(dtype: torch.dtype) -> None:
    tensor = matrix(Type.Q6_K, 90, 256)
    chosen = torch.tensor([[3, 89], [0, 3]])
    assert torch.equal(GgufEmbedding(tensor, dtype)(chosen), tensor.packed().dense()[chosen].to(dtype))
    assert torch.equal(
        output_rows(GgufLinear([tensor.packed()], None), chosen[0]).weight, tensor.packed().dense()[chosen[0]]
    )


def test_rows_of_a_layer_that_was_cut_to_rows() -> None:
    cut = output_rows(GgufLinear([matrix(Type.Q8_0, 20, 64).packed()], None), torch.tensor([3, 7, 19]))
    assert (cut.in_features, cut.out_features) == (64, 3)
    assert torch.equal(output_rows(cut, torch.tensor([2])).weight, cut.weight[2:])


def test_activations_in_bfloat16() -> None:
    torch.manual_seed(0)
    linear, activations = (
        GgufLinear([matrix(Type.Q5_K, 30, 256).packed()], torch.randn(30)),
        torch.randn(3, 256).bfloat16(),
    )
    assert torch.equal(linear(activations), linear(activations.float()).bfloat16())


@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_blocks_and_activations_do_not_overflow(sign: int) -> None:
    """The largest sums: Q6_K with values of -32 and group scales of -128, and activations that are all the largest."""
    tensor = matrix(Type.Q6_K, 3, 512)
    tensor.data.view(3, 2, 210)[..., :192] = 0
    tensor.data.view(3, 2, 210)[..., 192:208] = 128
    activations = torch.full((2, 512), float(sign))
    expected = activations.double() @ exact(tensor).t()
    torch.testing.assert_close(GgufLinear([tensor.packed()], None)(activations).double(), expected, rtol=1e-5, atol=0)


def test_rows_that_do_not_exist_and_other_integers() -> None:
    tensor = matrix(Type.Q8_0, 8, 64)
    for wrong in (-1, 8):
        with pytest.raises(IndexError, match="of a matrix of 8"):
            tensor.rows(torch.tensor([0, wrong]))
    assert torch.equal(tensor.rows(torch.tensor([7, 2], dtype=torch.int32)), tensor.packed().dense()[[7, 2]])
    assert tensor.rows(torch.tensor([], dtype=torch.long)).shape == (0, 64)


def test_another_default_dtype_changes_nothing() -> None:
    tensor = matrix(Type.Q5_0, 8, 64)
    expected, activations = tensor.packed().dense(), torch.randn(2, 64)
    product = GgufLinear([tensor.packed()], None)(activations)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(tensor.packed().dense(), expected)
        assert torch.equal(GgufLinear([tensor.packed()], None)(activations), product)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_copied_layer_has_matrices_of_its_own() -> None:
    tensor, activations = matrix(Type.Q4_1, 20, 64), torch.randn(2, 64)
    layer = GgufLinear([tensor.packed()], torch.randn(20))
    copied, expected = deepcopy(layer), layer(activations)
    tensor.data.zero_()
    assert torch.equal(copied(activations), expected)


def test_weights_of_torch_are_rounded_to_eight_bits() -> None:
    torch.manual_seed(0)
    linear, activations = torch.nn.Linear(96, 40), torch.randn(5, 96)
    ours = GgufLinear.quantized(linear)
    step = linear.weight.detach().view(40, 3, 32).abs().amax(-1) / 127
    # Half a step, and the rounding of the scale to float16, which is up to 127 steps away.
    assert ((ours.dense() - linear.weight).view(40, 3, 32).abs() <= (0.501 + 127 * 2**-11) * step[..., None]).all()
    expected = rounded(activations, 32).float() @ ours.dense().t() + linear.bias
    torch.testing.assert_close(ours(activations), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(errors.UnsupportedModel, match="33 inputs"):
        GgufLinear.quantized(torch.nn.Linear(33, 4))


@pytest.mark.parametrize("kind", TYPES)
def test_weights_in_four_bits(kind: Type) -> None:
    """Half a step from the weights, and one for the largest of the sign that has no 8."""
    packed = matrix(kind, 37, 768).packed()
    rounded = packed.in_four_bits()
    if kind in (Type.Q4_0, Type.Q4_1, Type.Q4_K):
        assert rounded is packed
        return
    weights = packed.dense().view(-1, 32)
    steps = (rounded.dense().view(-1, 32) - weights).abs() / weights.abs().amax(-1, keepdim=True) * 8
    assert steps.max() <= 1.01
    assert (steps > 0.51).float().mean() < 0.05
    assert len(rounded.dense().view(-1, 32)[0].unique()) <= 16
