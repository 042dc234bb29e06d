"""Linear layers that run in the kernels."""

from enum import IntEnum

import torch
from torch import Tensor, nn

from mcsd.errors import UnsupportedModel
from mcsd.kernels import DTYPES, call, readable
from mcsd.models.native.pages import zeros
from mcsd.models.native.structs import Linear
from mcsd.models.product import Product
from mcsd.models.quantization import GROUP, round_in_groups, round_weight

_BLOCK = 32
"""Outputs of a block of weights."""

_FILLED = 16
"""Inputs of bytes and shorts are filled up to a multiple of this."""

_STRETCH = 128
"""Inputs of weights that are shorts, and of their states, that have a step of their own."""

_STEPS = _BLOCK // 2
"""Numbers of 32 bits that hold the steps of a block's stretch."""

_ROUNDED = 16
"""Blocks of weights that are rounded to half bytes together."""

_MOST_INPUTS = 2**16
"""With more, sums of bytes would not fit into 32 bits."""


class Kind(IntEnum):
    """What a weight is kept as, and states are multiplied as."""

    BYTES = 0
    """Both a byte: see `mcsd.models.quantization`."""
    FINE_BYTES = 1
    """The weight a byte, states two."""
    SHORTS = 2
    """The weight bfloat16 as integers of two bytes, so are states, both with a step for each `_STRETCH` inputs."""
    NIBBLES = 3
    """The weight half a byte, a state a byte: see `mcsd.models.quantization.round_in_groups`."""


class NativeLinear(Product):
    """A linear layer in our own kernels.

    Args:
        linear: the layer, in any dtype; its weight may be freed afterwards.
        kind: what its weight is kept as.
        rounded: what `round_weight` makes of its weight, which is not read then; of weights that are bytes.
    """

    least_rows = 1

    def __init__(self, linear: nn.Linear, kind: Kind, rounded: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__(len(linear.weight))
        self.inputs = linear.weight.shape[1]
        if self.inputs > _MOST_INPUTS:
            raise UnsupportedModel(
                f"a linear layer has {self.inputs} inputs, and {_MOST_INPUTS} is the most", "leave quantize out"
            )
        self.kind = kind
        self.scale: Tensor | None = None
        if kind is Kind.SHORTS:
            self.weight = _blocks_of_shorts(linear.weight.detach().to(torch.bfloat16).contiguous())
        elif kind is Kind.NIBBLES:
            self.weight = _blocks_of_nibbles(linear.weight.detach())
        else:
            codes, self.scale = round_weight(linear.weight) if rounded is None else rounded
            self.weight = _blocks_of_bytes(codes)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, states: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, in the states' dtype."""
        return self.product(states)

    def multiply(self, states: Tensor) -> Tensor:
        """See `Product.multiply`."""
        if states.dtype not in DTYPES:
            return self.multiply(states.float()).to(states.dtype)
        rows, dtype = len(states), states.dtype
        out = states.new_empty(rows, self.outputs)
        call("product", self.struct(), readable(states, rows, self.inputs, dtype), dtype, rows, out)
        return out

    def struct(self) -> Linear:
        """This layer as the kernels know it; it holds pointers to its weights."""
        scale, bias = (None if part is None else part.data_ptr() for part in (self.scale, self.bias))
        return Linear(self.weight.data_ptr(), scale, bias, self.inputs, self.outputs, self.kind)

    def dense(self) -> Tensor:
        """See `Product.dense`."""
        if self.kind is Kind.SHORTS:
            long, size = self.inputs // _STRETCH, _STEPS + _STRETCH * _BLOCK // 2
            whole = self.weight[:, : long * size].view(len(self.weight), long, size)
            rest = self.weight[:, None, long * size :]
            parts = [_from_shorts(part) for part in (whole, rest) if part.numel()]
            return torch.cat(parts, dim=1)[: self.outputs, : self.inputs]
        if self.kind is Kind.NIBBLES:
            numbers = self.weight[..., :_BLOCK].contiguous().view(torch.float16).view(*self.weight.shape[:2], 2, _BLOCK)
            step, least = numbers.float().permute(2, 0, 3, 1)[..., None]
            both = self.weight[..., _BLOCK:].contiguous().view(torch.uint8).view(*self.weight.shape[:2], -1, 16, 4)
            codes = torch.stack([both & 15, both >> 4], dim=3).permute(0, 3, 4, 1, 2, 5).flatten(4).flatten(1, 2)
            return codes.float().mul_(step).add_(least).flatten(2).flatten(0, 1)[: self.outputs, : self.inputs]
        assert self.scale is not None
        fours = self.weight.flatten().view(torch.uint8).view(len(self.weight), -1, _BLOCK, 4)
        codes = fours.transpose(1, 2).flatten(2).flatten(0, 1)
        return codes[: self.outputs, : self.inputs].float().sub_(128) * self.scale[:, None]


def _blocks_of_bytes(codes: Tensor) -> Tensor:
    """Codes int8 ``[out, in]``, moved to be unsigned, as int32 ``[blocks, in / 4, 32]`` of four inputs each."""
    rows, columns = len(codes), codes.shape[1]
    filled = nn.functional.pad(codes, (0, -columns % _FILLED, 0, -rows % _BLOCK))
    fours = filled.view(torch.uint8).bitwise_xor(128).view(torch.int32)
    blocks = fours.view(-1, _BLOCK, fours.shape[1]).transpose(1, 2)
    return zeros(*blocks.shape).copy_(blocks)


def _blocks_of_shorts(weight: Tensor) -> Tensor:
    """bfloat16 ``[out, in]`` as int32 ``[blocks, ...]``: for each stretch steps, and codes of two inputs each."""
    outputs, inputs = weight.shape
    filled, blocks = -(-inputs // _FILLED) * _FILLED, -(-outputs // _BLOCK)
    out = zeros(blocks, -(-filled // _STRETCH) * _STEPS + filled * _BLOCK // 2)
    call("shorts", weight, outputs, inputs, out)
    return out


def _from_shorts(stretches: Tensor) -> Tensor:
    """int32 ``[blocks, stretches, ...]`` as bfloat16 ``[32 blocks, in]``."""
    blocks = len(stretches)
    steps = stretches[..., :_STEPS].contiguous().view(torch.bfloat16).view(blocks, -1, _STEPS, 2)
    codes = stretches[..., _STEPS:].contiguous().view(torch.int16).view(blocks, steps.shape[1], -1, _BLOCK, 2)
    each = codes.permute(0, 3, 1, 2, 4).flatten(3) * steps.transpose(2, 3).flatten(2).transpose(1, 2)[..., None]
    return each.flatten(2).flatten(0, 1)


def _blocks_of_nibbles(weight: Tensor) -> Tensor:
    """A weight ``[out, in]`` as int32 ``[blocks, groups, 160]``: steps, least numbers, codes."""
    filled = nn.functional.pad(weight, (0, -weight.shape[1] % GROUP, 0, -len(weight) % _BLOCK)).contiguous()
    groups = filled.shape[1] // GROUP
    blocks = zeros(len(filled) // _BLOCK, groups, _BLOCK + _BLOCK * GROUP // 8)
    # Some blocks at a time, which stay in the processor's cache.
    for start in range(0, len(blocks), _ROUNDED):
        some, rows = blocks[start : start + _ROUNDED], filled[start * _BLOCK : (start + _ROUNDED) * _BLOCK]
        codes, step, least = round_in_groups(rows)
        numbers = torch.stack([step, least]).view(2, -1, _BLOCK, groups).permute(1, 3, 0, 2)
        some[..., :_BLOCK] = numbers.flatten().view(torch.int32).view(-1, groups, _BLOCK)
        # Two outputs a byte, four inputs together.
        fours = codes.view(torch.int32).view(-1, 2, _BLOCK // 2, groups, GROUP // 4)
        both = fours[:, 0] | fours[:, 1] << 4
        some[..., _BLOCK:] = both.permute(0, 2, 3, 1).flatten(2)
    return blocks
