"""The reference of a quantized model: its rounding done by plain torch inside transformers' own network.

`mcsd verify` compares the native decoder with it, so it shares no kernel and no packed layout with that.
"""

from typing import Any

from torch import Tensor, nn

from mcsd.cpu.packing import packable_linears
from mcsd.cpu.quantization import MIN_ROW_MAXIMUM, quantize_int8
from mcsd.cpu.weight_plan import WeightPlan
from mcsd.kernels import WeightFormat

_STEPS = 127 * 254
"""Quantization steps of a two-byte activation from zero to the maximum of its token."""


def quantize_reference(network: Any, plan: WeightPlan) -> Any:
    """Round the weights and activations of a ``PreTrainedModel`` in place, as a target's plan does (W8A16).

    Block floating point rounds less than bfloat16, so such a plan changes nothing.
    """
    if plan.format is WeightFormat.W8A16:
        for _, parent, name, linear in list(packable_linears(network)):
            setattr(parent, name, _RoundedLinear(linear))
    return network


class _RoundedLinear(nn.Module):
    """A linear layer with int8 weights and two-byte activations, computed in float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        values, scale = quantize_int8(linear.weight)
        self.weight = nn.Parameter(values.float().mul_(scale[:, None]), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float(), requires_grad=False)

    def forward(self, activations: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, in the activations' dtype."""
        exact = activations.float()
        scale = exact.abs().amax(-1, keepdim=True).clamp(min=MIN_ROW_MAXIMUM) / _STEPS
        rounded = (exact / scale).round_().mul_(scale)
        return nn.functional.linear(rounded, self.weight, self.bias).to(activations.dtype)
