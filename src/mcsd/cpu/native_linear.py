"""Linear layers that run in the kernels: they pack weights in the formats and layouts of ``kernels/gemm.h``."""

import torch
from torch import Tensor, nn

from mcsd.cpu.packed_linear import PackedLinear
from mcsd.cpu.quantization import GROUP, quantize_int4, quantize_int8
from mcsd.errors import UnsupportedModel
from mcsd.kernels import DTYPES, call, readable
from mcsd.kernels.gemm import Linear, WeightFormat
from mcsd.kernels.huge_pages import zeros

_BLOCK = 32
"""Outputs of a block of weights."""

_INPUT_MULTIPLE = 16
"""Inputs of int8 and BFP16 weights are padded to a multiple of this."""

_BFP_GROUP = 128
"""Inputs that share a scale in BFP16."""

_BFP_SCALES = _BLOCK // 2
"""32-bit words that hold the scales of a block's group in BFP16."""

_ZERO_POINT = 128
"""Offset that makes int8 weights unsigned."""

_BLOCKS_AT_ONCE = 16
"""Blocks that are quantized to int4 together: few enough for the CPU's cache."""

_MAX_IN_FEATURES = 2**16
"""With more, sums of products of int8 would not fit into 32 bits."""


class NativeLinear(PackedLinear):
    """A linear layer in our kernels.

    Args:
        out_features, in_features: of the layer.
        format: of its weight.
        weight: in the layout of the format.
        scale: float32 ``[out]``; of W8A8 and W8A16.
        bias: ``[out]`` or None.
    """

    min_rows = 1

    def __init__(
        self,
        out_features: int,
        in_features: int,
        format: WeightFormat,
        weight: Tensor,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(out_features, weight, None if bias is None else bias.detach().float())
        self.in_features = in_features
        self.format = format
        self.scale = scale

    @classmethod
    def packed(
        cls, linear: nn.Linear, format: WeightFormat, quantized: tuple[Tensor, Tensor] | None = None
    ) -> "NativeLinear":
        """A linear layer of torch, packed.

        Args:
            linear: the layer, in any dtype; its weight may be freed afterwards.
            format: any but `WeightFormat.GGUF`.
            quantized: for W8A8 and W8A16, the result of `quantize_int8`; the layer's weight is then not read.

        Raises:
            UnsupportedModel: the layer has more than 2**16 inputs.
        """
        assert format is not WeightFormat.GGUF
        out_features, in_features = linear.weight.shape
        if in_features > _MAX_IN_FEATURES:
            raise UnsupportedModel(
                f"a linear layer has {in_features} inputs, the maximum is {_MAX_IN_FEATURES}",
                "leave quantize out",
            )
        scale = None
        if format is WeightFormat.BFP16:
            weight = _pack_bfp16(linear.weight.detach().to(torch.bfloat16).contiguous())
        elif format is WeightFormat.W4A8:
            weight = _pack_int4(linear.weight.detach())
        else:
            values, scale = quantize_int8(linear.weight) if quantized is None else quantized
            weight = _pack_int8(values)
        return cls(out_features, in_features, format, weight, scale, linear.bias)

    def forward(self, activations: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, in the dtype of the activations."""
        return self.multiply_all(activations)

    def multiply(self, activations: Tensor) -> Tensor:
        """See `PackedLinear.multiply`."""
        if activations.dtype not in DTYPES:
            return self.multiply(activations.float()).to(activations.dtype)
        tokens, dtype = len(activations), activations.dtype
        out = activations.new_empty(tokens, self.out_features)
        call("linear", self.struct(), readable(activations, tokens, self.in_features, dtype), dtype, tokens, out)
        return out

    def struct(self) -> Linear:
        """This layer for the kernels; it holds pointers to the layer's tensors."""
        scale, bias = (None if part is None else part.data_ptr() for part in (self.scale, self.bias))
        return Linear(self.weight.data_ptr(), scale, bias, self.in_features, self.out_features, self.format)

    def dense(self) -> Tensor:
        """See `PackedLinear.dense`."""
        if self.format is WeightFormat.BFP16:
            padded = _unpack_bfp16(self.weight, self.in_features)
        elif self.format is WeightFormat.W4A8:
            padded = _unpack_int4(self.weight)
        else:
            padded = _unpack_int8(self.weight)
        weight = padded[: self.out_features, : self.in_features]
        return weight if self.scale is None else weight * self.scale[:, None]


def _pack_int8(quantized: Tensor) -> Tensor:
    """int8 ``[out, in]`` as int32 ``[blocks, in / 4, 32]``, each of four inputs as uint8."""
    outputs, inputs = quantized.shape
    padded = nn.functional.pad(quantized, (0, -inputs % _INPUT_MULTIPLE, 0, -outputs % _BLOCK))
    fours = padded.view(torch.uint8).bitwise_xor(_ZERO_POINT).view(torch.int32)
    blocks = fours.view(-1, _BLOCK, fours.shape[1]).transpose(1, 2)
    return zeros(*blocks.shape).copy_(blocks)


def _unpack_int8(weight: Tensor) -> Tensor:
    """The quantized values in float32, padded."""
    fours = weight.flatten().view(torch.uint8).view(len(weight), -1, _BLOCK, 4)
    return fours.transpose(1, 2).flatten(2).flatten(0, 1).float().sub_(_ZERO_POINT)


def _pack_bfp16(weight: Tensor) -> Tensor:
    """bfloat16 ``[out, in]`` as int32 ``[blocks, ...]``: of each group the scales, then the quantized values."""
    outputs, inputs = weight.shape
    padded, blocks = -(-inputs // _INPUT_MULTIPLE) * _INPUT_MULTIPLE, -(-outputs // _BLOCK)
    out = zeros(blocks, -(-padded // _BFP_GROUP) * _BFP_SCALES + padded * _BLOCK // 2)
    call("pack_bfp16", weight, outputs, inputs, out)
    return out


def _unpack_bfp16(weight: Tensor, inputs: int) -> Tensor:
    """bfloat16 ``[out, in]``, padded: the whole groups, then the last one if it is shorter."""
    groups, size = inputs // _BFP_GROUP, _BFP_SCALES + _BFP_GROUP * _BLOCK // 2
    whole = weight[:, : groups * size].view(len(weight), groups, size)
    rest = weight[:, None, groups * size :]
    return torch.cat([_dequantize_bfp16(part) for part in (whole, rest) if part.numel()], dim=1)


def _dequantize_bfp16(groups: Tensor) -> Tensor:
    """int32 ``[blocks, groups, ...]`` as bfloat16 ``[32 blocks, in]``."""
    blocks = len(groups)
    scales = groups[..., :_BFP_SCALES].contiguous().view(torch.bfloat16).view(blocks, -1, _BFP_SCALES, 2)
    quantized = groups[..., _BFP_SCALES:].contiguous().view(torch.int16).view(blocks, scales.shape[1], -1, _BLOCK, 2)
    # The scales of outputs i and i + 16 are a pair.
    scales = scales.transpose(2, 3).flatten(2).transpose(1, 2)[..., None]
    return (quantized.permute(0, 3, 1, 2, 4).flatten(3) * scales).flatten(2).flatten(0, 1)


def _pack_int4(weight: Tensor) -> Tensor:
    """A weight ``[out, in]`` as int32 ``[blocks, groups, 160]``: scales, minimums, quantized values."""
    padded = nn.functional.pad(weight, (0, -weight.shape[1] % GROUP, 0, -len(weight) % _BLOCK)).contiguous()
    groups = padded.shape[1] // GROUP
    blocks = zeros(len(padded) // _BLOCK, groups, _BLOCK + _BLOCK * GROUP // 8)
    for start in range(0, len(blocks), _BLOCKS_AT_ONCE):
        some, outputs = blocks[start : start + _BLOCKS_AT_ONCE], padded[start * _BLOCK :][: _BLOCKS_AT_ONCE * _BLOCK]
        quantized, scale, minimum = quantize_int4(outputs)
        both = torch.stack([scale, minimum]).view(2, -1, _BLOCK, groups).permute(1, 3, 0, 2)
        some[..., :_BLOCK] = both.flatten().view(torch.int32).view(-1, groups, _BLOCK)
        # A byte holds outputs i and i + 16, a word four inputs.
        fours = quantized.view(torch.int32).view(-1, 2, _BLOCK // 2, groups, GROUP // 4)
        words = fours[:, 0] | fours[:, 1] << 4
        some[..., _BLOCK:] = words.permute(0, 2, 3, 1).flatten(2)
    return blocks


def _unpack_int4(weight: Tensor) -> Tensor:
    """float32 ``[out, in]``, padded."""
    blocks, groups, _ = weight.shape
    scale, minimum = (
        weight[..., :_BLOCK]
        .contiguous()
        .view(torch.float16)
        .view(blocks, groups, 2, _BLOCK)
        .float()
        .permute(2, 0, 3, 1)
    )[..., None]
    packed = weight[..., _BLOCK:].contiguous().view(torch.uint8).view(blocks, groups, -1, _BLOCK // 2, 4)
    quantized = torch.stack([packed & 15, packed >> 4], dim=3)
    quantized = quantized.permute(0, 3, 4, 1, 2, 5).flatten(4).flatten(1, 2)
    return quantized.float().mul_(scale).add_(minimum).flatten(2).flatten(0, 1)
