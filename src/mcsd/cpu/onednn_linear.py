"""Packed linear layers in oneDNN: bfloat16 weights in its blocked layout, and int8 weights (W8A8, W8A16)."""

import torch
from torch import Tensor, nn

from mcsd.cpu.packed_linear import PackedLinear
from mcsd.cpu.quantization import MIN_ROW_MAXIMUM, quantize_int8

_EXPECTED_ROWS = 16
"""Rows of the products for which oneDNN chooses the layout: about one tree."""

_INT8_MAX = 127
_ZERO_POINT = 128
"""Added to quantized activations: the kernel takes unsigned bytes."""

_FINE_STEPS = 254
"""Steps of an activation's low byte per step of its high byte, which leaves half a step on either side."""


class Bf16Linear(PackedLinear):
    """A bfloat16 linear layer in oneDNN's blocked weight layout; computes what ``nn.Linear`` does.

    Args:
        linear: the layer; its weight may be freed afterwards.
    """

    def __init__(self, linear: nn.Linear) -> None:
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _EXPECTED_ROWS)
        super().__init__(len(linear.weight), weight, linear.bias)

    def forward(self, activations: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return self.multiply_all(activations)

    def multiply(self, activations: Tensor) -> Tensor:
        """See `PackedLinear.multiply`."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(activations, self.weight, self.bias, "none", [], "")
        return out

    def dense(self) -> Tensor:
        """See `PackedLinear.dense`."""
        return self.weight.to_dense()


class Int8Linear(PackedLinear):
    """A linear layer with int8 weights, one scale per output, and activations quantized with one scale per token.

    Args:
        linear: the layer, in any dtype; its weight may be freed afterwards.
        two_bytes: whether activations have two bytes (W8A16) instead of one (W8A8).
        quantized: `quantize_int8` of its weight, which is then not read.
    """

    def __init__(self, linear: nn.Linear, two_bytes: bool, quantized: tuple[Tensor, Tensor] | None = None) -> None:
        values, scale = quantize_int8(linear.weight) if quantized is None else quantized
        bias = None if linear.bias is None else linear.bias.detach().float()
        super().__init__(len(linear.weight), torch.ops.onednn.qlinear_prepack(values, None), bias)
        self.two_bytes = two_bytes
        self.scale = scale
        self._zero_points = torch.zeros(len(values), dtype=torch.int64)
        self._half, self._fine_half = torch.tensor([_ZERO_POINT + 0.5, _ZERO_POINT + 0.5 - _FINE_STEPS / 2])

    def forward(self, activations: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, in the activations' dtype."""
        maximum = activations.abs().amax(-1, keepdim=True).float().clamp_(min=MIN_ROW_MAXIMUM)
        # Truncation after adding one half rounds to nearest; the zero point keeps all values positive.
        steps = torch.addcmul(self._half, activations.float(), _INT8_MAX / maximum)
        if self.two_bytes:
            # Both bytes are rows of one product, so the weights are read once.
            high = steps.floor()
            low = torch.add(self._fine_half, steps.sub_(high), alpha=_FINE_STEPS)
            out = self.multiply_all(torch.stack([high, low]).to(torch.uint8))
            out = out[0].add_(out[1], alpha=1 / _FINE_STEPS)
        else:
            out = self.multiply_all(steps.to(torch.uint8))
        scale = maximum.mul_(1 / _INT8_MAX)
        out = out.mul_(scale) if self.bias is None else torch.addcmul(self.bias, out, scale)
        return out.to(activations.dtype)

    def multiply(self, activations: Tensor) -> Tensor:
        """See `PackedLinear.multiply`; quantized activations, uint8 with `_ZERO_POINT` added, to float32."""
        if not activations.numel():
            # The kernel returns another shape for no rows.
            return activations.new_zeros(*activations.shape[:-1], self.out_features, dtype=torch.float32)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(activations, 1.0, _ZERO_POINT, self.weight, self.scale, self._zero_points),
            *(None, 1.0, 0, torch.float32, "none", [], ""),
        )
        return out

    def dense(self) -> Tensor:
        """See `PackedLinear.dense`."""
        values: Tensor = self.weight.to_dense()
        return values.t().float() * self.scale[:, None]
