"""Quantization of weights: int8 with one scale per output, int4 with a scale and a minimum per group of inputs.

Activations are quantized with one scale per token, never per batch: otherwise the distribution at a node would depend
on its siblings. Most of the error of int8 is the error of one-byte activations, so a target has two bytes (W8A16). A
draft has one (W8A8), because its q may be any distribution; in our kernels a draft model has int4 weights (W4A8), if
its predictions barely change (`mcsd.cpu.draft_int4`).
"""

import torch
from torch import Tensor

MIN_ROW_MAXIMUM = 1e-30
"""The maximum of a row counts as at least this, so that rows of zeros have a scale."""

GROUP = 32
"""Inputs of an int4 weight that share a scale and a minimum."""

_INT8_MAX = 127
_INT4_MAX = 15
_ROWS_AT_A_TIME = 128
_MIN_SCALE, _MAX_SCALE = 2.0**-24, 65504.0
"""The smallest and largest float16: scales of groups of zeros, and of weights beyond any model's."""


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight ``[out, in]``: int8 values of the same shape, and float32 scales ``[out]``."""
    weight = weight.detach()
    values = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight))
    # A few rows at a time stay in the CPU cache, which halves the time.
    for start in range(0, len(weight), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        scale = scales[rows].copy_(weight[rows].abs().amax(-1)).clamp_(min=MIN_ROW_MAXIMUM).div_(_INT8_MAX)
        values[rows] = weight[rows].div(scale[:, None]).round_()
    return values, scales


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight to four bits: ``weight ≈ minimum + scale * value`` in groups of `GROUP` inputs.

    The minimum of a group counts as at most zero and its maximum as at least zero, so zeros stay nearly zero.

    Args:
        weight: ``[out, in]``, whole groups.

    Returns:
        Values, uint8 ``[out, in]`` from 0 to 15; scale and minimum, float16 ``[out, in / GROUP]``.
    """
    groups = weight.float().view(len(weight), -1, GROUP)
    minimum = groups.amin(-1).clamp_(min=-_MAX_SCALE, max=0).half()
    scale = groups.amax(-1).clamp_(min=0).sub_(minimum).div_(_INT4_MAX).clamp_(min=_MIN_SCALE, max=_MAX_SCALE).half()
    values = groups.sub(minimum[..., None]).div_(scale[..., None]).round_().clamp_(0, _INT4_MAX)
    return values.to(torch.uint8).view(weight.shape), scale, minimum
