"""The reference of a quantized model: its rounding done by plain torch inside transformers' own network.

`mcsd verify` compares the native decoder with it, so it shares no kernel and no packed layout with that.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mcsd.cpu.packing import packable_linears
from mcsd.cpu.quantization import MIN_ROW_MAXIMUM, quantize_int8
from mcsd.cpu.weight_plan import WeightPlan
from mcsd.kernels import WeightFormat

_INT8_STEPS, _GGUF_STEPS = 127 * 254, 127
"""Quantization steps of an activation from zero to the maximum: of its token, or of its group in `GGUF`."""

_GGUF_GROUP = 32
"""Inputs that share a scale of activations."""


def quantize_reference(network: Any, plan: WeightPlan) -> Any:
    """Round the weights and activations of a ``PreTrainedModel`` in place, as a target's plan does (W8A16, GGUF).

    Block floating point rounds less than bfloat16, so such a plan changes nothing. The weights of a GGUF file are as
    they are.
    """
    for _, parent, name, linear in list(packable_linears(network)):
        if plan.format is WeightFormat.W8A16:
            values, scale = quantize_int8(linear.weight)
            setattr(parent, name, _RoundedLinear(linear, values.float().mul_(scale[:, None]), _INT8_STEPS, None))
        elif plan.format is WeightFormat.GGUF:
            setattr(parent, name, _RoundedLinear(linear, linear.weight.detach().float(), _GGUF_STEPS, _GGUF_GROUP))
    return network


class _RoundedLinear(nn.Module):
    """A linear layer with quantized activations, computed in float32.

    Args:
        linear: the layer.
        weight: rounded, float32.
        steps: from zero to the maximum.
        group: inputs that share a scale; None: all.
    """

    def __init__(self, linear: nn.Linear, weight: Tensor, steps: int, group: int | None) -> None:
        super().__init__()
        self._steps, self._group = steps, group
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float(), requires_grad=False)

    def forward(self, activations: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, in the activations' dtype."""
        rounded = round_activations(activations.float(), self._steps, self._group)
        return nn.functional.linear(rounded, self.weight, self.bias).to(activations.dtype)


def round_activations(activations: Tensor, steps: int, group: int | None) -> Tensor:
    """Activations ``[..., in]`` as multiples of a scale.

    Args:
        activations: float32.
        steps: from zero to the maximum.
        group: inputs that share a scale; None: all.
    """

    def rounded(exact: Tensor) -> Tensor:
        scale = exact.abs().amax(-1, keepdim=True).clamp(min=MIN_ROW_MAXIMUM) / steps
        return (exact / scale).round_().mul_(scale)

    groups = torch.split(activations, group or activations.shape[-1], dim=-1)
    return torch.cat(list(map(rounded, groups)), dim=-1)
