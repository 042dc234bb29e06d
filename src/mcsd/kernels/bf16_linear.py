"""A linear layer on bfloat16 weights where they are, for the few tokens of a draft tree."""

from typing import Any

import torch
from torch import Tensor

from mcsd.kernels.library import call

MAX_TOKENS = 16
"""About one tree. More tokens are left to PyTorch, which is then little slower."""


def bf16_linear_supported(activations: Any, weight: Any, bias: Any | None = None) -> bool:
    """Whether `bf16_linear` computes what ``torch.nn.functional.linear`` does of these tensors."""
    given = [activations, weight] if bias is None else [activations, weight, bias]
    return (
        all(type(each) in (Tensor, torch.nn.Parameter) for each in given)
        and all(each.dtype == torch.bfloat16 and each.device.type == "cpu" for each in given)
        and weight.dim() == 2
        and weight.is_contiguous()
        and activations.shape[-1:] == weight.shape[1:]
        and (bias is None or bias.shape == weight.shape[:1])
        and 0 < activations.numel() <= MAX_TOKENS * weight.shape[1]
        and not torch.is_grad_enabled()
    )


def bf16_linear(activations: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``[..., in]`` to ``[..., out]``, with sums in float32.

    Args:
        activations: bfloat16 ``[..., in]``.
        weight: bfloat16 ``[out, in]``.
        bias: bfloat16 ``[out]`` or None.
    """
    outputs, inputs = weight.shape
    activations = activations.contiguous()
    out = activations.new_empty(*activations.shape[:-1], outputs)
    bias = None if bias is None else bias.contiguous()
    call("bf16_linear", weight, bias, activations, out, inputs, outputs, activations.numel() // inputs)
    return out
